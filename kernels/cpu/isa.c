/* Choice of the instruction set, and the scalar functions that need none. */
#include "kernels/cpu/isa.h"

#include <math.h>
#include <stdatomic.h>
#include <string.h>

#include "kernels/cpu/choice.h"

bool qs_isa_runs(const char *name)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                __builtin_cpu_supports("f16c");
    if (strcmp(name, "avx512") == 0) {
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl");
    }
    if (strcmp(name, "avx2") == 0) {
        return avx2;
    }
#endif
    return strcmp(name, "portable") == 0;
}

/* By name, NULL if there is none or this CPU cannot run it. */
static const void *find(const char *name)
{
    const qs_isa *all[] = {qs_isa_avx512(), qs_isa_avx2(), qs_isa_portable()};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        if (all[i] != NULL && strcmp(all[i]->name, name) == 0 && qs_isa_runs(name)) {
            return all[i];
        }
    }
    return NULL;
}

static qs_choice choice = {
    .variable = "QSHARD_CPU_ISA", .names = {"avx512", "avx2", "portable"}, .find = find};

static const qs_isa *_Atomic chosen; /* asked for in every task, so kept */

const qs_isa *qs_isa_get(void)
{
    const qs_isa *isa = chosen;
    if (isa == NULL) {
        chosen = isa = qs_choice_get(&choice); /* two threads that race choose the same */
    }
    return isa;
}

bool qs_isa_force(const char *name)
{
    if (!qs_choice_force(&choice, name)) {
        return false;
    }
    chosen = qs_choice_get(&choice);
    return true;
}

/* log(2^e m) = e log 2 + 2 atanh((m - 1) / (m + 1)) with m in [sqrt(1/2), sqrt(2)): the series in
 * s^2 <= 0.0295 to s^23 leaves 1e-18. */
double qs_log_fixed(double x)
{
    const double ln2 = 0.693147180559945309417232121458;
    int exponent;
    double mantissa = frexp(x, &exponent);
    if (mantissa < 0.70710678118654752440) {
        mantissa *= 2.0;
        exponent -= 1;
    }
    double s = (mantissa - 1.0) / (mantissa + 1.0);
    double square = s * s;
    double sum = 0.0;
    for (int i = 23; i >= 1; i -= 2) {
        sum = sum * square + 1.0 / i;
    }
    return exponent * ln2 + 2.0 * s * sum;
}

float qs_exp_fixed(float x)
{
    qs_isa_portable()->exp_sum(&x, 1, 1.0F, 0.0F);
    return x;
}
