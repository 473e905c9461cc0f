/* The parts of cores.c that look at a topology, for tests with machines that are not there. */
#ifndef QS_BASE_CORES_IMPL_H
#define QS_BASE_CORES_IMPL_H

#include <hwloc.h>

#include "base/cores.h"

/** The first hardware thread in `set` of each core that has one, at most `most`. \return how many.
 */
int qs_cores_list(hwloc_topology_t topology, hwloc_const_cpuset_t set, int *cpus, int most);

/** The memory nodes next to `set`. \return how many. */
int qs_cores_nodes(hwloc_topology_t topology, hwloc_const_cpuset_t set, hwloc_nodeset_t nodes);

#endif
