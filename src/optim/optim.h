/* The optimizer, sharded: this rank's share of the LoRA vector with its fp32 master and moments,
 * one of four rules to update it by (kernels/update_rule.h), the schedule, and the clip factor. */
#ifndef QS_OPTIM_OPTIM_H
#define QS_OPTIM_OPTIM_H

#include <stdint.h>

#include "config/config.h"
#include "kernels/ops.h"
#include "lora/lora.h"

/** optim.warmup in steps, of a run of `steps`. */
double qs_warmup_steps(const qs_config *cfg, int64_t steps);

/** Learning rate of step `step` (0-based) of `steps`: warm-up (step + 1) / warmup_steps, then the
 * schedule down to min_lr_ratio * lr (cosine: Loshchilov & Hutter 2017, arXiv:1608.03983). warmup
 * < 1 is a fraction of steps. */
double qs_lr_at(const qs_config *cfg, int64_t step, int64_t steps);

/** min(1, clip / (norm + 1e-6)); 1 without clipping. */
double qs_clip_scale(double clip, double norm);

typedef struct {
    qs_device *device;
    int64_t count;               /* elements of this rank's share, padding included */
    float *master, *m, *v;       /* [count] on the host: what checkpoints save and load */
    float *d_master, *d_m, *d_v; /* [count] on the device: what steps update; on the CPU the same */
    qs_mirror mirror[3];         /* the two sides of master, m and v */
    int64_t step;                /* updates done */
    /* where a layer's tensors lie in this rank's share, [n_stretches]; a layer takes `width` */
    qs_lora_stretch stretches[QS_LORA_STRETCHES_MAX];
    int n_stretches;
    int64_t width;
} qs_optim;

/** State for rank `rank` of `nranks`. */
qs_status qs_optim_create(qs_optim **out, qs_device *device, const qs_lora_layout *layout, int rank,
                          int nranks);
void qs_optim_destroy(qs_optim *optim);

/** Bring the host's side to the device after it was written / the device's to the host before it is
 * read. Both wait. */
qs_status qs_optim_push(qs_optim *optim, qs_queue *queue);
qs_status qs_optim_pull(qs_optim *optim, qs_queue *queue);

/** One update with the reduced gradient `grad` [count], on the device. Every B, and DoRA's
 * magnitudes, learn at optim.lora_plus_ratio times `lr` (LoRA+: Hayou et al. 2024,
 * arXiv:2402.12354). */
qs_status qs_optim_step(qs_optim *optim, const qs_ops *ops, qs_queue *queue, const qs_config *cfg,
                        double lr, double grad_scale, const float *grad);

#endif
