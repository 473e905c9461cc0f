/* Stacks that take turns: what a CUDA thread runs on. A switch saves the registers that a function
 * call keeps and loads the other's, 2 to 3 ns on x86-64; elsewhere ucontext does it. Stacks are
 * kept and used again. */
#ifndef QS_EMULATOR_CONTEXT_H
#define QS_EMULATOR_CONTEXT_H

#include <stddef.h>

#if !defined(__x86_64__) || defined(QS_EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif

#pragma GCC visibility push(hidden)
namespace emu
{

struct context {
#if defined(__x86_64__) && !defined(QS_EMULATOR_UCONTEXT)
    void *stack_pointer;
#else
    ucontext_t registers;
#endif
    void *bottom; /* of the stack, for AddressSanitizer */
    size_t bytes;
    void *fake_stack;
    context *next; /* in the pool */
};

/** A stack at rest; run `entry`, always the same one, on it by switching to it. `entry` never
 * returns; a stack given back goes on behind its last switch when it is taken again. */
context *context_take(void (*entry)());
void context_give(context *c);

/** The stack that the operating system gave this thread. */
context *context_of_host();

/** Save the running one in `from`, go on with `to`. */
void context_switch(context *from, context *to);

} // namespace emu
#pragma GCC visibility pop

#endif
