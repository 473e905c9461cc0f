/* The operations that are measured, each with its inputs: products with NF4 weights and adapters,
 * decode, attention, head. A case is made in a qs_bench's buffers and lives until qs_bench_free.
 * The calls are qs_bench_call; their ctx is the case. check.h says whether what they wrote is
 * right. */
#ifndef QS_BENCH_KERNELS_CASES_H
#define QS_BENCH_KERNELS_CASES_H

#include "bench/kernels/measure.h"

/** Bytes of an NF4 weight with both levels of scales. */
#define QS_BENCH_NF4_BYTES (0.5 + 1.0 / 64 + 4.0 / 16384)

/* ---- a unit of NF4 linears ---- */

typedef struct {
    qs_unit_view view; /* one message in device memory; random codes and scales */
    qs_weight w[QS_OPS_LINEARS_MAX];
    qs_lora lora[QS_OPS_LINEARS_MAX];
    int count;
    bool adapted; /* unit_open gets the adapters */
    float *out;   /* CPU: where qs_bench_unit_decode writes; NULL: nowhere */
    int64_t most; /* weights of the largest linear */
} qs_bench_unit;

/** `count` linears [out, in]; `lora_rank` 0: without adapters. */
qs_status qs_bench_unit_make(qs_bench *b, qs_bench_unit *u, int count, const int64_t *out,
                             const int64_t *in, int lora_rank);

/** Weights of all linears. */
double qs_bench_unit_weights(const qs_bench_unit *u);

/** What a pass does when a gathered unit has arrived: unit_open. */
qs_status qs_bench_unit_open(qs_bench *b, void *unit);

/** Decode every linear: unit_open on a GPU; on the CPU, which decodes while it packs, the same
 * decoder on all threads, to u->out as fp32 if there is one. Made ready by
 * qs_bench_unit_decode_make. */
qs_status qs_bench_unit_decode_make(qs_bench *b, qs_bench_unit *u);
qs_status qs_bench_unit_decode(qs_bench *b, void *unit);
/** Bytes that it must move. */
double qs_bench_unit_decode_bytes(const qs_bench *b, const qs_bench_unit *u);

/* ---- a product ---- */

typedef struct {
    const qs_bench_unit *unit;
    const qs_weight *w;
    qs_mat x, y, dx; /* [T, in], [T, out] (also dY), [T, in] */
    void *dense;     /* [out, in] of the operations' type; made by qs_bench_dense_make */
} qs_bench_linear;

/** Linear `i` of the unit for `tokens` rows. */
qs_status qs_bench_linear_make(qs_bench *b, qs_bench_linear *l, const qs_bench_unit *u, int i,
                               int64_t tokens);
qs_status qs_bench_linear_forward(qs_bench *b, void *linear);  /* y = x W^T */
qs_status qs_bench_linear_backward(qs_bench *b, void *linear); /* dx = y W */

/** The same shape with a matrix that is there in the operations' type. */
qs_status qs_bench_dense_make(qs_bench *b, qs_bench_linear *l);
qs_status qs_bench_dense(qs_bench *b, void *linear); /* y = x dense^T */

/** 2 T out in. */
double qs_bench_linear_flops(const qs_bench_linear *l);

/* ---- linears of the unit that read the same x, with their adapters ---- */

typedef struct {
    const qs_bench_unit *unit;
    int count;
    qs_joined_linear linear[QS_OPS_JOINED_MAX];
    qs_mat x, y, dx; /* [T, in], [T, out of all] (also dY), [T, in] */
} qs_bench_joined;

/** Linears `first` to first + count. */
qs_status qs_bench_joined_make(qs_bench *b, qs_bench_joined *j, const qs_bench_unit *u, int first,
                               int count, int64_t tokens);
qs_status qs_bench_joined_forward(qs_bench *b, void *joined);
qs_status qs_bench_joined_backward(qs_bench *b, void *joined);

/** The sum of 2 T out in; and that of 2 T rank (out + in), which the adapters' forward does and
 * their backward twice. */
double qs_bench_joined_flops(const qs_bench_joined *j);
double qs_bench_joined_lora_flops(const qs_bench_joined *j);

/* ---- attention: one document ---- */

typedef struct {
    qs_attention_shape shape;
    int64_t tokens;
    qs_mat q, k, v, o, d_o, dq, dk, dv;
    float *lse, *delta;
} qs_bench_attention;

qs_status qs_bench_attention_make(qs_bench *b, qs_bench_attention *a, int64_t tokens, int n_heads,
                                  int n_kv_heads, int head_dim);
qs_status qs_bench_attention_forward(qs_bench *b, void *attention);
qs_status qs_bench_attention_backward(qs_bench *b, void *attention); /* after the forward */

/** The causal half alone: 2 T^2 q-width forward; backward 2.5 times that, for it computes the
 * scores again. */
double qs_bench_attention_flops(const qs_bench_attention *a, bool backward);

/* ---- head: one chunk of the vocabulary, raw bf16 ---- */

typedef struct {
    qs_unit_view view;
    qs_weight w; /* [chunk, hidden] */
    qs_head_state state;
    void *dx;    /* [rows, hidden] */
    float *loss; /* [rows] */
} qs_bench_head;

qs_status qs_bench_head_make(qs_bench *b, qs_bench_head *h, int64_t rows, int64_t chunk,
                             int64_t hidden);
qs_status qs_bench_head_chunk(qs_bench *b, void *head); /* as the first chunk */
qs_status qs_bench_head_finish(qs_bench *b, void *head);

/** 4 rows chunk hidden: logits and their weighted sum. */
double qs_bench_head_flops(const qs_bench_head *h);

#endif
