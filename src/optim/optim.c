#include "optim/optim.h"

#include <math.h>
#include <stdlib.h>

#include "base/mem.h"

/* A fraction is rounded up, as transformers does; 0.07 * 100 is 7 all the same. */
double qs_warmup_steps(const qs_config *cfg, int64_t steps)
{
    double warmup = cfg->optim.warmup;
    return warmup < 1 ? ceil(warmup * (double)steps - 1e-9) : warmup;
}

double qs_lr_at(const qs_config *cfg, int64_t step, int64_t steps)
{
    const double pi = 3.14159265358979323846;
    double warm = qs_warmup_steps(cfg, steps), low = cfg->optim.min_lr_ratio;
    if ((double)step < warm) {
        return cfg->optim.lr * (double)(step + 1) / warm;
    }
    /* 0 at the first step after the warm-up, 1 at the end of the run, which no step reaches. */
    double length = (double)steps - warm;
    double done = length > 0 ? fmin(((double)step - warm) / length, 1.0) : 1.0;
    switch (cfg->optim.schedule) {
    case QS_SCHEDULE_LINEAR:
        return cfg->optim.lr * (low + (1 - low) * (1 - done));
    case QS_SCHEDULE_COSINE:
        return cfg->optim.lr * (low + (1 - low) * 0.5 * (1 + cos(pi * done)));
    default:
        return cfg->optim.lr;
    }
}

double qs_clip_scale(double clip, double norm)
{
    return clip > 0 ? fmin(1.0, clip / (norm + 1e-6)) : 1.0;
}

qs_status qs_optim_create(qs_optim **out, qs_device *device, const qs_lora_layout *layout, int rank,
                          int nranks)
{
    const qs_range mine = qs_lora_shard(layout, rank, nranks);
    const int64_t width = qs_lora_shard_width(layout, nranks);
    const int64_t count = layout->n_layers * width;
    *out = NULL;
    qs_optim *optim = calloc(1, sizeof *optim);
    if (!optim) {
        return QS_FAIL(QS_ERR_MEMORY, "no memory for the optimizer");
    }
    qs_status st = QS_OK;
    optim->device = device;
    optim->count = count;
    optim->width = width;
    optim->n_stretches = qs_lora_stretches(layout, mine, optim->stretches);
    for (int i = 0; i < optim->n_stretches; i++) { /* from the segment's to the share's */
        optim->stretches[i].elements.begin -= mine.begin;
        optim->stretches[i].elements.end -= mine.begin;
    }
    for (int i = 0; i < 3; i++) {
        QS_GOTO(qs_mirror_create(device, &optim->mirror[i], (size_t)count * sizeof(float),
                                 QS_MEM_OPTIM));
    }
    optim->master = optim->mirror[0].host;
    optim->m = optim->mirror[1].host;
    optim->v = optim->mirror[2].host;
    optim->d_master = optim->mirror[0].device;
    optim->d_m = optim->mirror[1].device;
    optim->d_v = optim->mirror[2].device;
    *out = optim;
    optim = NULL;
done:
    qs_optim_destroy(optim);
    return st;
}

void qs_optim_destroy(qs_optim *optim)
{
    if (optim) {
        for (int i = 0; i < 3; i++) {
            qs_mirror_destroy(optim->device, &optim->mirror[i]);
        }
        free(optim);
    }
}

qs_status qs_optim_push(qs_optim *optim, qs_queue *queue)
{
    for (int i = 0; i < 3; i++) {
        QS_TRY(qs_mirror_push(queue, &optim->mirror[i], 0, optim->mirror[i].bytes));
    }
    return qs_queue_wait(queue);
}

qs_status qs_optim_pull(qs_optim *optim, qs_queue *queue)
{
    for (int i = 0; i < 3; i++) {
        QS_TRY(qs_mirror_pull(queue, &optim->mirror[i], 0, optim->mirror[i].bytes));
    }
    return qs_queue_wait(queue);
}

static qs_status update(qs_optim *optim, const qs_ops *ops, qs_queue *queue,
                        const qs_update_args *args, const float *grad, qs_range elements)
{
    const int64_t at = elements.begin;
    return ops->update(queue, args, elements.end - at, grad + at, optim->d_master + at,
                       optim->d_m + at, optim->d_v + at);
}

/* Layer by layer, each A and each B by itself, for they learn at different rates. Magnitudes learn
 * as B does: peft's LoRA+ counts every vector with it. */
static qs_status update_stretches(qs_optim *optim, const qs_ops *ops, qs_queue *queue,
                                  qs_update_args args, double ratio, const float *grad)
{
    const double lr = args.lr;
    for (int64_t layer = 0; layer < optim->count; layer += optim->width) {
        for (int i = 0; i < optim->n_stretches; i++) {
            const qs_lora_stretch *stretch = &optim->stretches[i];
            args.lr = stretch->which != 'A' ? lr * ratio : lr;
            QS_TRY(
                update(optim, ops, queue, &args, grad,
                       (qs_range){layer + stretch->elements.begin, layer + stretch->elements.end}));
        }
    }
    return QS_OK;
}

static const qs_optim_kind kinds[] = {[QS_OPTIMIZER_ADAMW] = QS_OPTIM_ADAMW,
                                      [QS_OPTIMIZER_ADAM] = QS_OPTIM_ADAM,
                                      [QS_OPTIMIZER_SGD] = QS_OPTIM_SGD,
                                      [QS_OPTIMIZER_ADADELTA] = QS_OPTIM_ADADELTA};

qs_status qs_optim_step(qs_optim *optim, const qs_ops *ops, qs_queue *queue, const qs_config *cfg,
                        double lr, double grad_scale, const float *grad)
{
    double t = (double)(optim->step + 1);
    qs_update_args args = {
        .kind = kinds[cfg->optim.name],
        .lr = lr,
        .beta1 = cfg->optim.beta1,
        .beta2 = cfg->optim.beta2,
        .eps = cfg->optim.eps,
        .weight_decay = cfg->optim.weight_decay,
        .grad_scale = grad_scale,
        .bias_correction1 = 1 - pow(cfg->optim.beta1, t),
        .bias_correction2 = 1 - pow(cfg->optim.beta2, t),
    };
    const double ratio = cfg->optim.lora_plus_ratio;
    QS_TRY(ratio == 1.0 ? update(optim, ops, queue, &args, grad, (qs_range){0, optim->count})
                        : update_stretches(optim, ops, queue, args, ratio, grad));
    optim->step++;
    return QS_OK;
}
