#include "model/flops.h"

typedef struct {
    double weights; /* of W */
    double adapter; /* of A and B; 0: none */
    double frozen;  /* products with W beside one of either direction */
    double gains;   /* and for the gradient of the magnitudes */
} linear_work;

static linear_work work_of(const qs_flops *f, qs_linear linear)
{
    int64_t out = 0, in = 0;
    qs_linear_shape(f->config, linear, &out, &in);
    linear_work w = {.weights = (double)out * (double)in};
    if (f->lora != NULL && f->lora->targeted[linear]) {
        w.adapter = (double)(out + in) * f->lora->lora_rank;
        w.frozen = f->lora->dora && f->dropout ? 1 : 0;
        w.gains = f->lora->dora ? 1 : 0;
    }
    return w;
}

double qs_flops_forward(const qs_flops *f, qs_linear linear, double tokens)
{
    const linear_work w = work_of(f, linear);
    return 2 * tokens * ((1 + w.frozen) * w.weights + w.adapter);
}

double qs_flops_backward(const qs_flops *f, qs_linear linear, double tokens, bool dx)
{
    const linear_work w = work_of(f, linear);
    const double gradients = w.gains * w.weights + w.adapter;
    return 2 * tokens * (gradients + (dx ? (1 + w.frozen) * w.weights + w.adapter : 0));
}

double qs_flops_pairs(double tokens, double window)
{
    const double w = window > 0 && window < tokens ? window : tokens;
    return w * (w + 1) / 2 + (tokens - w) * w; /* the first w queries see all before them */
}

double qs_flops_attention(const qs_hf_config *config, double pairs, bool backward)
{
    return (backward ? 8 : 4) * pairs * (double)config->n_heads * config->head_dim;
}

double qs_flops_head(const qs_hf_config *config, double rows, double vocab, bool gradient)
{
    return (gradient ? 4 : 2) * rows * (double)config->hidden * vocab;
}
