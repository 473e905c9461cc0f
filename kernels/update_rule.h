/* One element's update, the same operations in the same order on the CPU and on a GPU. Scalars are
 * formed in fp64 and rounded once: in fp32, 1 - 0.999 would already be off by 1e-5.
 *
 * As torch.optim has them; g is the clipped gradient, w the parameter:
 *
 *     adamw     w = w (1 - lr wd); m, v moments of g; w -= lr / c1 * m / (sqrt(v) / sqrt(c2) + eps)
 *               Loshchilov & Hutter 2019, arXiv:1711.05101
 *     adam      g += wd w, then the same without the decay of w; Kingma & Ba 2015, arXiv:1412.6980
 *     sgd       g += wd w; w -= lr g; m and v are not used
 *     adadelta  g += wd w; v = rho v + (1 - rho) g^2; d = sqrt(m + eps) / sqrt(v + eps) * g;
 *               m = rho m + (1 - rho) d^2; w -= lr d; rho is beta1; Zeiler 2012, arXiv:1212.5701 */
#ifndef QS_KERNELS_UPDATE_RULE_H
#define QS_KERNELS_UPDATE_RULE_H

#include <math.h>

#include "kernels/cuda/core/hd.h"

/** What the elements of a step have in common. */
typedef struct {
    float clip, decay, couple; /* couple: weight decay that is added to the gradient */
    float step, root2, beta2, eps, rest1, rest2;
    float lr, rho, rest_rho;
} qs_update_rule;

static inline qs_update_rule qs_update_rule_make(double lr, double beta1, double beta2, double eps,
                                                 double weight_decay, double grad_scale,
                                                 double bias_correction1, double bias_correction2)
{
    qs_update_rule r;
    r.clip = (float)grad_scale;
    r.decay = (float)(1.0 - lr * weight_decay);
    r.couple = (float)weight_decay;
    r.step = (float)(lr / bias_correction1);
    r.root2 = (float)sqrt(bias_correction2);
    r.beta2 = (float)beta2;
    r.eps = (float)eps;
    r.rest1 = (float)(1.0 - beta1);
    r.rest2 = (float)(1.0 - beta2);
    r.lr = (float)lr;
    r.rho = (float)beta1;
    r.rest_rho = (float)(1.0 - beta1);
    return r;
}

/* The step of Adam from the gradient `g`, before w is decayed or not. */
QS_HD float qs_update_adam_step(const qs_update_rule *r, float g, float *m, float *v)
{
    *m = *m + r->rest1 * (g - *m);
    *v = *v * r->beta2 + r->rest2 * g * g;
    return r->step * *m / (sqrtf(*v) / r->root2 + r->eps);
}

QS_HD void qs_update_adamw(const qs_update_rule *r, float grad, float *w, float *m, float *v)
{
    const float step = qs_update_adam_step(r, grad * r->clip, m, v);
    *w = *w * r->decay - step;
}

QS_HD void qs_update_adam(const qs_update_rule *r, float grad, float *w, float *m, float *v)
{
    const float step = qs_update_adam_step(r, grad * r->clip + r->couple * *w, m, v);
    *w = *w - step;
}

QS_HD void qs_update_sgd(const qs_update_rule *r, float grad, float *w, float *m, float *v)
{
    (void)m;
    (void)v;
    *w = *w - r->lr * (grad * r->clip + r->couple * *w);
}

QS_HD void qs_update_adadelta(const qs_update_rule *r, float grad, float *w, float *m, float *v)
{
    const float g = grad * r->clip + r->couple * *w;
    *v = *v * r->rho + r->rest_rho * g * g;
    const float delta = sqrtf(*m + r->eps) / sqrtf(*v + r->eps) * g;
    *m = *m * r->rho + r->rest_rho * delta * delta;
    *w = *w - r->lr * delta;
}

#endif
