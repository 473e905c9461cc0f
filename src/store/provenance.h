/* Where figures come from, so that others can tell whether two of them compare: the program and its
 * libraries, the command, the hosts and cores of all ranks, and what the environment sets for them.
 * `qshard bench` keeps it beside its tables. */
#ifndef QS_STORE_PROVENANCE_H
#define QS_STORE_PROVENANCE_H

#include <jansson.h>

#include "comm/comm.h"

/** As a JSON object on rank 0, which the caller owns; NULL on the others. `gpu`: what is known of
 * CUDA, NCCL and driver, one line; NULL or "": nothing. Of the environment there are the variables
 * of launcher, threads, NCCL and batch system alone, and no secrets among them. Collective. */
qs_status qs_provenance_make(json_t **out, const char *gpu, qs_comm *comm);

#endif
