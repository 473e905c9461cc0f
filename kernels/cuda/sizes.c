/* What the CUDA operations answer without a device: which models they take, how wide a border is,
 * and how much an opened queue holds. Part of the plugin, and of the program as well, which
 * plans runs for GPUs that the machine at hand does not have: one formula for both. */
#include "kernels/cuda/ops_cuda.h"

#include <stdio.h>

#include "kernels/cuda/core/attention_tiles.h"
#include "kernels/cuda/core/bf16.h"
#include "kernels/cuda/core/border.h"
#include "kernels/cuda/core/dora.h"
#include "kernels/cuda/core/norm.h"
#include "kernels/cuda/core/rows.h"

enum { ALIGNMENT = 256 };

/* The attention moves pieces of 16 bytes and has a width for every head; the norm keeps a row in
 * the registers of one block of threads. */
bool qs_cuda_takes(const qs_ops_limits *l, char *why, size_t capacity)
{
    if (l->head_dim < 8 || l->head_dim % 8 != 0 || qs_attention_padded_dim(l->head_dim) == 0) {
        snprintf(why, capacity, "head_dim=%d: the CUDA operations take multiples of 8 up to 256",
                 l->head_dim);
        return false;
    }
    if (l->hidden > QS_NORM_COLS_MAX) {
        snprintf(why, capacity, "hidden_size=%lld: the CUDA operations take up to %d",
                 (long long)l->hidden, QS_NORM_COLS_MAX);
        return false;
    }
    if (l->q_norm > QS_NORM_COLS_MAX) {
        snprintf(why, capacity,
                 "num_attention_heads * head_dim=%lld, which are normed together: the CUDA "
                 "operations take up to %d",
                 (long long)l->q_norm, QS_NORM_COLS_MAX);
        return false;
    }
    return true;
}

int64_t qs_cuda_border(int lora_rank)
{
    return qs_border_width(lora_rank);
}

/* ---- scratch, group by group ---- */

static size_t aligned(size_t bytes)
{
    return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
}

int qs_cuda_joined(const qs_ops_limits *limits, int i)
{
    int count = 1;
    while (count < QS_OPS_JOINED_MAX && i + count < limits->n_linears &&
           limits->joined[i + count]) {
        count++;
    }
    return count;
}

size_t qs_cuda_decoded_bytes(const qs_ops_limits *limits)
{
    const int64_t border = qs_border_width(limits->lora_rank);
    size_t total = 0;
    for (int i = 0, count; i < limits->n_linears; i += count) {
        int64_t out = 0;
        count = qs_cuda_joined(limits, i);
        for (int j = i; j < i + count; j++) {
            out += limits->out[j];
        }
        total += qs_border_bytes(qs_border_elems(out, limits->in[i], count * border));
    }
    return aligned(total);
}

size_t qs_cuda_kept_bytes(const qs_ops_limits *limits)
{
    return (size_t)limits->kept_units * qs_cuda_decoded_bytes(limits);
}

static size_t single_bytes(const qs_ops_limits *limits)
{
    size_t most = qs_border_bytes(qs_border_elems(limits->head_rows, limits->hidden, 0));
    for (int i = 0; i < limits->n_linears; i++) {
        const size_t bytes = qs_border_bytes(qs_border_elems(limits->out[i], limits->in[i], 0));
        most = bytes > most ? bytes : most;
    }
    return most;
}

static size_t lora_scratch(const qs_ops_limits *limits)
{
    const int64_t least = sizeof(float) / sizeof(qs_bf16); /* room for one row of an fp32 product */
    if (!limits->dropout) {
        return 0;
    }
    const int64_t rows = qs_hd_max(limits->tokens, least);
    return (size_t)(rows * qs_rows_stride(limits->widest)) * sizeof(qs_bf16);
}

static size_t lora_sum_scratch(const qs_ops_limits *limits)
{
    const int64_t border = qs_border_width(limits->lora_rank);
    int64_t most = 0; /* the products sum over all tokens by themselves */
    for (int i = 0, count; i < limits->n_linears; i += count) {
        count = qs_cuda_joined(limits, i);
        most = qs_hd_max(most, count > 1 ? count * border * limits->in[i] : 0);
    }
    return (size_t)most * sizeof(float);
}

qs_dora_scratch qs_cuda_dora_pieces(const qs_ops_limits *limits)
{
    return qs_dora_scratch_of(limits->tokens, limits->widest, qs_border_width(limits->lora_rank));
}

static size_t dora_scratch(const qs_ops_limits *limits)
{
    return limits->dora ? qs_cuda_dora_pieces(limits).total : 0;
}

/* ---- the whole ---- */

static size_t product(int64_t a, int64_t b, size_t element)
{
    return (size_t)(a > 0 ? a : 0) * (size_t)(b > 0 ? b : 0) * element;
}

qs_cuda_pieces qs_cuda_pieces_of(const qs_ops_limits *l, size_t gemm_workspace_bytes)
{
    qs_cuda_pieces p = {
        .bytes = {
            [QS_PIECE_DECODED] = qs_cuda_decoded_bytes(l),
            [QS_PIECE_SINGLE] = single_bytes(l),
            [QS_PIECE_LOGITS] = product(l->loss_rows, QS_HEAD_SLICE, sizeof(float)),
            [QS_PIECE_PROBABILITIES] = product(l->loss_rows, QS_HEAD_SLICE, sizeof(qs_bf16)),
            [QS_PIECE_LORA] = lora_scratch(l),
            [QS_PIECE_LORA_SUM] = lora_sum_scratch(l),
            [QS_PIECE_DORA] = dora_scratch(l),
            [QS_PIECE_GEMM_WORKSPACE] = gemm_workspace_bytes,
        }};
    for (int i = 0; i < QS_PIECE_COUNT; i++) {
        p.at[i] = p.total;
        p.total += aligned(p.bytes[i]);
    }
    return p;
}

/* ---- the table ---- */

static size_t scratch_bytes(const qs_ops_limits *limits)
{
    return qs_cuda_pieces_of(limits, QS_CUDA_GEMM_WORKSPACE_BYTES).total;
}

const qs_ops *qs_ops_cuda_sizes(void)
{
    static const qs_ops table = {
        .name = "cuda",
        .act_dtype = QS_BF16,
        .joins = true,
        .takes = qs_cuda_takes,
        .scratch_bytes = scratch_bytes,
        .kept_bytes = qs_cuda_kept_bytes,
        .border = qs_cuda_border,
    };
    return &table;
}
