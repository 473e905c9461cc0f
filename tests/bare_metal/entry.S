/* Where the boot sector jumps to: the serial port, a stack, zeroed variables, and the registers of
 * AVX-512 and AMX (XCR0 0x600e7). An exception finds no handler and ends the machine. */
    .section .entry, "ax"
    .globl entry
entry:
    mov $0x3fb, %dx /* 8 bits, no parity, fastest */
    mov $0x80, %al
    out %al, %dx
    mov $0x3f8, %dx
    mov $1, %al
    out %al, %dx
    mov $0x3f9, %dx
    mov $0, %al
    out %al, %dx
    mov $0x3fb, %dx
    mov $3, %al
    out %al, %dx
    mov $0x1000000, %rsp
    lea bss_begin(%rip), %rdi
    lea bss_end(%rip), %rcx
    sub %rdi, %rcx
    xor %eax, %eax
    rep stosb
    xor %ecx, %ecx
    xor %edx, %edx
    mov $0x600e7, %eax
    xsetbv
    call run
1:  hlt
    jmp 1b
    .section .note.GNU-stack, "", @progbits
