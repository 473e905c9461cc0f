/* The calls of device.h on every device: memory that is counted and zeroed, copies in every
 * direction, order within and between queues, and what is said when something fails. The emulator's
 * environment variables make it fail where a GPU would. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "backend/plugin.h"
#include "twin.h"

enum { COUNT = 5000 };

static tw_backend backends[TW_BACKENDS_MAX];
static int n_backends;

static void open_backends(void)
{
    n_backends = tw_backends(backends);
}

static void close_backends(void)
{
    tw_backends_close(backends, n_backends);
}

TestSuite(twin_device, .init = open_backends, .fini = close_backends);

static void fill(int *x, int seed)
{
    for (int i = 0; i < COUNT; i++) {
        x[i] = i * 3 + seed;
    }
}

static void assert_filled(const int *x, int seed, const char *what)
{
    for (int i = 0; i < COUNT; i++) {
        cr_assert_eq(x[i], i * 3 + seed, "%s: element %d is %d, not %d", what, i, x[i],
                     i * 3 + seed);
    }
}

static size_t held(const tw_backend *b, qs_mem_class kind)
{
    return qs_mem_now_bytes(tw_is_cpu(b) ? QS_MEM_HOST : QS_MEM_DEVICE, kind);
}

/* ---- memory ---- */

Test(twin_device, memory_is_zeroed_aligned_and_counted)
{
    for (int i = 0; i < n_backends; i++) {
        const tw_backend *b = &backends[i];
        static const size_t sizes[] = {1, 255, 256, 257, 100000};
        const size_t before = held(b, QS_MEM_LORA);
        size_t sum = 0;
        void *blocks[5];
        for (int k = 0; k < 5; k++) {
            cr_assert_eq(qs_device_alloc(b->device, &blocks[k], sizes[k], QS_MEM_LORA), QS_OK);
            cr_assert_eq((uintptr_t)blocks[k] % (tw_is_cpu(b) ? 64 : 256), 0, "%s", b->name);
            sum += sizes[k];
            cr_assert_eq(held(b, QS_MEM_LORA), before + sum, "%s", b->name);
            uint8_t *bytes = tw_read(b, blocks[k], sizes[k]);
            for (size_t at = 0; at < sizes[k]; at++) {
                cr_assert_eq(bytes[at], 0);
            }
            free(bytes);
        }
        for (int k = 0; k < 5; k++) {
            qs_device_free(b->device, blocks[k]);
        }
        cr_assert_eq(held(b, QS_MEM_LORA), before, "%s", b->name);
        void *none = &sum;
        cr_assert_eq(qs_device_alloc(b->device, &none, 0, QS_MEM_LORA), QS_OK);
        cr_assert_null(none);
        qs_device_free(b->device, NULL);
    }
}

Test(twin_device, pinned_memory_is_zeroed_and_counted_as_the_hosts)
{
    for (int i = 0; i < n_backends; i++) {
        const tw_backend *b = &backends[i];
        const size_t before = qs_mem_now_bytes(QS_MEM_HOST, QS_MEM_DATA);
        int *pinned = NULL;
        cr_assert_eq(QS_HOST_ALLOC(b->device, &pinned, COUNT, QS_MEM_DATA), QS_OK);
        cr_assert_eq(qs_mem_now_bytes(QS_MEM_HOST, QS_MEM_DATA), before + COUNT * sizeof *pinned);
        for (int k = 0; k < COUNT; k++) {
            cr_assert_eq(pinned[k], 0);
        }
        qs_device_host_free(b->device, pinned);
        cr_assert_eq(qs_mem_now_bytes(QS_MEM_HOST, QS_MEM_DATA), before);
    }
}

/* What an arena gives out is what was reserved; afterwards it is full, and says so with both
 * numbers; what is freed is used again, zeroed. */
Test(twin_device, an_arena_holds_what_was_reserved)
{
    for (int i = 0; i < n_backends; i++) {
        const tw_backend *b = &backends[i];
        const size_t before = held(b, QS_MEM_OPTIM);
        void *early = NULL, *first = NULL, *rest = NULL, *more = NULL;
        cr_assert_eq(qs_device_alloc(b->device, &early, 1000, QS_MEM_OPTIM), QS_OK);
        cr_assert_eq(qs_device_reserve(b->device, 1 << 20), QS_OK);
        if (tw_is_cpu(b)) {
            qs_device_free(b->device, early);
            continue;
        }
        cr_assert_eq(qs_device_reserve(b->device, 1 << 20), QS_ERR_BUG);
        qs_error_clear();
        size_t free_bytes, total_bytes;
        qs_device_memory(b->device, &free_bytes, &total_bytes);
        cr_assert_geq(free_bytes, 1 << 20);
        cr_assert_gt(total_bytes, free_bytes);
        cr_assert_eq(qs_device_alloc(b->device, &first, 4001, QS_MEM_OPTIM), QS_OK);
        qs_device_memory(b->device, &free_bytes, &total_bytes);
        cr_assert_eq(qs_device_alloc(b->device, &rest, free_bytes, QS_MEM_OPTIM), QS_OK);
        cr_assert_eq(held(b, QS_MEM_OPTIM), before + 1000 + 4001 + free_bytes);
        cr_assert_eq(qs_device_alloc(b->device, &more, 1, QS_MEM_OPTIM), QS_ERR_MEMORY);
        cr_assert_null(more);
        cr_assert(strstr(qs_error_text(), "optimizer state do not fit") != NULL, "%s",
                  qs_error_text());
        qs_error_clear();
        cr_assert_eq(held(b, QS_MEM_OPTIM), before + 1000 + 4001 + free_bytes);

        int dirt[1000];
        memset(dirt, 0xa5, sizeof dirt);
        cr_assert_eq(qs_queue_copy(b->queue, first, dirt, sizeof dirt), QS_OK);
        qs_device_free(b->device, first);
        cr_assert_eq(qs_device_alloc(b->device, &more, 4000, QS_MEM_OPTIM), QS_OK);
        cr_assert_eq(more, first, "the gap is used");
        int *clean = tw_read(b, more, 4000);
        for (int k = 0; k < 1000; k++) {
            cr_assert_eq(clean[k], 0);
        }
        free(clean);
        qs_device_free(b->device, more);
        qs_device_free(b->device, rest);
        qs_device_free(b->device, early);
        cr_assert_eq(held(b, QS_MEM_OPTIM), before);
    }
}

Test(twin_device, closing_a_device_uncounts_what_it_still_held)
{
    for (int i = 0; i < n_backends; i++) {
        tw_backend *b = &backends[i];
        if (tw_is_cpu(b)) {
            continue;
        }
        void *left = NULL, *pinned = NULL;
        cr_assert_eq(qs_device_alloc(b->device, &left, 777, QS_MEM_DATA), QS_OK);
        cr_assert_eq(qs_device_reserve(b->device, 1 << 16), QS_OK);
        cr_assert_eq(qs_device_alloc(b->device, &left, 777, QS_MEM_DATA), QS_OK);
        cr_assert_eq(qs_device_host_alloc(b->device, &pinned, 777, QS_MEM_DATA), QS_OK);
        qs_queue_destroy(b->queue);
        b->queue = NULL;
        qs_device_close(b->device);
        b->device = NULL;
        cr_assert_eq(qs_mem_now_bytes(QS_MEM_DEVICE, QS_MEM_DATA), 0);
        cr_assert_eq(qs_mem_now_bytes(QS_MEM_HOST, QS_MEM_DATA), 0);
    }
}

/* ---- copies ---- */

Test(twin_device, copies_arrive_in_every_direction_and_pageable_memory_is_free_at_once)
{
    for (int i = 0; i < n_backends; i++) {
        const tw_backend *b = &backends[i];
        static int pageable[COUNT], back[COUNT];
        int *pinned = NULL, *one = NULL, *two = NULL;
        cr_assert_eq(QS_HOST_ALLOC(b->device, &pinned, COUNT, QS_MEM_WORK), QS_OK);
        cr_assert_eq(QS_DEVICE_ALLOC(b->device, &one, COUNT, QS_MEM_WORK), QS_OK);
        cr_assert_eq(QS_DEVICE_ALLOC(b->device, &two, COUNT, QS_MEM_WORK), QS_OK);
        fill(pageable, 1);
        cr_assert_eq(qs_queue_copy(b->queue, one, pageable, sizeof pageable), QS_OK);
        memset(pageable, 0xff, sizeof pageable);
        cr_assert_eq(qs_queue_copy(b->queue, two, one, sizeof pageable), QS_OK);
        cr_assert_eq(qs_queue_copy(b->queue, pinned, two, sizeof pageable), QS_OK);
        cr_assert_eq(qs_queue_zero(b->queue, one, sizeof pageable), QS_OK);
        cr_assert_eq(qs_queue_copy(b->queue, one, pinned, sizeof pageable), QS_OK);
        cr_assert_eq(qs_queue_copy(b->queue, back, one, sizeof back), QS_OK);
        assert_filled(back, 1, b->name); /* no wait: pageable memory is there on return */
        cr_assert_eq(qs_queue_zero(b->queue, one, sizeof pageable / 2), QS_OK);
        cr_assert_eq(qs_queue_copy(b->queue, one, one, 0), QS_OK);
        cr_assert_eq(qs_queue_wait(b->queue), QS_OK);
        int *half = tw_read(b, one, sizeof pageable);
        cr_assert_eq(half[COUNT / 2 - 1], 0);
        cr_assert_eq(half[COUNT / 2], COUNT / 2 * 3 + 1);
        free(half);
        qs_device_host_free(b->device, pinned);
        tw_free(b, one);
        tw_free(b, two);
    }
}

/* ---- queues and events ---- */

/* Ping-pong between two queues, pinned memory at the ends so that nothing waits by itself: without
 * the events the emulator's lazy streams would give another result. */
Test(twin_device, a_mark_orders_one_queue_behind_another)
{
    for (int i = 0; i < n_backends; i++) {
        const tw_backend *b = &backends[i];
        qs_queue *other = NULL;
        int *pinned = NULL, *out = NULL, *one = NULL, *two = NULL;
        cr_assert_eq(qs_queue_create_on(b->device, &other, 1), QS_OK);
        cr_assert_eq(QS_HOST_ALLOC(b->device, &pinned, COUNT, QS_MEM_WORK), QS_OK);
        cr_assert_eq(QS_HOST_ALLOC(b->device, &out, COUNT, QS_MEM_WORK), QS_OK);
        cr_assert_eq(QS_DEVICE_ALLOC(b->device, &one, COUNT, QS_MEM_WORK), QS_OK);
        cr_assert_eq(QS_DEVICE_ALLOC(b->device, &two, COUNT, QS_MEM_WORK), QS_OK);
        const size_t bytes = COUNT * sizeof *one;
        for (int round = 0; round < 100; round++) { /* more marks than a ring has */
            fill(pinned, round);
            cr_assert_eq(qs_queue_copy(b->queue, one, pinned, bytes), QS_OK);
            cr_assert_eq(qs_queue_after(other, qs_event_record(b->queue)), QS_OK);
            cr_assert_eq(qs_queue_copy(other, two, one, bytes), QS_OK);
            cr_assert_eq(qs_queue_after(b->queue, qs_event_record(other)), QS_OK);
            cr_assert_eq(qs_queue_zero(b->queue, one, bytes), QS_OK);
            cr_assert_eq(qs_queue_copy(b->queue, out, two, bytes), QS_OK);
            cr_assert_eq(qs_event_wait(qs_event_record(b->queue)), QS_OK);
            assert_filled(out, round, b->name);
        }
        cr_assert_eq(qs_queue_wait(other), QS_OK);
        qs_queue_destroy(other);
        qs_device_host_free(b->device, pinned);
        qs_device_host_free(b->device, out);
        tw_free(b, one);
        tw_free(b, two);
    }
}

Test(twin_device, a_mark_that_left_the_ring_is_still_waited_for)
{
    for (int i = 0; i < n_backends; i++) {
        const tw_backend *b = &backends[i];
        int *pinned = NULL, *out = NULL, *one = NULL;
        cr_assert_eq(QS_HOST_ALLOC(b->device, &pinned, COUNT, QS_MEM_WORK), QS_OK);
        cr_assert_eq(QS_HOST_ALLOC(b->device, &out, COUNT, QS_MEM_WORK), QS_OK);
        cr_assert_eq(QS_DEVICE_ALLOC(b->device, &one, COUNT, QS_MEM_WORK), QS_OK);
        const size_t bytes = COUNT * sizeof *one;
        fill(pinned, 5);
        cr_assert_eq(qs_queue_copy(b->queue, one, pinned, bytes), QS_OK);
        cr_assert_eq(qs_queue_copy(b->queue, out, one, bytes), QS_OK);
        const qs_event mark = qs_event_record(b->queue);
        for (int k = 0; k < 200; k++) {
            (void)qs_event_record(b->queue);
        }
        cr_assert_eq(qs_event_wait(mark), QS_OK);
        assert_filled(out, 5, b->name);
        cr_assert_eq(qs_event_wait((qs_event){0}), QS_OK, "a mark that has passed");
        cr_assert_eq(qs_queue_after(b->queue, (qs_event){0}), QS_OK);
        cr_assert_eq(qs_queue_after(b->queue, mark), QS_OK, "its own");
        cr_assert_eq(qs_queue_after(b->cpu_queue, mark), QS_OK, "the host waits");
        qs_device_host_free(b->device, pinned);
        qs_device_host_free(b->device, out);
        tw_free(b, one);
    }
}

Test(twin_device, calls_that_a_device_has_no_use_for_do_nothing)
{
    for (int i = 0; i < n_backends; i++) {
        const tw_backend *b = &backends[i];
        qs_span_begin(b->queue, "layer %d", 3);
        qs_span_end(b->queue);
        qs_device_profile(b->device, true);
        qs_device_profile(b->device, false);
        cr_assert_eq(qs_queue_poll(b->queue), QS_OK);
        qs_queue_set_idle(b->queue, NULL, NULL);
        qs_queue_idle(b->queue);
        cr_assert_geq(qs_queue_threads(b->queue), 1);
        cr_assert_eq(qs_queue_native(b->queue) == NULL, tw_is_cpu(b));
        cr_assert_gt(strlen(qs_device_description(b->device)), 2);
    }
}

/* ---- opened queues ---- */

static const qs_ops_limits small_limits = {.threads = 1,
                                           .tokens = 32,
                                           .documents = 2,
                                           .loss_rows = 8,
                                           .widest = 64,
                                           .n_heads = 2,
                                           .n_kv_heads = 1,
                                           .head_dim = 16,
                                           .dropout = true,
                                           .lora_rank = 8,
                                           .n_linears = 2,
                                           .out = {64, 32},
                                           .in = {32, 64},
                                           .hidden = 32,
                                           .head_rows = 64,
                                           .kept_units = 3};

Test(twin_device, an_opened_queue_holds_the_scratch_that_was_announced)
{
    for (int i = 0; i < n_backends; i++) {
        const tw_backend *b = &backends[i];
        const size_t announced = b->ops->scratch_bytes(&small_limits);
        cr_assert_gt(announced, 0);
        if (tw_is_cpu(b)) {
            cr_assert_eq(b->ops->kept_bytes(&small_limits), 0);
            continue; /* grows by itself */
        }
        for (int round = 0; round < 2; round++) {
            tw_open(b, &small_limits);
            cr_assert_eq(held(b, QS_MEM_WORK), announced);
            cr_assert_gt(held(b, QS_MEM_BASE_DECODED), 0);
            cr_assert_eq(held(b, QS_MEM_BASE_DECODED), b->ops->kept_bytes(&small_limits));
            cr_assert_eq(b->ops->open(b->queue, &small_limits), QS_ERR_BUG, "opened twice");
            qs_error_clear();
            b->ops->close(b->queue);
            cr_assert_eq(held(b, QS_MEM_WORK) + held(b, QS_MEM_BASE_DECODED), 0);
            b->ops->close(b->queue);
        }
        const qs_unit_view no_unit = {0};
        cr_assert_eq(b->ops->unit_open(b->queue, &no_unit, NULL, NULL, 0, 0, false), QS_ERR_BUG,
                     "an operation on a closed queue");
        qs_error_clear();
    }
}

/* ---- watches ---- */

static qs_status all_is_well(void *ctx)
{
    ++*(int *)ctx;
    return QS_OK;
}

static qs_status lose_the_peer(void *ctx)
{
    ++*(int *)ctx;
    return QS_FAIL(QS_ERR_PEER, "the peer is gone");
}

Test(twin_device, a_watched_wait_still_waits)
{
    for (int i = 0; i < n_backends; i++) {
        const tw_backend *b = &backends[i];
        int calls = 0, *out = NULL, *one = NULL;
        cr_assert_eq(QS_HOST_ALLOC(b->device, &out, COUNT, QS_MEM_WORK), QS_OK);
        cr_assert_eq(QS_DEVICE_ALLOC(b->device, &one, COUNT, QS_MEM_WORK), QS_OK);
        cr_assert_eq(qs_device_watch(b->device, all_is_well, &calls), QS_OK);
        for (int round = 0; round < 3; round++) {
            fill(out, round);
            cr_assert_eq(qs_queue_copy(b->queue, one, out, COUNT * sizeof *one), QS_OK);
            cr_assert_eq(qs_queue_wait(b->queue), QS_OK);
            memset(out, 0, COUNT * sizeof *out);
            cr_assert_eq(qs_queue_copy(b->queue, out, one, COUNT * sizeof *one), QS_OK);
            cr_assert_eq(qs_event_wait(qs_event_record(b->queue)), QS_OK);
            assert_filled(out, round, b->name);
        }
        qs_device_unwatch(b->device, &calls);
        qs_device_host_free(b->device, out);
        tw_free(b, one);
    }
}

/* ---- failures, by the emulator ---- */

static const char *emulated_path(void)
{
    static char path[1024];
    snprintf(path, sizeof path, "%s/libqshard_emulated.so", getenv("QSHARD_BINARY_DIR"));
    return access(path, F_OK) == 0 ? path : NULL;
}

static const qs_plugin *emulated(void)
{
    char why[1024] = "";
    if (emulated_path() == NULL) {
        cr_skip_test("no libqshard_emulated.so");
    }
    const qs_plugin *plugin = qs_plugin_load(emulated_path(), why, sizeof why);
    cr_assert_not_null(plugin, "%s", why);
    return plugin;
}

static qs_device *emulated_device(const char *fail)
{
    setenv("QSHARD_EMULATOR_FAIL", fail, 1);
    qs_device *device = NULL;
    const qs_plugin *plugin = emulated();
    cr_assert_eq(plugin->device_open(&device, 0), QS_OK, "%s", qs_error_text());
    return device;
}

static void assert_failed(qs_status st, qs_status want, const char *text)
{
    cr_assert_eq(st, want, "status %d, '%s'", (int)st, qs_error_text());
    cr_assert(strstr(qs_error_text(), text) != NULL, "'%s' is not in '%s'", text, qs_error_text());
}

Test(device_errors, memory_that_is_not_there_is_named_with_both_numbers)
{
    setenv("QSHARD_EMULATOR_MEMORY", "1048576", 1);
    qs_device *device = emulated_device("");
    void *out = NULL;
    assert_failed(qs_device_alloc(device, &out, 2 << 20, QS_MEM_ACTIVATION), QS_ERR_MEMORY,
                  "(2097152 bytes) for kept activations");
    cr_assert_null(out);
    cr_assert_eq(qs_mem_now_bytes(QS_MEM_DEVICE, QS_MEM_ACTIVATION), 0);
    qs_error_clear();
    assert_failed(qs_device_reserve(device, 2 << 20), QS_ERR_MEMORY, "of 0.001 GiB are free");
    qs_error_clear();
    cr_assert_eq(qs_device_alloc(device, &out, 4096, QS_MEM_WORK), QS_OK,
                 "an error leaves the device usable: %s", qs_error_text());
    qs_device_close(device);
}

Test(device_errors, operations_that_cannot_be_opened_leave_nothing)
{
    setenv("QSHARD_EMULATOR_MEMORY", "65536", 1);
    qs_device *device = emulated_device("");
    qs_queue *queue = NULL;
    cr_assert_eq(qs_queue_create_on(device, &queue, 1), QS_OK);
    assert_failed(emulated()->ops()->open(queue, &small_limits), QS_ERR_MEMORY, "for scratch");
    cr_assert_eq(qs_mem_now_bytes(QS_MEM_DEVICE, QS_MEM_WORK), 0);
    qs_error_clear();
    emulated()->ops()->close(queue);
    qs_queue_destroy(queue);
    qs_device_close(device);
}

Test(device_errors, pinned_memory_that_is_not_there)
{
    qs_device *device = emulated_device("cudaHostAlloc:1");
    void *out = NULL;
    assert_failed(qs_device_host_alloc(device, &out, 4096, QS_MEM_DATA), QS_ERR_MEMORY,
                  "4096 bytes of pinned host memory for data");
    cr_assert_null(out);
    cr_assert_eq(qs_mem_now_bytes(QS_MEM_HOST, QS_MEM_DATA), 0);
    qs_device_close(device);
}

Test(device_errors, a_failure_of_work_is_found_by_who_waits)
{
    qs_device *device = emulated_device("cudaStreamSynchronize:1");
    qs_queue *queue = NULL;
    cr_assert_eq(qs_queue_create_on(device, &queue, 1), QS_OK);
    const qs_status st = qs_queue_wait(queue);
    assert_failed(st, QS_ERR_DEVICE, "the GPU failed while it worked: ");
    cr_assert_eq(qs_exit_code(st), 9);
    qs_queue_destroy(queue);
    qs_device_close(device);
}

Test(device_errors, a_mark_that_could_not_be_made_fails_the_waits)
{
    qs_device *device = emulated_device("cudaEventRecord:2");
    qs_queue *queue = NULL, *other = NULL;
    cr_assert_eq(qs_queue_create_on(device, &queue, 1), QS_OK);
    cr_assert_eq(qs_queue_create_on(device, &other, 1), QS_OK);
    cr_assert_eq(qs_event_wait(qs_event_record(queue)), QS_OK);
    const qs_event lost = qs_event_record(queue);
    cr_assert_eq(qs_queue_after(other, lost), QS_ERR_DEVICE);
    cr_assert_eq(qs_event_wait(lost), QS_ERR_DEVICE);
    cr_assert_eq(qs_queue_wait(queue), QS_ERR_DEVICE);
    cr_assert(strstr(qs_error_text(), "cudaEventRecord") != NULL, "%s", qs_error_text());
    qs_queue_destroy(queue);
    qs_queue_destroy(other);
    qs_device_close(device);
}

/* A queue with copies that take the emulator longer than the time between two looks, of a device
 * whose watch counts its calls in *calls. \return memory of the device. */
static void *much_to_copy(qs_device *device, qs_queue **queue, int *calls)
{
    enum { COPIES = 400, BYTES = 32 << 20 }; /* far more than fit between two looks */
    void *one = NULL, *two = NULL;
    cr_assert_eq(qs_queue_create_on(device, queue, 1), QS_OK);
    cr_assert_eq(qs_device_alloc(device, &one, BYTES, QS_MEM_WORK), QS_OK);
    cr_assert_eq(qs_device_alloc(device, &two, BYTES, QS_MEM_WORK), QS_OK);
    cr_assert_eq(qs_device_watch(device, lose_the_peer, calls), QS_OK);
    for (int i = 0; i < COPIES; i++) {
        cr_assert_eq(qs_queue_copy(*queue, two, one, BYTES), QS_OK);
    }
    return one;
}

Test(device_errors, a_watch_that_finds_an_error_ends_the_wait)
{
    qs_device *device = emulated_device("");
    qs_queue *queue = NULL;
    int calls = 0;
    (void)much_to_copy(device, &queue, &calls);
    const qs_event mark = qs_event_record(queue);
    assert_failed(qs_event_wait(mark), QS_ERR_PEER, "the peer is gone");
    cr_assert_eq(calls, 1);
    qs_device_unwatch(device, &calls);
    cr_assert_eq(qs_event_wait(mark), QS_OK);
    qs_queue_destroy(queue);
    qs_device_close(device);
}

/* CUDA waits for what stands before a copy of pageable memory, and asks nobody meanwhile. */
Test(device_errors, a_watch_is_asked_before_memory_that_is_not_pinned_is_copied)
{
    qs_device *device = emulated_device("");
    qs_queue *queue = NULL;
    int calls = 0, pageable = 7;
    const void *one = much_to_copy(device, &queue, &calls);
    assert_failed(qs_queue_copy(queue, &pageable, one, sizeof pageable), QS_ERR_PEER,
                  "the peer is gone");
    cr_assert_eq(calls, 1);
    cr_assert_eq(pageable, 7);
    qs_device_unwatch(device, &calls);
    cr_assert_eq(qs_queue_wait(queue), QS_OK);
    qs_queue_destroy(queue);
    qs_device_close(device);
}

/* Every creation in turn: none may leak, crash, or succeed in half. */
Test(device_errors, whatever_fails_at_the_start_leaves_nothing)
{
    static const char *const fails[] = {"cudaSetDevice:1",    "cudaGetDeviceProperties:1",
                                        "cudaStreamCreate:1", "cudaStreamCreate:2",
                                        "cudaEventCreate:1",  "cudaEventCreate:64",
                                        "cudaMalloc:1",       "cudaMemsetAsync:1"};
    emulated();
    for (size_t i = 0; i < sizeof fails / sizeof *fails; i++) {
        fflush(NULL);
        const pid_t child = fork(); /* settings are read once a process */
        if (child == 0) {
            setenv("QSHARD_EMULATOR_FAIL", fails[i], 1);
            char why[256];
            const qs_plugin *plugin = qs_plugin_load(emulated_path(), why, sizeof why);
            qs_device *device = NULL;
            qs_queue *queue = NULL;
            void *block = NULL;
            qs_status st = plugin->device_open(&device, 0);
            const bool opened = st == QS_OK;
            st = st == QS_OK ? qs_queue_create_on(device, &queue, 1) : st;
            const bool created = st == QS_OK;
            st = st == QS_OK ? qs_device_alloc(device, &block, 1000, QS_MEM_WORK) : st;
            const bool sound = st != QS_OK && strlen(qs_error_text()) > 0 && block == NULL &&
                               (device != NULL) == opened && (queue != NULL) == created &&
                               qs_mem_now_bytes(QS_MEM_DEVICE, QS_MEM_WORK) == 0;
            qs_queue_destroy(queue);
            qs_device_close(device);
            _exit(sound ? 0 : 1);
        }
        int status = 1;
        cr_assert(child > 0 && waitpid(child, &status, 0) == child);
        cr_assert(WIFEXITED(status) && WEXITSTATUS(status) == 0, "%s: %d", fails[i], status);
    }
}
