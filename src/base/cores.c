/* Cores by hwloc: it knows cgroups, hybrid machines and hardware threads, none of which sysconf()
 * tells apart. Asked is the calling thread, because the threads that it starts inherit its binding.
 */
#include "base/cores.h"

#include <hwloc.h>
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

int qs_threads_for_rank(int local_nranks, int local_rank, int wanted)
{
    if (wanted > 0) {
        return wanted;
    }
    int from_environment = threads_from_environment();
    if (from_environment > 0) {
        return from_environment;
    }
    core_view view = look();
    if (view.bound || local_nranks <= 1) {
        return view.cores;
    }
    int share = view.cores / local_nranks + (local_rank < view.cores % local_nranks ? 1 : 0);
    return share >= 1 ? share : 1;
}
