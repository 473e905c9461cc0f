/* How a CPU multiplies frozen matrices: what cpu.gemm names, and what its `auto` stands for. */
#ifndef QS_TRAIN_PRODUCTS_H
#define QS_TRAIN_PRODUCTS_H

#include "comm/comm.h"
#include "config/config.h"
#include "kernels/ops.h"

/** As in the configuration: "strict", "bf16", "fp16", "amx". */
const char *qs_products_name(qs_gemm_kind kind);

/** What `auto` is on this CPU alone, by its features, never by a timing, since the bits differ. */
qs_gemm_kind qs_products_here(void);

/** The table of `kind`, of `auto` that which this CPU alone would take: for what is planned. */
const qs_ops *qs_products_ops(qs_gemm_kind kind);

/** The table of `*kind`, whose `auto` becomes what is fast on every rank's CPU; a
 * warning says where the kind is slower than strict. Collective. */
qs_status qs_products_choose(qs_comm *comm, qs_gemm_kind *kind, const qs_ops **ops);

#endif
