/* What the cases need of a C library, on a machine with nothing but a serial port. Their formats
 * alone: %s %d %a and hexadecimals of four digits. */
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    SERIAL = 0x3F8,
    SERIAL_STATUS = SERIAL + 5,
    READY = 0x20,
    EMPTY = 0x40,
    SHUTDOWN = 0x8900 /* of Bochs */
};

int case_main(void);            /* main of the case */
int __cpu_indicator_init(void); /* libgcc's, which a C library calls at start */
void run(void);
long syscall(long number, ...);

static void out(uint16_t port, uint8_t value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static bool serial_is(uint8_t state)
{
    uint8_t status;
    __asm__ volatile("inb %1, %0" : "=a"(status) : "Nd"((uint16_t)SERIAL_STATUS));
    return (status & state) != 0;
}

int putchar(int c)
{
    while (!serial_is(READY)) {
    }
    out(SERIAL, (uint8_t)c);
    return c;
}

static void put_text(const char *text)
{
    while (*text != '\0') {
        putchar(*text++);
    }
}

static void put_number(uint64_t value, unsigned base, int least)
{
    char digits[24];
    int count = 0;
    do {
        digits[count++] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value != 0 || count < least);
    while (count > 0) {
        putchar(digits[--count]);
    }
}

int puts(const char *text)
{
    put_text(text);
    return putchar('\n');
}

int printf(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    for (; *format != '\0'; format++) {
        if (*format != '%') {
            putchar(*format);
            continue;
        }
        format += strspn(format + 1, "0123456789") + 1;
        if (*format == 's') {
            put_text(va_arg(args, const char *));
        } else if (*format == 'd') {
            const int value = va_arg(args, int);
            put_text(value < 0 ? "-" : "");
            put_number(value < 0 ? (uint64_t) - (int64_t)value : (uint64_t)value, 10, 1);
        } else if (*format == 'a') { /* its bits */
            const double value = va_arg(args, double);
            uint64_t bits;
            memcpy(&bits, &value, sizeof bits);
            put_number(bits, 16, 16);
        } else {
            put_number(va_arg(args, unsigned), 16, 4);
        }
    }
    va_end(args);
    return 0;
}

void *memcpy(void *restrict to, const void *restrict from, size_t bytes)
{
    void *const start = to;
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(bytes) : : "memory");
    return start;
}

void *memmove(void *to, const void *from, size_t bytes)
{
    if ((uintptr_t)to - (uintptr_t)from >= bytes) {
        return memcpy(to, from, bytes);
    }
    char *last = (char *)to + bytes - 1;
    const char *source = (const char *)from + bytes - 1;
    __asm__ volatile("std; rep movsb; cld" : "+D"(last), "+S"(source), "+c"(bytes) : : "memory");
    return to;
}

void *memset(void *to, int value, size_t bytes)
{
    void *const start = to;
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(bytes) : "a"(value) : "memory");
    return start;
}

int memcmp(const void *a, const void *b, size_t bytes)
{
    const unsigned char *x = a, *y = b;
    size_t i = 0;
    while (i < bytes && x[i] == y[i]) {
        i++;
    }
    return i < bytes ? x[i] - y[i] : 0;
}

size_t strspn(const char *text, const char *set)
{
    size_t count = 0;
    for (const char *s = set; text[count] != '\0' && *s != '\0';) {
        if (*s == text[count]) {
            count++;
            s = set;
        } else {
            s++;
        }
    }
    return count;
}

int strcmp(const char *a, const char *b)
{
    while (*a != '\0' && *a == *b) {
        a++;
        b++;
    }
    return (unsigned char)*a - (unsigned char)*b;
}

int strcasecmp(const char *a, const char *b)
{
    return strcmp(a, b);
}

char *getenv(const char *name)
{
    (void)name;
    return NULL;
}

/* Nothing here names a table that there is not. */
void qs_log_warn(const char *format, ...)
{
    (void)format;
}

/* tile.c asks a kernel for registers; here they are switched on (entry.S). */
long syscall(long number, ...)
{
    (void)number;
    return 0;
}

void abort(void)
{
    for (;;) {
        __asm__ volatile("hlt");
    }
}

/* The test scales by powers of two that are normal numbers. */
float ldexpf(float value, int exponent)
{
    for (; exponent > 0; exponent--) {
        value *= 2.0F;
    }
    for (; exponent < 0; exponent++) {
        value *= 0.5F;
    }
    return value;
}

void run(void)
{
    __cpu_indicator_init();
    printf("exit %d\n", case_main());
    while (!serial_is(EMPTY)) { /* the last characters are on their way */
    }
    for (const char *word = "Shutdown"; *word != '\0'; word++) {
        out(SHUTDOWN, (uint8_t)*word);
    }
}
