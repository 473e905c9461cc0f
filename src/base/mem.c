/* Counted memory. A block carries its size, class and true start in the 64 bytes before what the
 * caller sees:
 *
 *     calloc -> | slack | block_header (64) | caller's bytes ... |
 *                       ^ 64-byte aligned    ^ 64-byte aligned
 *
 * calloc, and not aligned_alloc + memset: large blocks come from the system zeroed, and pages that
 * nobody touches stay unused. */
#include "base/mem.h"

#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

enum { ALIGNMENT = 64, MAGIC = 0x51534d45 };

typedef struct {
    void *start; /* what calloc returned */
    size_t bytes;
    int class;
    int magic; /* a pointer that is not ours, or freed twice, stops here instead of in malloc */
    char pad[ALIGNMENT - sizeof(void *) - sizeof(size_t) - 2 * sizeof(int)];
} block_header;

_Static_assert(sizeof(block_header) == ALIGNMENT, "the caller's bytes must stay aligned");

typedef struct {
    atomic_size_t now[QS_MEM_CLASS_COUNT], peak[QS_MEM_CLASS_COUNT], now_total, peak_total;
} space_counts;

static space_counts counts[QS_MEM_SPACE_COUNT];

static void count_up(atomic_size_t *current, atomic_size_t *highest, size_t bytes)
{
    size_t value = atomic_fetch_add(current, bytes) + bytes;
    size_t seen = atomic_load(highest);
    while (seen < value && !atomic_compare_exchange_weak(highest, &seen, value)) {
    }
}

void qs_mem_note(qs_mem_space space, qs_mem_class kind, ptrdiff_t bytes)
{
    space_counts *c = &counts[space];
    if (bytes >= 0) {
        count_up(&c->now[kind], &c->peak[kind], (size_t)bytes);
        count_up(&c->now_total, &c->peak_total, (size_t)bytes);
    } else {
        atomic_fetch_sub(&c->now[kind], (size_t)-bytes);
        atomic_fetch_sub(&c->now_total, (size_t)-bytes);
    }
}

qs_status qs_mem_alloc(void **out, size_t bytes, qs_mem_class kind)
{
    *out = NULL;
    if (bytes == 0) {
        return QS_OK;
    }
    size_t whole;
    void *start = NULL;
    if (qs_size_mul_add(bytes, 1, 2 * ALIGNMENT, &whole)) {
        start = calloc(1, whole);
    }
    if (start == NULL) {
        return QS_FAIL(QS_ERR_MEMORY,
                       "memory: %zu bytes for %s cannot be allocated (%zu bytes are held); use "
                       "more ranks, a smaller micro_batch or seq_len, or recompute: full",
                       bytes, qs_mem_class_name(kind), atomic_load(&counts[QS_MEM_HOST].now_total));
    }
    uintptr_t first = (uintptr_t)start + sizeof(block_header);
    uintptr_t aligned = (first + ALIGNMENT - 1) & ~(uintptr_t)(ALIGNMENT - 1);
    block_header *header = (block_header *)aligned - 1;
    *header = (block_header){.start = start, .bytes = bytes, .class = (int)kind, .magic = MAGIC};
    qs_mem_note(QS_MEM_HOST, kind, (ptrdiff_t)bytes);
    *out = header + 1;
    return QS_OK;
}

void qs_mem_free(void *ptr)
{
    if (ptr == NULL) {
        return;
    }
    block_header *header = (block_header *)ptr - 1;
    if (header->magic != MAGIC) {
        fprintf(stderr, "qs_mem_free: %p is not a block of qs_mem_alloc\n", ptr);
        abort();
    }
    header->magic = 0;
    qs_mem_note(QS_MEM_HOST, (qs_mem_class)header->class, -(ptrdiff_t)header->bytes);
    free(header->start);
}

size_t qs_mem_now_bytes(qs_mem_space space, qs_mem_class kind)
{
    return atomic_load(&counts[space].now[kind]);
}

size_t qs_mem_peak_bytes(qs_mem_space space, qs_mem_class kind)
{
    return atomic_load(&counts[space].peak[kind]);
}

size_t qs_mem_peak_total_bytes(qs_mem_space space)
{
    return atomic_load(&counts[space].peak_total);
}

const char *qs_mem_class_name(qs_mem_class kind)
{
    static const char *const names[QS_MEM_CLASS_COUNT] = {
        [QS_MEM_BASE_SHARD] = "base shard",
        [QS_MEM_BASE_GATHER] = "gathered units",
        [QS_MEM_BASE_DECODED] = "decoded layers",
        [QS_MEM_BASE_SMALL] = "replicated base",
        [QS_MEM_LORA] = "LoRA weights",
        [QS_MEM_LORA_GRAD] = "LoRA gradients",
        [QS_MEM_OPTIM] = "optimizer state",
        [QS_MEM_ACTIVATION] = "kept activations",
        [QS_MEM_WORK] = "scratch",
        [QS_MEM_DATA] = "data",
    };
    return (unsigned)kind < QS_MEM_CLASS_COUNT ? names[kind] : "unknown";
}

/* VmHWM and not only getrusage: ru_maxrss survives exec, so that it can be the launcher's. */
size_t qs_mem_peak_rss_bytes(void)
{
    FILE *file = fopen("/proc/self/status", "r");
    if (file != NULL) {
        char line[256];
        unsigned long kib = 0;
        while (kib == 0 && fgets(line, sizeof line, file) != NULL) {
            if (strncmp(line, "VmHWM:", 6) == 0) {
                kib = strtoul(line + 6, NULL, 10);
            }
        }
        fclose(file);
        if (kib > 0) {
            return (size_t)kib * 1024;
        }
    }
    struct rusage usage;
    return getrusage(RUSAGE_SELF, &usage) == 0 ? (size_t)usage.ru_maxrss * 1024 : 0;
}

bool qs_size_mul_add(size_t a, size_t b, size_t c, size_t *out)
{
    size_t product;
    return !__builtin_mul_overflow(a, b, &product) && !__builtin_add_overflow(product, c, out);
}
