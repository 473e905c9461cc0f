/* What an opened queue carries: one allocation of the device, cut into the scratch that each group
 * of operations asked for, one for decoded units that stay, and the products' handle and plans. */
#include "kernels/cuda/ops_cuda.h"

#include <stdlib.h>

static qs_cuda_pieces pieces_of(const qs_ops_limits *limits)
{
    return qs_cuda_pieces_of(limits, qs_cuda_gemm_workspace_bytes());
}

size_t qs_cuda_scratch_bytes(const qs_ops_limits *limits)
{
    return pieces_of(limits).total;
}

/* NULL for a piece that nobody asked for, so that its use shows. */
static void *piece(const qs_cuda_context *context, const qs_cuda_pieces *p, qs_cuda_piece which)
{
    return p->bytes[which] > 0 ? (char *)context->block + p->at[which] : NULL;
}

static void hand_out(qs_cuda_context *context, const qs_cuda_pieces *p)
{
    context->decoded = piece(context, p, QS_PIECE_DECODED);
    context->single = piece(context, p, QS_PIECE_SINGLE);
    context->logits = piece(context, p, QS_PIECE_LOGITS);
    context->probabilities = piece(context, p, QS_PIECE_PROBABILITIES);
    context->lora = piece(context, p, QS_PIECE_LORA);
    context->lora_sum = piece(context, p, QS_PIECE_LORA_SUM);
    context->dora = piece(context, p, QS_PIECE_DORA);
    context->gemm_workspace = piece(context, p, QS_PIECE_GEMM_WORKSPACE);
    context->single_bytes = p->bytes[QS_PIECE_SINGLE];
    context->lora_bytes = p->bytes[QS_PIECE_LORA];
    context->lora_sum_bytes = p->bytes[QS_PIECE_LORA_SUM];
    context->gemm_workspace_bytes = p->bytes[QS_PIECE_GEMM_WORKSPACE];
}

static void context_free(qs_queue *q, qs_cuda_context *context)
{
    qs_cuda_gemm_close(context);
    qs_device_free(qs_queue_device(q), context->block);
    qs_device_free(qs_queue_device(q), context->kept);
    free(context);
}

qs_status qs_cuda_open(qs_queue *q, const qs_ops_limits *limits)
{
    if (q->kernels != NULL) {
        return QS_FAIL(QS_ERR_BUG, "the operations of a queue were opened twice");
    }
    if (limits->n_linears > QS_OPS_LINEARS_MAX) {
        return QS_FAIL(QS_ERR_BUG, "%d linears in a unit; %d fit", limits->n_linears,
                       QS_OPS_LINEARS_MAX);
    }
    qs_cuda_context *context = calloc(1, sizeof *context);
    if (context == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "memory: the operations of a queue cannot be opened");
    }
    context->limits = *limits;
    const qs_cuda_pieces p = pieces_of(limits);
    qs_device *device = qs_queue_device(q);
    qs_status st = qs_device_alloc(device, &context->block, p.total, QS_MEM_WORK);
    if (st == QS_OK) {
        st = qs_device_alloc(device, &context->kept, qs_cuda_kept_bytes(limits),
                             QS_MEM_BASE_DECODED);
    }
    if (st == QS_OK) {
        hand_out(context, &p);
        st = qs_cuda_gemm_open(q, context);
    }
    if (st != QS_OK) {
        context_free(q, context);
        return st;
    }
    q->kernels = context;
    return QS_OK;
}

void qs_cuda_close(qs_queue *q)
{
    if (q->kernels != NULL) {
        /* What is under way may still use the scratch; an error of it is not lost, it was or will
         * be found by whoever waits for its result. */
        (void)qs_queue_wait(q);
        context_free(q, q->kernels);
        q->kernels = NULL;
    }
}

qs_cuda_context *qs_cuda_context_of(qs_queue *q)
{
    if (q->kernels == NULL) {
        (void)QS_FAIL(QS_ERR_BUG, "an operation on a queue whose operations were not opened");
    }
    return q->kernels;
}
