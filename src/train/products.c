#include "train/products.h"

#include "base/log.h"

/* Every CPU gives the same bits, but one without the instructions takes its time. */
typedef struct {
    const char *name;
    const qs_ops *(*ops)(void);
    const char *needs;       /* instructions */
    bool (*is_faster)(void); /* than strict */
} products;

static bool always(void)
{
    return true;
}

static const products kinds[] = {
    [QS_GEMM_STRICT] = {"strict", qs_ops_cpu, NULL, always},
    [QS_GEMM_BF16] = {"bf16", qs_ops_cpu_bf16, "AVX512-BF16 as AMD's CPUs have it",
                      qs_ops_cpu_bf16_is_faster},
    [QS_GEMM_FP16] = {"fp16", qs_ops_cpu_fp16, "AVX512-FP16", qs_ops_cpu_fp16_is_faster},
    [QS_GEMM_AMX] = {"amx", qs_ops_cpu_amx, "AMX-BF16", qs_ops_cpu_amx_is_faster},
};

enum { N_KINDS = sizeof kinds / sizeof *kinds };

const char *qs_products_name(qs_gemm_kind kind)
{
    return kinds[kind].name;
}

/* slow[kind]: it is, on this CPU. */
static void look_at_cpu(int64_t slow[N_KINDS])
{
    for (int kind = QS_GEMM_AUTO + 1; kind < N_KINDS; kind++) {
        slow[kind] = !kinds[kind].is_faster();
    }
}

static qs_gemm_kind fastest(const int64_t slow[N_KINDS])
{
    static const qs_gemm_kind order[] = {QS_GEMM_AMX, QS_GEMM_BF16, QS_GEMM_FP16};
    for (size_t i = 0; i < sizeof order / sizeof *order; i++) {
        if (!slow[order[i]]) {
            return order[i];
        }
    }
    return QS_GEMM_STRICT;
}

qs_gemm_kind qs_products_here(void)
{
    int64_t slow[N_KINDS];
    look_at_cpu(slow);
    return fastest(slow);
}

const qs_ops *qs_products_ops(qs_gemm_kind kind)
{
    return kinds[kind == QS_GEMM_AUTO ? qs_products_here() : kind].ops();
}

qs_status qs_products_choose(qs_comm *comm, qs_gemm_kind *kind, const qs_ops **ops)
{
    int64_t slow[N_KINDS] = {0};
    look_at_cpu(slow);
    QS_TRY(qs_comm_max_i64(comm, slow, N_KINDS));
    if (*kind == QS_GEMM_AUTO) {
        *kind = fastest(slow);
    }
    const products *chosen = &kinds[*kind];
    *ops = chosen->ops();
    if (slow[*kind]) {
        qs_log_warn("cpu.gemm: %s is slower than strict without %s, which %s lacks", chosen->name,
                    chosen->needs, qs_comm_nranks(comm) > 1 ? "a rank's CPU" : "this CPU");
    }
    return QS_OK;
}
