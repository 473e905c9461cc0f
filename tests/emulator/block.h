/* One block of threads, run to its end. */
#ifndef QS_EMULATOR_BLOCK_H
#define QS_EMULATOR_BLOCK_H

#include <functional>

#include "emulator.h"

#pragma GCC visibility push(hidden)
namespace emu
{

/** Set up the threads of a launch, in an order that `order` picks: see block.cpp. */
void block_prepare(const launch_shape &shape, uint64_t order);

/** Run the block block_index of the prepared launch. */
void block_run(const std::function<void()> &body);

/** Name of the running kernel, nullptr outside of one. */
const char *running_kernel();

/** Forget the running thread's copies under way: it has ended. */
void cp_async_drop();
/** Make room for the copies of so many threads. */
void cp_async_prepare(unsigned threads);
/** The same for products of warpgroups. */
void wgmma_drop();
void wgmma_prepare(unsigned threads);

/** Number of a thread in its block. */
unsigned thread_number(const thread *t);

} // namespace emu
#pragma GCC visibility pop

#endif
