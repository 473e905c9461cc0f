/* Cores by hwloc: it knows cgroups, hybrid machines and hardware threads, none of which sysconf()
 * tells apart. The binding of the calling thread counts: those that it starts inherit it. */
#include "base/cores_impl.h"

#include <pthread.h>
#include <stdlib.h>
#include <unistd.h>

#include "base/places.h"
#include "base/proc.h"

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

/* The machine, looked at once: it takes milliseconds, more where many ranks start. Stays until the
 * process ends. NULL if hwloc cannot say. */
static hwloc_topology_t machine;

static void load_machine(void)
{
    hwloc_topology_t topology;
    if (hwloc_topology_init(&topology) != 0) {
        return;
    }
    if (hwloc_topology_load(topology) == 0) {
        machine = topology;
    } else {
        hwloc_topology_destroy(topology);
    }
}

static hwloc_topology_t machine_topology(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, load_machine);
    return machine;
}

/* Of the calling thread, as it is now: what it may run on within what the job may use. `topology`
 * is NULL if that cannot be said. */
typedef struct {
    hwloc_topology_t topology;
    hwloc_cpuset_t mine;
} own_cores;

static own_cores binding_open(void)
{
    own_cores b = {machine_topology(), hwloc_bitmap_alloc()};
    if (b.mine == NULL || b.topology == NULL) {
        b.topology = NULL;
        return b;
    }
    hwloc_const_cpuset_t allowed = hwloc_topology_get_allowed_cpuset(b.topology);
    if (hwloc_get_cpubind(b.topology, b.mine, HWLOC_CPUBIND_THREAD) != 0) {
        hwloc_bitmap_copy(b.mine, allowed);
    }
    hwloc_bitmap_and(b.mine, b.mine, allowed);
    return b;
}

static core_view view_of(const own_cores *b)
{
    core_view view = fallback_view();
    if (b->topology != NULL && !hwloc_bitmap_iszero(b->mine)) {
        hwloc_const_cpuset_t allowed = hwloc_topology_get_allowed_cpuset(b->topology);
        view.cores = cores_touched_by(b->topology, b->mine);
        view.bound = view.cores < cores_touched_by(b->topology, allowed);
    }
    return view.cores >= 1 ? view : fallback_view();
}

static core_view look(void)
{
    own_cores b = binding_open();
    core_view view = view_of(&b);
    hwloc_bitmap_free(b.mine);
    return view;
}

int qs_cores_list(hwloc_topology_t topology, hwloc_const_cpuset_t set, int *cpus, int most)
{
    int count = 0;
    hwloc_obj_t core = NULL;
    hwloc_cpuset_t here = hwloc_bitmap_alloc();
    while (here != NULL && count < most &&
           (core = hwloc_get_next_obj_by_type(topology, HWLOC_OBJ_CORE, core)) != NULL) {
        hwloc_bitmap_and(here, core->cpuset, set);
        if (!hwloc_bitmap_iszero(here)) {
            cpus[count++] = hwloc_bitmap_first(here);
        }
    }
    hwloc_bitmap_free(here);
    return count;
}

int qs_cores_nodes(hwloc_topology_t topology, hwloc_const_cpuset_t set, hwloc_nodeset_t nodes)
{
    hwloc_cpuset_to_nodeset(topology, set, nodes);
    return hwloc_bitmap_weight(nodes);
}

void qs_cores_place(int threads)
{
    own_cores b = binding_open();
    hwloc_nodeset_t nodes = hwloc_bitmap_alloc();
    int *cpus = calloc((size_t)threads, sizeof *cpus);
    if (b.topology != NULL && nodes != NULL && cpus != NULL) {
        if (qs_cores_nodes(b.topology, b.mine, nodes) > 1) {
            (void)hwloc_set_membind(b.topology, nodes, HWLOC_MEMBIND_INTERLEAVE,
                                    HWLOC_MEMBIND_THREAD | HWLOC_MEMBIND_BYNODESET);
        }
        if (view_of(&b).bound && qs_cores_list(b.topology, b.mine, cpus, threads) == threads) {
            qs_places_set(cpus, threads);
        }
    }
    free(cpus);
    hwloc_bitmap_free(nodes);
    hwloc_bitmap_free(b.mine);
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

int qs_threads_asked_for(int wanted)
{
    return wanted > 0 ? wanted : threads_from_environment();
}

int qs_threads_for_share(int sharers, int index, int wanted)
{
    int asked_for = qs_threads_asked_for(wanted);
    return asked_for > 0 ? asked_for : share_of(look().cores, sharers, index);
}

int qs_threads_for_rank(int local_nranks, int local_rank, int wanted)
{
    if (local_nranks <= 1 || qs_cores_bound()) {
        return qs_threads_for_share(1, 0, wanted);
    }
    return qs_threads_for_share(local_nranks, local_rank, wanted);
}

void qs_cores_get_binding(qs_cores_binding *out)
{
    *out = (qs_cores_binding){.host = qs_proc_host_number()};
    hwloc_topology_t topology = machine_topology();
    hwloc_cpuset_t mine = hwloc_bitmap_alloc();
    if (mine != NULL && topology != NULL &&
        hwloc_get_cpubind(topology, mine, HWLOC_CPUBIND_THREAD) == 0 &&
        hwloc_bitmap_last(mine) >= 0) { /* -1: not bounded */
        for (int cpu = hwloc_bitmap_first(mine); cpu >= 0; cpu = hwloc_bitmap_next(mine, cpu)) {
            out->mask[(unsigned)cpu / 64 % QS_CORES_MASK_WORDS] |= UINT64_C(1) << (cpu % 64);
        }
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

int qs_cores_reached(hwloc_topology_t topology, hwloc_const_cpuset_t set,
                     const qs_cores_binding *bindings, int count, uint64_t host)
{
    int reached = 0;
    hwloc_cpuset_t any = hwloc_bitmap_alloc();
    for (int i = 0; any != NULL && i < count; i++) {
        for (unsigned cpu = 0; bindings[i].host == host && cpu < 64 * QS_CORES_MASK_WORDS; cpu++) {
            if (bindings[i].mask[cpu / 64] >> cpu % 64 & 1 || is_empty(&bindings[i])) {
                hwloc_bitmap_set(any, cpu);
            }
        }
    }
    if (any != NULL) {
        hwloc_bitmap_and(any, any, set);
        reached = hwloc_bitmap_iszero(any) ? 0 : cores_touched_by(topology, any);
    }
    hwloc_bitmap_free(any);
    return reached;
}

qs_cores_use qs_cores_count_use(const qs_cores_binding *bindings, int count)
{
    hwloc_topology_t topology = machine_topology();
    if (topology == NULL) {
        const int cores = fallback_view().cores;
        return (qs_cores_use){cores, cores};
    }
    hwloc_const_cpuset_t allowed = hwloc_topology_get_allowed_cpuset(topology);
    qs_cores_use use = {.all = cores_touched_by(topology, allowed)};
    use.used = qs_cores_reached(topology, allowed, bindings, count, qs_proc_host_number());
    const char *slurm = getenv("SLURM_CPUS_ON_NODE");
    const int given = slurm != NULL ? atoi(slurm) : 0;
    use.all = given > 0 && given < use.all ? given : use.all;
    return use;
}
