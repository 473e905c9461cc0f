/* Streams that do nothing until they must. Work given to a stream waits there, and runs when the
 * host waits for it (or frees memory), or when a stream that must run waits for an event behind it.
 * Whoever forgets to wait thus reads what was there before.
 *
 * A query runs one piece of work, and then says whether it was the last: somebody who polls gets
 * there, and sees cudaErrorNotReady on the way.
 *
 * QSHARD_EMULATOR_STREAMS=eager runs everything at once; =mixed makes one stream fast and the
 * others slow, another one after a while, as the seed says: that finds who overwrites what another
 * stream still reads.
 *
 * The null stream is the legacy one: it waits for all streams made without cudaStreamNonBlocking,
 * and its work is over before theirs goes on; here it runs at once. */
#include <time.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <set>
#include <vector>

#include "emulator_c.h"
#include "mix.h"
#include "runtime.h"

using emu::lock;

namespace emu
{

/* What a piece of work does: marks and waits touch no memory, arrivals (of NCCL) may be put off. */
enum class piece_kind { plain, order, arrival };

struct piece {
    std::function<void()> run;
    piece_kind kind;
    uint64_t number;
};

} // namespace emu

struct CUstream_st {
    std::deque<emu::piece> work;
    std::deque<emu::piece> put_off; /* arrivals that are due, and that nobody has waited for */
    uint64_t done = 0, end = 0; /* numbers of the oldest piece that waits and of the next to come */
    bool blocking = false;
};

namespace emu
{
namespace
{

/** A mark in a stream: what an event has recorded last. Waits keep the mark they were made for. */
struct mark {
    std::shared_ptr<CUstream_st> stream;
    uint64_t number;
    double ms; /* when it was reached */
};

struct registry {
    std::vector<std::shared_ptr<CUstream_st>> streams; /* in the order of their making */
    std::set<cudaEvent_t> events;
    std::shared_ptr<CUstream_st> null = std::make_shared<CUstream_st>();
    const CUstream_st *fast = nullptr; /* see run_some; only compared */
    uint64_t fast_for = 0, choices = 0;
};

/* Never freed: work may be left when the program ends. */
registry &all()
{
    static auto *r = new registry;
    return *r;
}

std::shared_ptr<CUstream_st> find(cudaStream_t stream)
{
    if (stream == nullptr) {
        return all().null;
    }
    for (const auto &s : all().streams) {
        if (s.get() == stream) {
            return s;
        }
    }
    return nullptr;
}

double now_ms()
{
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec * 1e-6;
}

/** The arrivals before `number` that were put off. */
void run_put_off(CUstream_st &stream, uint64_t number)
{
    while (!stream.put_off.empty() && stream.put_off.front().number < number) {
        const piece p = std::move(stream.put_off.front());
        stream.put_off.pop_front();
        p.run();
    }
}

/** Run the stream's work up to `number`, but for its arrivals if they are to be put off. Each piece
 * is off the list before it runs. */
void advance_to(CUstream_st &stream, uint64_t number, bool put_off)
{
    while (stream.done < number) {
        piece p = std::move(stream.work.front());
        stream.work.pop_front();
        stream.done++;
        if (put_off && p.kind == piece_kind::arrival) {
            stream.put_off.push_back(std::move(p));
            continue;
        }
        if (p.kind == piece_kind::plain) {
            run_put_off(stream, p.number); /* it may use what has arrived */
        }
        p.run();
    }
}

void run_to(CUstream_st &stream, uint64_t number)
{
    if (stream.done >= number && stream.put_off.empty()) {
        return;
    }
    const device_access access;
    run_put_off(stream, number);
    advance_to(stream, number, false);
}

void force_blocking()
{
    for (const auto &s : all().streams) {
        if (s->blocking) {
            run_to(*s, s->end);
        }
    }
}

/** As the settings say, run something behind a push. When mixed, one stream at a time is fast, for
 * as long as it happens to be: it runs whatever it is given at once, and the others nothing. */
void run_some(CUstream_st &pushed)
{
    registry &r = all();
    if (config().eager || &pushed == r.null.get()) {
        run_to(pushed, pushed.end);
    }
    if (!config().mixed || r.streams.empty()) {
        return;
    }
    if (r.fast_for == 0) {
        const uint64_t dice = mix(config().seed ^ 0x73747265616d7321u, r.choices++);
        r.fast_for = (dice >> 32) % ((uint64_t)1 << dice % 10) + 1;
        uint64_t chosen = (dice >> 16) % r.streams.size();
        for (const auto &s : r.streams) {
            r.fast = chosen-- == 0 ? s.get() : r.fast;
        }
    }
    r.fast_for--;
    if (r.fast == &pushed || r.fast_for == 0) {
        for (const auto &s : r.streams) {
            if (s.get() == r.fast) {
                run_to(*s, s->end);
            }
        }
    }
}

int access_depth;

} // namespace

device_access::device_access()
{
    if (access_depth++ == 0) {
        set_access(true);
    }
}

device_access::~device_access()
{
    if (--access_depth == 0) {
        set_access(false);
    }
}

static void push_piece(cudaStream_t stream, std::function<void()> work, piece_kind kind)
{
    lock guard(mutex);
    const std::shared_ptr<CUstream_st> s = find(stream);
    if (!s) {
        die("work for a stream that does not exist");
    }
    if (stream == nullptr) {
        force_blocking();
    }
    s->work.push_back({std::move(work), kind, s->end});
    s->end++;
    run_some(*s);
}

void push(cudaStream_t stream, std::function<void()> work)
{
    push_piece(stream, std::move(work), piece_kind::plain);
}

void force(cudaStream_t stream)
{
    lock guard(mutex);
    const std::shared_ptr<CUstream_st> s = find(stream);
    if (s) {
        run_to(*s, s->end);
    }
}

void force_all()
{
    lock guard(mutex);
    for (const auto &s : all().streams) {
        run_to(*s, s->end);
    }
}

bool stream_exists(cudaStream_t stream)
{
    return find(stream) != nullptr;
}

} // namespace emu

using namespace emu;

struct CUevent_st {
    std::shared_ptr<mark> last; /* nullptr: never recorded */
    bool timed;
};

extern "C" {

void qs_emulator_push(cudaStream_t stream, void (*run)(void *), void (*release)(void *), void *data)
{
    push(stream, [run, release, data] {
        run(data);
        if (release != nullptr) {
            release(data);
        }
    });
}

void qs_emulator_push_arrival(cudaStream_t stream, void (*run)(void *), void *data)
{
    push_piece(
        stream, [run, data] { run(data); }, piece_kind::arrival);
}

void qs_emulator_advance(cudaStream_t stream)
{
    lock guard(emu::mutex);
    const std::shared_ptr<CUstream_st> s = find(stream);
    if (s) {
        const device_access access;
        advance_to(*s, s->end, true);
    }
}

void qs_emulator_force(cudaStream_t stream)
{
    force(stream);
}

void qs_emulator_access(void (*run)(void *), void *data)
{
    lock guard(emu::mutex);
    const device_access access;
    run(data);
}

/* ---- streams ---- */

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *out, unsigned int flags, int priority)
{
    (void)priority;
    lock guard(emu::mutex);
    const cudaError_t failed = enter("cudaStreamCreate");
    if (failed != cudaSuccess) {
        return failed;
    }
    const auto stream = std::make_shared<CUstream_st>();
    stream->blocking = (flags & cudaStreamNonBlocking) == 0;
    all().streams.push_back(stream);
    *out = stream.get();
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *out, unsigned int flags)
{
    return cudaStreamCreateWithPriority(out, flags, 0);
}

cudaError_t cudaStreamCreate(cudaStream_t *out)
{
    return cudaStreamCreateWithPriority(out, cudaStreamDefault, 0);
}

cudaError_t cudaStreamDestroy(cudaStream_t stream)
{
    lock guard(emu::mutex);
    const std::shared_ptr<CUstream_st> s = find(stream);
    if (stream == nullptr || !s) {
        return keep(cudaErrorInvalidResourceHandle);
    }
    run_to(*s, s->end);
    all().streams.erase(std::find(all().streams.begin(), all().streams.end(), s));
    return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream)
{
    lock guard(emu::mutex);
    const cudaError_t failed = enter("cudaStreamSynchronize");
    if (failed != cudaSuccess) {
        return failed;
    }
    const std::shared_ptr<CUstream_st> s = find(stream);
    if (!s) {
        return keep(cudaErrorInvalidResourceHandle);
    }
    run_to(*s, s->end);
    return cudaSuccess;
}

/** One piece of work, then: is `number` behind us? NotReady is an answer, not an error to keep. */
static cudaError_t query(CUstream_st &stream, uint64_t number)
{
    run_to(stream, std::min(number, stream.done + 1));
    return stream.done < number ? cudaErrorNotReady : cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream)
{
    lock guard(emu::mutex);
    const cudaError_t failed = enter("cudaStreamQuery");
    if (failed != cudaSuccess) {
        return failed;
    }
    const std::shared_ptr<CUstream_st> s = find(stream);
    return s ? query(*s, s->end) : keep(cudaErrorInvalidResourceHandle);
}

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned int flags)
{
    (void)flags;
    lock guard(emu::mutex);
    const cudaError_t failed = enter("cudaStreamWaitEvent");
    if (failed != cudaSuccess) {
        return failed;
    }
    if (!find(stream) || all().events.count(event) == 0) {
        return keep(cudaErrorInvalidResourceHandle);
    }
    if (event->last) {
        push_piece(
            stream, [m = event->last] { run_to(*m->stream, m->number); }, piece_kind::order);
    }
    return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t run, void *data)
{
    lock guard(emu::mutex);
    const cudaError_t failed = enter("cudaLaunchHostFunc");
    if (failed != cudaSuccess) {
        return failed;
    }
    if (!find(stream)) {
        return keep(cudaErrorInvalidResourceHandle);
    }
    push(stream, [run, data] { run(data); });
    return cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void)
{
    lock guard(emu::mutex);
    const cudaError_t failed = enter("cudaDeviceSynchronize");
    if (failed == cudaSuccess) {
        force_all();
    }
    return failed;
}

/* ---- events ---- */

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *out, unsigned int flags)
{
    lock guard(emu::mutex);
    const cudaError_t failed = enter("cudaEventCreate");
    if (failed != cudaSuccess) {
        return failed;
    }
    *out = new CUevent_st{nullptr, (flags & cudaEventDisableTiming) == 0};
    all().events.insert(*out);
    return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t *out)
{
    return cudaEventCreateWithFlags(out, cudaEventDefault);
}

cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    lock guard(emu::mutex);
    if (all().events.erase(event) == 0) {
        return keep(cudaErrorInvalidResourceHandle);
    }
    delete event;
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream)
{
    lock guard(emu::mutex);
    const cudaError_t failed = enter("cudaEventRecord");
    if (failed != cudaSuccess) {
        return failed;
    }
    const std::shared_ptr<CUstream_st> s = find(stream);
    if (!s || all().events.count(event) == 0) {
        return keep(cudaErrorInvalidResourceHandle);
    }
    event->last = std::make_shared<mark>(mark{s, s->end + 1, 0.0});
    push_piece(
        stream, [m = event->last] { m->ms = now_ms(); }, piece_kind::order);
    return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event)
{
    lock guard(emu::mutex);
    const cudaError_t failed = enter("cudaEventSynchronize");
    if (failed != cudaSuccess) {
        return failed;
    }
    if (all().events.count(event) == 0) {
        return keep(cudaErrorInvalidResourceHandle);
    }
    if (event->last) {
        run_to(*event->last->stream, event->last->number);
    }
    return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event)
{
    lock guard(emu::mutex);
    const cudaError_t failed = enter("cudaEventQuery");
    if (failed != cudaSuccess) {
        return failed;
    }
    if (all().events.count(event) == 0) {
        return keep(cudaErrorInvalidResourceHandle);
    }
    return event->last ? query(*event->last->stream, event->last->number) : cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end)
{
    lock guard(emu::mutex);
    const cudaError_t failed = enter("cudaEventElapsedTime");
    if (failed != cudaSuccess) {
        return failed;
    }
    if (all().events.count(start) == 0 || all().events.count(end) == 0 || !start->last ||
        !end->last || !start->timed || !end->timed) {
        return keep(cudaErrorInvalidResourceHandle);
    }
    if (start->last->stream->done < start->last->number ||
        end->last->stream->done < end->last->number) {
        return keep(cudaErrorNotReady);
    }
    *ms = (float)(end->last->ms - start->last->ms);
    return cudaSuccess;
}

} // extern "C"
