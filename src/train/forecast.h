/* How long a step will take, by a formula: what the rank with the most work computes, moves in its
 * device's memory and receives from others, over what the device and the links give.
 * docs/planning.md says what the figures were fitted to. Arithmetic only. */
#ifndef QS_TRAIN_FORECAST_H
#define QS_TRAIN_FORECAST_H

#include "data/data.h"
#include "device/gpu_kinds.h"
#include "train/setting.h"

/** A stretch of a step in which gathers run beside compute. */
typedef struct {
    double product_flops;   /* of linears, adapters, head */
    double attention_flops; /* of scores and their products with V */
    double memory_bytes;    /* NF4 to bf16 once a gather, norms, gates, RoPE, what adapters read */
    double gather_bytes;    /* that a rank receives */
} qs_step_phase;

/** A full step of a run on the rank with the most slots. */
typedef struct {
    qs_step_phase forward, head, backward;
    int nranks, group;   /* of the run, and of those that share a copy of the base */
    double reduce_bytes; /* LoRA gradients received, new LoRA weights received */
    double all_tokens;   /* of the step, on all ranks */
} qs_step_work;

/** Lengths are the means of the data, and
 * every sequence counts as one with loss. Fails for lack of memory only. */
qs_status qs_step_work_make(qs_step_work *out, const qs_setting *on, const qs_data *train,
                            const qs_model_shape *shape, int64_t slots);

double qs_step_flops(const qs_step_work *work);
double qs_step_gather_bytes(const qs_step_work *work);

/** Bytes a second, in units of 1e9, that a GPU gets from its node, and a node from the others. */
typedef struct {
    int per_node; /* ranks */
    double in_node_gbps, between_gbps;
} qs_links;

/** What is usual for cards of `kind`: their own link inside a node, one adapter of 200 Gbit/s a
 * node between them. */
qs_links qs_links_usual(const qs_gpu_kind *kind, int per_node);

/** Time in which a rank receives `bytes` from `nranks` - 1 others over such links. */
double qs_links_receive_s(double bytes, int nranks, const qs_links *links);

typedef struct {
    double product_s, attention_s, memory_s;
    double compute_s;       /* their sum */
    double gather_s;        /* of all units, as if nothing ran beside */
    double gather_waited_s; /* the part that does not fit behind compute */
    double reduce_s;
    double step_s; /* compute + waited + reduce */
} qs_forecast;

qs_forecast qs_forecast_make(const qs_step_work *work, const qs_gpu_kind *kind,
                             const qs_links *links);

#endif
