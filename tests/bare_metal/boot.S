/* The first sector of the disk: loads the program behind it to 64 KiB, in pieces of 32 KiB, maps the
 * first GiB to itself, and enters it in 64-bit mode with SSE and XSAVE on. CHUNKS: pieces. */
    .code16
    .globl _start
_start:
    cli
    ljmp $0, $1f
1:  xor %ax, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %ss
    mov $0x7c00, %sp
    mov %dl, drive
    sti /* the BIOS waits for the disk's */
    mov $CHUNKS, %cx
2:  push %cx
    mov drive, %dl
    mov $0x42, %ah /* extended read */
    mov $packet, %si
    int $0x13
    pop %cx
    jc stop
    addw $0x800, packet_segment
    addl $64, packet_sector
    loop 2b
    cli

    in $0x92, %al /* the A20 line */
    or $2, %al
    and $0xfe, %al
    out %al, $0x92

    mov $0x1000, %edi /* page tables of three levels, pages of 2 MiB */
    xor %eax, %eax
    mov $3072, %ecx
    rep stosl
    movl $0x2003, 0x1000
    movl $0x3003, 0x2000
    mov $0x3000, %edi
    mov $0x83, %eax
    mov $512, %ecx
3:  mov %eax, (%edi)
    add $0x200000, %eax
    add $8, %edi
    loopl 3b
    mov $0x1000, %eax
    mov %eax, %cr3

    mov $0x40620, %eax /* PAE, OSFXSR, OSXMMEXCPT, OSXSAVE */
    mov %eax, %cr4
    mov $0xc0000080, %ecx /* EFER: long mode */
    rdmsr
    or $0x100, %eax
    wrmsr
    lgdtl table
    mov %cr0, %eax
    and $0xfffffff3, %eax /* no emulation, no task switch */
    or $0x80000003, %eax  /* paging, protection, MP */
    mov %eax, %cr0
    ljmpl $8, $long_mode
stop:
    hlt
    jmp stop

    .code64
long_mode:
    mov $16, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %ss
    mov $0x10000, %eax
    jmp *%rax

drive: .byte 0
    .p2align 3
packet: .byte 16, 0
    .word 64, 0
packet_segment: .word 0x1000
packet_sector: .long 1, 0
    .p2align 3
descriptors: .quad 0, 0x00af9a000000ffff, 0x00cf92000000ffff
table: .word 23
    .long descriptors
    .org 510
    .word 0xaa55
    .section .note.GNU-stack, "", @progbits
