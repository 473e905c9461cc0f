/* Cores by hwloc: it knows cgroups, hybrid machines and hardware threads, none of which sysconf()
 * tells apart. Asked is the calling thread, because the threads that it starts inherit its binding.
 */
#include "base/cores.h"

#include <hwloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

typedef struct {
    int cores; /* that this process may use */
    int bound; /* whether that is less than the job's */
} core_view;

static int cores_touched_by(hwloc_topology_t topology, hwloc_const_cpuset_t set)
{
    int count = 0;
    hwloc_obj_t core = NULL;
    while ((core = hwloc_get_next_obj_by_type(topology, HWLOC_OBJ_CORE, core)) != NULL) {
        count += hwloc_bitmap_intersects(core->cpuset, set) ? 1 : 0;
    }
    return count > 0 ? count : hwloc_bitmap_weight(set); /* no core objects: hardware threads */
}

static core_view fallback_view(void)
{
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    return (core_view){.cores = online > 0 ? (int)online : 1, .bound = 0};
}

static core_view look(void)
{
    hwloc_topology_t topology;
    if (hwloc_topology_init(&topology) != 0) {
        return fallback_view();
    }
    core_view view = fallback_view();
    hwloc_cpuset_t mine = hwloc_bitmap_alloc();
    if (mine != NULL && hwloc_topology_load(topology) == 0) {
        hwloc_const_cpuset_t allowed = hwloc_topology_get_allowed_cpuset(topology);
        if (hwloc_get_cpubind(topology, mine, HWLOC_CPUBIND_THREAD) != 0) {
            hwloc_bitmap_copy(mine, allowed);
        }
        hwloc_bitmap_and(mine, mine, allowed);
        if (!hwloc_bitmap_iszero(mine)) {
            view.cores = cores_touched_by(topology, mine);
            view.bound = view.cores < cores_touched_by(topology, allowed);
        }
    }
    hwloc_bitmap_free(mine);
    hwloc_topology_destroy(topology);
    return view.cores >= 1 ? view : fallback_view();
}

int qs_cores_available(void)
{
    return look().cores;
}

int qs_cores_bound(void)
{
    return look().bound;
}

/* "4" and "4,2" (nested levels) both mean 4 here; anything else is ignored, as OpenMP itself
 * complains about it. */
static int threads_from_environment(void)
{
    const char *text = getenv("OMP_NUM_THREADS");
    if (text == NULL) {
        return 0;
    }
    char *end = NULL;
    long value = strtol(text, &end, 10);
    int usable = end != text && (*end == '\0' || *end == ',') && value >= 1 && value <= 65536;
    return usable ? (int)value : 0;
}

static int share_of(int cores, int sharers, int index)
{
    int share = cores / sharers + (index < cores % sharers ? 1 : 0);
    return share >= 1 ? share : 1;
}

int qs_threads_for_share(int sharers, int index, int wanted)
{
    int asked_for = wanted > 0 ? wanted : threads_from_environment();
    return asked_for > 0 ? asked_for : share_of(look().cores, sharers, index);
}

int qs_threads_for_rank(int local_nranks, int local_rank, int wanted)
{
    if (local_nranks <= 1 || qs_cores_bound()) {
        return qs_threads_for_share(1, 0, wanted);
    }
    return qs_threads_for_share(local_nranks, local_rank, wanted);
}

/* FNV-1a of the kernel's boot id. Where /proc is not there every process counts as on one host:
 * shares are small then, never too large. */
static uint64_t kernel_id(void)
{
    uint64_t hash = UINT64_C(0xcbf29ce484222325);
    FILE *file = fopen("/proc/sys/kernel/random/boot_id", "r");
    if (file != NULL) {
        for (int c = fgetc(file); c != EOF; c = fgetc(file)) {
            hash = (hash ^ (uint64_t)c) * UINT64_C(0x100000001b3);
        }
        fclose(file);
    }
    return hash;
}

void qs_cores_get_binding(qs_cores_binding *out)
{
    *out = (qs_cores_binding){.host = kernel_id()};
    hwloc_topology_t topology;
    hwloc_cpuset_t mine = hwloc_bitmap_alloc();
    if (mine != NULL && hwloc_topology_init(&topology) == 0) {
        if (hwloc_topology_load(topology) == 0 &&
            hwloc_get_cpubind(topology, mine, HWLOC_CPUBIND_THREAD) == 0 &&
            hwloc_bitmap_last(mine) >= 0) { /* -1: not bounded */
            int cpu;
            hwloc_bitmap_foreach_begin(cpu, mine)
                out->mask[(unsigned)cpu / 64 % QS_CORES_MASK_WORDS] |= UINT64_C(1) << (cpu % 64);
            hwloc_bitmap_foreach_end();
        }
        hwloc_topology_destroy(topology);
    }
    hwloc_bitmap_free(mine);
}

static int is_empty(const qs_cores_binding *binding)
{
    uint64_t any = 0;
    for (int i = 0; i < QS_CORES_MASK_WORDS; i++) {
        any |= binding->mask[i];
    }
    return any == 0;
}

int qs_cores_overlap(const qs_cores_binding *a, const qs_cores_binding *b)
{
    if (a->host != b->host) {
        return 0;
    }
    uint64_t common = 0;
    for (int i = 0; i < QS_CORES_MASK_WORDS; i++) {
        common |= a->mask[i] & b->mask[i];
    }
    return common != 0 || is_empty(a) || is_empty(b); /* empty: not known, so anywhere */
}
