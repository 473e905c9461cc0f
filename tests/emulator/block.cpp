/* A block runs as its threads taking turns. A thread keeps the processor until it meets others: at
 * __syncthreads all threads of the block, at qs_warpgroup_sync the 128 of its warpgroup, at a warp
 * operation the 32 lanes of its warp. The last to come goes on, and the others when it waits in its
 * turn.
 *
 * The lanes of a warp stand in a ring, and a thread that waits hands over to the next in the ring;
 * when none of its warp can run, another warp has its turn. The ring and the order of the warps go
 * forwards, backwards or at random, as the launch's number and QSHARD_EMULATOR_SEED say: a kernel
 * that lacks a barrier gives different results from launch to launch.
 *
 * A thread needs a stack of its own only from its first meeting on: the next one begins on the
 * stack that the last one has left. A kernel without barriers is thus a plain loop.
 *
 * CUDA leaves undefined what happens when threads of a block part at a barrier, lanes of a warp at
 * a warp operation. Here nobody can go on then, and the program ends with a message. */
#include "block.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <memory>
#include <vector>

#include "context.h"
#include "mix.h"

namespace emu
{

enum thread_state : uint8_t { FRESH, READY, AT_WARP, AT_GROUP, AT_BARRIER, EXITED };

struct warp {
    uint8_t state[LANES];
    unsigned lanes;   /* that exist */
    unsigned arrived; /* at the meeting under way */
    unsigned parity;
    meeting what;
    /* What the lanes brought. Two sets, since the first to leave may come to the next meeting
     * before the others have looked. */
    uint64_t values[2][LANES];
    thread *first;
    warp *next;
};

thread *self;
uint3 block_index;
dim3 block_dim, grid_dim;
unsigned char *dynamic_shared;

namespace
{

constexpr unsigned MAX_THREADS = 1024, GROUP_WARPS = 4;
/* Not vectors: they are reached in every switch, and live as long as the process. */
thread threads[MAX_THREADS];
warp warps[MAX_THREADS / LANES];
unsigned n_threads, n_warps;
unsigned arrived; /* at the barrier under way */
unsigned group_arrived[MAX_THREADS / LANES / GROUP_WARPS];
unsigned exited;
const std::function<void()> *running_body;
const char *kernel_name;
context *host;
std::vector<unsigned char> shared_memory;
thread *first_thread;

uint8_t &state_of(const thread *t)
{
    return t->in->state[t->lane];
}

bool can_run(const thread *t)
{
    return state_of(t) <= READY;
}

/* ---- order ---- */

enum { FORWARD, BACKWARD, SHUFFLED, ORDERS };

/** The numbers below `count` in the order wanted. */
void arrange(unsigned *out, unsigned count, uint64_t order)
{
    for (unsigned i = 0; i < count; i++) {
        out[i] = order % ORDERS == BACKWARD ? count - 1 - i : i;
    }
    if (order % ORDERS == SHUFFLED) {
        for (unsigned i = count; i > 1; i--) {
            order = mix(order, i);
            const unsigned j = (unsigned)(order % i), kept = out[i - 1];
            out[i - 1] = out[j];
            out[j] = kept;
        }
    }
}

void link_lanes(warp *w, thread *lanes, uint64_t order)
{
    unsigned turn[LANES];
    arrange(turn, w->lanes, order);
    for (unsigned i = 0; i < w->lanes; i++) {
        lanes[turn[i]].next = &lanes[turn[(i + 1) % w->lanes]];
    }
    w->first = &lanes[turn[0]];
}

void link_warps(uint64_t order)
{
    unsigned turn[MAX_THREADS / LANES];
    arrange(turn, n_warps, order);
    for (unsigned i = 0; i < n_warps; i++) {
        warps[turn[i]].next = &warps[turn[(i + 1) % n_warps]];
    }
    first_thread = warps[turn[0]].first;
}

/* ---- who is next ---- */

const char *state_name(uint8_t state)
{
    static const char *const names[] = {"has not begun",
                                        "can run",
                                        "waits at a warp operation",
                                        "waits for its warpgroup",
                                        "waits at __syncthreads",
                                        "has ended"};
    return names[state];
}

/** Nobody can run, and not all have ended. */
[[noreturn]] void die_stuck()
{
    unsigned count[EXITED + 1] = {0};
    const thread *example[EXITED + 1] = {nullptr};
    for (unsigned i = 0; i < n_threads; i++) {
        const uint8_t state = state_of(&threads[i]);
        example[state] = count[state]++ == 0 ? &threads[i] : example[state];
    }
    char text[512];
    int used = 0;
    for (unsigned s = 0; s <= EXITED; s++) {
        if (count[s] > 0) {
            used += snprintf(text + used, sizeof text - (size_t)used,
                             "%s%u (thread %u the first): %s", used > 0 ? "; " : "", count[s],
                             thread_number(example[s]), state_name((uint8_t)s));
        }
    }
    die("the threads have parted, nobody can go on. Of %u: %s", n_threads, text);
}

/** Whoever runs after `t`, which cannot; nullptr if all have ended. */
thread *after(const thread *t)
{
    if (can_run(t->next)) {
        return t->next;
    }
    for (const warp *w = t->in->next; w != t->in; w = w->next) {
        if (can_run(w->first)) {
            return w->first;
        }
    }
    if (exited < n_threads) {
        die_stuck();
    }
    return nullptr;
}

/** What every stack does, for ever: run threads from their beginning. */
void run_threads()
{
    for (;;) {
        (*running_body)();
        state_of(self) = EXITED;
        exited++;
        cp_async_drop();
        wgmma_drop();

        context *mine = self->where;
        thread *t = after(self);
        if (t != nullptr && t->where == nullptr) {
            t->where = mine;
            self = t;
            continue;
        }
        context_give(mine);
        self = t;
        context_switch(mine, t != nullptr ? t->where : host);
    }
}

void hand_over(thread *to)
{
    context *mine = self->where;
    if (to->where == nullptr) {
        to->where = context_take(run_threads);
    }
    self = to;
    context_switch(mine, to->where);
}

} // namespace

/* ---- meetings ---- */

void barrier()
{
    arrived++;
    if (arrived < n_threads) {
        state_of(self) = AT_BARRIER;
        hand_over(after(self));
        return;
    }
    arrived = 0;
    for (unsigned i = 0; i < n_warps; i++) {
        memset(warps[i].state, READY, sizeof warps[i].state);
    }
}

void warpgroup_barrier(int group)
{
    const unsigned first = (unsigned)group * GROUP_WARPS;
    if ((unsigned)(self->in - warps) / GROUP_WARPS != (unsigned)group ||
        first + GROUP_WARPS > n_warps || n_threads % LANES != 0) {
        die("qs_warpgroup_sync(%d) of a thread of another warpgroup, or one that is not whole",
            group);
    }
    group_arrived[group]++;
    if (group_arrived[group] < GROUP_WARPS * LANES) {
        state_of(self) = AT_GROUP;
        hand_over(after(self));
        return;
    }
    group_arrived[group] = 0;
    for (unsigned i = first; i < first + GROUP_WARPS; i++) {
        memset(warps[i].state, READY, sizeof warps[i].state);
    }
}

static const char *name_of(meeting what)
{
    static const char *const names[] = {"a shuffle", "a vote",   "__syncwarp",
                                        "mma",       "ldmatrix", "ldmatrix.trans"};
    return names[(int)what];
}

/** All lanes have had their turn, and not all have come. */
[[noreturn]] static void die_alone(const thread *t, meeting what)
{
    unsigned other = t->next->lane;
    for (unsigned lane = 0; lane < LANES; lane++) {
        const uint8_t state = t->in->state[lane];
        other = state >= AT_GROUP ? lane : other;
    }
    die("lane %u is at %s, but lane %u of its warp %s", t->lane, name_of(what), other,
        state_name(t->in->state[other]));
}

const uint64_t *meet(meeting what, uint64_t value, void (*finish)(const uint64_t *))
{
    thread *me = self;
    warp *w = me->in;
    if (w->arrived == 0) {
        w->what = what;
    } else if (w->what != what) {
        die("a lane comes to %s, others of its warp wait at %s", name_of(what), name_of(w->what));
    }
    uint64_t *values = w->values[w->parity];
    values[me->lane] = value;
    w->arrived++;
    if (w->arrived < LANES) {
        w->state[me->lane] = AT_WARP;
        if (w->lanes < LANES) {
            die("%s in a warp of %u threads: whole warps are wanted", name_of(what), w->lanes);
        }
        if (!can_run(me->next)) {
            die_alone(me, what);
        }
        hand_over(me->next);
        return values;
    }
    if (finish != nullptr) {
        finish(values);
    }
    w->arrived = 0;
    w->parity ^= 1;
    memset(w->state, READY, sizeof w->state);
    return values;
}

/* ---- blocks ---- */

void block_prepare(const launch_shape &shape, uint64_t order)
{
    kernel_name = shape.name;
    grid_dim = shape.grid;
    block_dim = shape.threads;
    n_threads = block_dim.x * block_dim.y * block_dim.z;
    n_warps = (n_threads + LANES - 1) / LANES;
    for (unsigned i = 0; i < n_threads; i++) {
        thread *t = &threads[i];
        t->index = {i % block_dim.x, i / block_dim.x % block_dim.y, i / block_dim.x / block_dim.y};
        t->lane = i % LANES;
        t->in = &warps[i / LANES];
    }
    for (unsigned i = 0; i < n_warps; i++) {
        warp *w = &warps[i];
        const unsigned left = n_threads - i * LANES;
        w->lanes = left < (unsigned)LANES ? left : (unsigned)LANES;
        link_lanes(w, &threads[i * LANES], order);
    }
    link_warps(order);
    cp_async_prepare(n_threads);
    wgmma_prepare(n_threads);

    /* 128 more, for the alignment that QS_DYNAMIC_SHARED promises (QS_DYNAMIC_SHARED_PANELS only
     * looks at addresses that count from 0 here). */
    shared_memory.resize(shape.shared_bytes + 128);
    const uintptr_t at = (uintptr_t)shared_memory.data();
    dynamic_shared = shared_memory.data() + (128 - at % 128) % 128;
}

void block_run(const std::function<void()> &body)
{
    memset(shared_memory.data(), 0xff, shared_memory.size());
    for (unsigned i = 0; i < n_threads; i++) {
        threads[i].where = nullptr;
    }
    for (unsigned i = 0; i < n_warps; i++) {
        memset(warps[i].state, FRESH, sizeof warps[i].state);
        warps[i].arrived = 0;
    }
    arrived = exited = 0;
    memset(group_arrived, 0, sizeof group_arrived);
    running_body = &body;
    host = context_of_host();
    self = first_thread;
    self->where = context_take(run_threads);
    context_switch(host, self->where);
}

unsigned thread_number(const thread *t)
{
    return (unsigned)(t - threads);
}

const char *running_kernel()
{
    return self != nullptr ? kernel_name : nullptr;
}

void die(const char *format, ...)
{
    fflush(stdout);
    fputs("emulator: ", stderr);
    if (self != nullptr) {
        fprintf(stderr, "kernel %s, block (%u, %u, %u), thread (%u, %u, %u): ", kernel_name,
                block_index.x, block_index.y, block_index.z, self->index.x, self->index.y,
                self->index.z);
    }
    va_list args;
    va_start(args, format);
    vfprintf(stderr, format, args);
    va_end(args);
    fputs("\n", stderr);
    fflush(stderr);
    abort();
}

} // namespace emu
