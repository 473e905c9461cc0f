/* The parts of cores.c that look at a topology, for tests with machines that are not there. */
#ifndef QS_BASE_CORES_IMPL_H
#define QS_BASE_CORES_IMPL_H

#include <hwloc.h>

#include "base/cores.h"

/** The first hardware thread in `set` of each core that has one, at most `most`. \return how many.
 */
int qs_cores_list(hwloc_topology_t topology, hwloc_const_cpuset_t set, int *cpus, int most);

/** Cores with a hardware thread in `set` that one of the bindings on `host` reaches. */
int qs_cores_reached(hwloc_topology_t topology, hwloc_const_cpuset_t set,
                     const qs_cores_binding *bindings, int count, uint64_t host);

/** The memory nodes next to `set`. \return how many. */
int qs_cores_nodes(hwloc_topology_t topology, hwloc_const_cpuset_t set, hwloc_nodeset_t nodes);

#endif
