#include "train/room.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

/* Whose limits are the same: [QS_LIMITS_MAX] numbers a rank. */
typedef struct {
    uint64_t sharers[QS_LIMITS_MAX];
} shared_limits;

static bool has(const shared_limits *of_rank, uint64_t number)
{
    for (int i = 0; i < QS_LIMITS_MAX; i++) {
        if (of_rank->sharers[i] == number) {
            return true;
        }
    }
    return false;
}

static int count_sharers(const shared_limits *all, int nranks, uint64_t number)
{
    int count = 0;
    for (int r = 0; r < nranks && number != 0; r++) {
        count += has(&all[r], number);
    }
    return count > 0 ? count : 1;
}

/* Beside what a plan counts: buffers of the libraries, and of files that are read and written. A
 * run takes up to 5 MiB of it (docs/decisions.md). */
static const size_t BESIDE_BYTES = (size_t)16 << 20;

/* What glibc reserves for a thread that allocates; none of it is memory before it is used. */
static const size_t ARENA_BYTES = (size_t)64 << 20;

/* Threads that are still to be started: their stacks, and addresses for what they allocate. */
static size_t thread_bytes(qs_limit_kind kind, int threads)
{
    size_t stack = 0;
    pthread_attr_t usual;
    if (kind != QS_LIMIT_ADDRESS_SPACE && kind != QS_LIMIT_DATA) {
        return 0;
    }
    if (pthread_attr_init(&usual) == 0) {
        (void)pthread_attr_getstacksize(&usual, &stack);
        pthread_attr_destroy(&usual);
    }
    return (size_t)(threads - 1) * (stack + (kind == QS_LIMIT_ADDRESS_SPACE ? ARENA_BYTES : 0));
}

/* Keep the smaller part. */
static void narrow(qs_room *room, const qs_limit *limit, int sharers, int threads)
{
    const size_t part = limit->bytes / (size_t)sharers;
    const size_t taken = limit->held + BESIDE_BYTES + thread_bytes(limit->kind, threads);
    const size_t bytes = part > taken ? part - taken : 0;
    if (room->sharers == 0 || bytes < room->bytes) {
        *room = (qs_room){.bytes = bytes, .limit = *limit, .sharers = sharers};
    }
}

qs_status qs_room_share(qs_room *out, const qs_limits *mine, int threads, qs_comm *world)
{
    const int nranks = qs_comm_nranks(world);
    qs_status st = QS_OK;
    shared_limits numbers = {{0}};
    *out = (qs_room){0};
    for (int i = 0; i < mine->count; i++) {
        numbers.sharers[i] = mine->limit[i].sharers;
    }
    shared_limits *all = calloc((size_t)nranks, sizeof *all);
    if (all == NULL) {
        st = QS_FAIL(QS_ERR_MEMORY, "memory: the limits of %d ranks cannot be kept", nranks);
    }
    QS_GOTO(qs_comm_agree(world, st));
    QS_GOTO(qs_comm_all_gather_now(world, &numbers, all, sizeof numbers));
    for (int i = 0; i < mine->count; i++) {
        narrow(out, &mine->limit[i], count_sharers(all, nranks, mine->limit[i].sharers), threads);
    }
done:
    free(all);
    return st;
}

qs_status qs_room_on_host(qs_room *out, int threads, qs_comm *world)
{
    qs_limits limits;
    qs_limits_read(&limits, "");
    return qs_room_share(out, &limits, threads, world);
}

/* What a rank holds that has started MPI and looked at the machine, measured: 243 and 28 MiB. A
 * process that only plans has done neither. */
static size_t usually_held(qs_limit_kind kind)
{
    return kind == QS_LIMIT_ADDRESS_SPACE ? (size_t)256 << 20
           : kind == QS_LIMIT_DATA        ? (size_t)32 << 20
                                          : 0;
}

qs_room qs_room_assume(int threads, int local_nranks)
{
    qs_room room = {0};
    qs_limits limits;
    qs_limits_read(&limits, "");
    for (int i = 0; i < limits.count; i++) {
        const size_t usual = usually_held(limits.limit[i].kind);
        limits.limit[i].held = limits.limit[i].held > usual ? limits.limit[i].held : usual;
    }
    for (int i = 0; i < limits.count; i++) {
        narrow(&room, &limits.limit[i], limits.limit[i].sharers != 0 ? local_nranks : 1, threads);
    }
    return room;
}

void qs_room_describe(const qs_room *room, char *out, size_t capacity)
{
    char limit[QS_LIMIT_TEXT_MAX];
    qs_limit_describe(&room->limit, limit, sizeof limit);
    if (room->sharers > 1) {
        snprintf(out, capacity, "%s for %d ranks", limit, room->sharers);
    } else {
        snprintf(out, capacity, "%s", limit);
    }
}

size_t qs_room_within(size_t there, int64_t limit_bytes)
{
    return limit_bytes > 0 && (size_t)limit_bytes < there ? (size_t)limit_bytes : there;
}

size_t qs_room_here(const qs_device *device, const qs_room *host, int64_t limit_bytes)
{
    size_t free_bytes = 0, total_bytes = 0;
    qs_device_memory(device, &free_bytes, &total_bytes);
    return qs_room_within(total_bytes == 0 ? host->bytes : free_bytes, limit_bytes);
}
