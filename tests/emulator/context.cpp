/* See context.h. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE 1
#endif
#include "context.h"

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emu
{
namespace
{

/* Sanitized code needs several times the stack. Pages that nobody touches cost nothing. */
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t STACK_BYTES = 512 << 10;
#else
constexpr size_t STACK_BYTES = 128 << 10;
#endif

/* The tops of the stacks are spread, lest they all fall into one set of the cache. */
constexpr size_t SPREAD_STEP = 832, SPREAD = 26;

thread_local context *pool;
thread_local context host;
int n_created;
void (*entry_point)(); /* of all stacks */

[[noreturn]] void out_of_memory()
{
    perror("emulator: a stack cannot be allocated");
    abort();
}

/** A stack with an inaccessible page below it, so that an overflow is a fault at its place. */
void make_stack(context *c)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    void *at = mmap(nullptr, STACK_BYTES + page, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (at == MAP_FAILED || mprotect(at, page, PROT_NONE) != 0) {
        out_of_memory();
    }
    c->bottom = (char *)at + page;
    c->bytes = STACK_BYTES;
}

char *top_of(const context *c, size_t number)
{
    return (char *)c->bottom + c->bytes - 64 - number % SPREAD * SPREAD_STEP;
}

/** What a new stack does first. */
void begin()
{
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
    entry_point();
}

} // namespace

#if defined(__x86_64__) && !defined(QS_EMULATOR_UCONTEXT)

extern "C" __attribute__((visibility("hidden"))) void qs_emulator_switch(void **from, void *to);

/* rbx, rbp, r12 to r15 are what the caller expects to find again. */
__asm__(".text\n"
        ".globl qs_emulator_switch\n"
        ".hidden qs_emulator_switch\n"
        ".type qs_emulator_switch, @function\n"
        ".p2align 4\n"
        "qs_emulator_switch:\n"
        "    pushq %rbp\n"
        "    pushq %rbx\n"
        "    pushq %r12\n"
        "    pushq %r13\n"
        "    pushq %r14\n"
        "    pushq %r15\n"
        "    movq %rsp, (%rdi)\n"
        "    movq %rsi, %rsp\n"
        "    popq %r15\n"
        "    popq %r14\n"
        "    popq %r13\n"
        "    popq %r12\n"
        "    popq %rbx\n"
        "    popq %rbp\n"
        "    ret\n"
        ".size qs_emulator_switch, .-qs_emulator_switch\n");

static void prepare(context *c, size_t number)
{
    /* As if `begin` had been called by nobody, and had switched away at once: six registers, where
     * to go on, and where `begin` would return to. At its start rsp is 8 past a multiple of 16. */
    uintptr_t *top = (uintptr_t *)((uintptr_t)top_of(c, number) & ~(uintptr_t)15);
    *--top = 0;
    *--top = (uintptr_t)begin;
    for (int saved = 0; saved < 6; saved++) {
        *--top = 0;
    }
    c->stack_pointer = top;
}

static inline void exchange(context *from, context *to)
{
    qs_emulator_switch(&from->stack_pointer, to->stack_pointer);
}

#else

static void prepare(context *c, size_t number)
{
    getcontext(&c->registers);
    c->registers.uc_stack.ss_sp = c->bottom;
    c->registers.uc_stack.ss_size = (size_t)(top_of(c, number) - (char *)c->bottom);
    c->registers.uc_link = nullptr;
    makecontext(&c->registers, begin, 0);
}

static inline void exchange(context *from, context *to)
{
    swapcontext(&from->registers, &to->registers);
}

#endif

context *context_take(void (*entry)())
{
    context *c = pool;
    if (c != nullptr) {
        pool = c->next;
        return c;
    }
    c = (context *)calloc(1, sizeof *c);
    if (c == nullptr) {
        out_of_memory();
    }
    make_stack(c);
    entry_point = entry;
    prepare(c, (size_t)n_created++);
    return c;
}

void context_give(context *c)
{
    c->next = pool;
    pool = c;
}

context *context_of_host()
{
    if (host.bottom == nullptr) {
        pthread_attr_t attributes;
        if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
            pthread_attr_getstack(&attributes, &host.bottom, &host.bytes);
            pthread_attr_destroy(&attributes);
        }
    }
    return &host;
}

void context_switch(context *from, context *to)
{
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&from->fake_stack, to->bottom, to->bytes);
#endif
    exchange(from, to);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
#endif
}

} // namespace emu
