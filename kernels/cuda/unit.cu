/* From the bytes of a gathered unit to bf16 matrices.
 *
 * A layer that has arrived is decoded once, all its linears and their adapters' borders
 * (core/border.h) in one launch, and used by every micro-batch of the group (unit_open). Linears
 * that read the same x lie below each other in one bordered matrix (limits.joined). Where memory
 * allows, layers have places of their own and stay decoded; then the launch fills the
 * borders alone. A weight outside of an opened unit is decoded, or copied, call by call.
 *
 * A weight is W = round(code * absmax) to its own type (Dettmers et al. 2023, arXiv:2305.14314,
 * app. E), then bf16: the same bits as qs_weight_decode, rounded. One rounding for bf16 and fp32
 * weights, two for fp16.
 *
 * decode_kernel is bound by memory: reads 0.5 + 1/64 + 4/16384 B (nested; else 0.5 + 1/16), writes
 * 2 B a weight; a Llama-3-70B layer, 856 M weights, 2.15 GB: 0.64 ms at 3.35 TB/s, 0.50 ms at 4.3.
 * A block owns a quantum: its 256 absmax are computed once, one a thread, while the codes are on
 * their way (8 independent 32-bit loads a thread: 8 KB in flight a block); the 16 values lie in
 * shared memory, in different banks, so that any 32 look-ups take one cycle. About 6 instructions a
 * weight: shift, mask, look-up, product, half a conversion, and the store's share.
 *
 * A block reads, waits, computes and writes, so that what keeps memory busy is how many blocks a
 * multiprocessor has at different places of that. Of 13,312 quanta of Llama-3-8B's layer an H200
 * takes 1,056 at a time: 13 turns, of the last of which about two fifths are lost. (792 and 17
 * before the border's places came ready made, which is what was measured.)
 *
 * Registers on sm_80, 86, 89, 90a, 100, 120; no spills; 1088 bytes of shared memory:
 *     decode_kernel plain  32 40 40 32 40 47: 8 blocks a multiprocessor on sm_80 and 90a, 6 on
 *                          sm_86, 89 and 100, 5 on sm_120
 *     other types, widths  48 48 48 48 40 48
 *     raw_kernel 1, 8      22 23 23 19 22 22, 24 22 22 24 22 22
 */
#include "kernels/cuda/cuda_impl.cuh"

#include "kernels/cuda/core/border.h"
#include "kernels/cuda/core/f16.h"
#include "kernels/cuda/core/nf4_decode.h"

extern "C" {
#include "quant/nf4.h"
}

static_assert((int)QS_DECODE_QUANTUM == (int)QS_NF4_QUANTUM, "a block decodes a quantum");
static_assert((int)QS_DECODE_BLOCK == (int)QS_NF4_BLOCK, "64 elements share an absmax");
static_assert((int)QS_DECODE_BLOCKS == (int)QS_DECODE_THREADS, "a thread computes one absmax");

/* ---- borders ---- */

typedef struct {
    qs_bf16 *matrix; /* the linear's part */
    const qs_bf16 *a, *b;
    int64_t groups;
    qs_border_linear place;
} border_linear;

typedef struct {
    int64_t groups;
    int count;
    border_linear linear[QS_OPS_LINEARS_MAX];
} border_job;

enum {
    BORDER_TURNS = 2,                                /* groups of a thread */
    BORDER_GROUPS = BORDER_TURNS * QS_DECODE_THREADS /* of a block */
};

/* Eight elements, of which the first `taken` are read and the others zeros. */
static __device__ __forceinline__ uint4 load_border(const qs_bf16 *from, int taken)
{
    if (taken == QS_BORDER_GROUP && (uintptr_t)from % 16 == 0) {
        return qs_load_16(from);
    }
    uint32_t word[QS_BORDER_GROUP / 2];
#pragma unroll
    for (int i = 0; i < QS_BORDER_GROUP / 2; i++) {
        const uint32_t low = 2 * i < taken ? from[2 * i].bits : 0u;
        const uint32_t high = 2 * i + 1 < taken ? from[2 * i + 1].bits : 0u;
        word[i] = low | high << 16;
    }
    return make_uint4(word[0], word[1], word[2], word[3]);
}

/* Below W all groups lie on 16 bytes, beside it where W's rows are whole groups. */
static __device__ __forceinline__ void store_border(qs_bf16 *to, uint4 value)
{
    if ((uintptr_t)to % 16 == 0) {
        qs_store_16(to, value);
        return;
    }
    const uint32_t word[QS_BORDER_GROUP / 2] = {value.x, value.y, value.z, value.w};
#pragma unroll
    for (int i = 0; i < QS_BORDER_GROUP; i++) {
        to[i].bits = (uint16_t)(word[i / 2] >> (16 * (i % 2)));
    }
}

/* Group `local` of the job's borders; *to is where it belongs. */
static __device__ __forceinline__ uint4 border_group(const border_job &job, int64_t local,
                                                     qs_bf16 **to)
{
    int which = 0;
    while (local >= job.linear[which].groups) {
        local -= job.linear[which].groups;
        which++;
    }
    const border_linear *linear = &job.linear[which];
    const qs_border_group group = qs_border_group_at(local, &linear->place);
    *to = linear->matrix + group.at;
    return load_border((group.source == QS_BORDER_B ? linear->b : linear->a) + group.from,
                       group.taken);
}

/* All that a thread reads is under way before it writes: a block of the borders then keeps its
 * place from one that decodes for one latency of the memory. */
static __device__ __forceinline__ void fill_border(const border_job &job, uint32_t block)
{
    const int64_t first = (int64_t)block * BORDER_GROUPS + threadIdx.x;
    qs_bf16 *to[BORDER_TURNS];
    uint4 value[BORDER_TURNS];
#pragma unroll
    for (int turn = 0; turn < BORDER_TURNS; turn++) {
        const int64_t local = first + turn * QS_DECODE_THREADS;
        to[turn] = NULL;
        if (local < job.groups) {
            value[turn] = border_group(job, local, &to[turn]);
        }
    }
#pragma unroll
    for (int turn = 0; turn < BORDER_TURNS; turn++) {
        if (to[turn] != NULL) {
            store_border(to[turn], value[turn]);
        }
    }
}

/* ---- NF4 ---- */

typedef struct {
    qs_bf16 *matrix;
    const float *map;
    int64_t elems, stride;
    int64_t step_by;          /* QS_DECODE_SPAN elements further on: of the matrix, */
    uint32_t step_cols;       /* and columns */
    uint32_t in, gap;         /* in + gap = stride */
    uint32_t quantum, quanta; /* of the unit: the tensor's first, and how many */
    uint32_t before;          /* quanta of the job's linears before this one */
    float offset;
    bool f16;
} decode_linear;

typedef struct {
    qs_decode_unit unit;
    float code[16];
    int count;
    uint32_t border_blocks;
    decode_linear linear[QS_OPS_LINEARS_MAX];
    border_job border;
} decode_job;

/* 8 elements of a row that has 16-byte groups. */
static __device__ __forceinline__ void store_group(qs_bf16 *to, const float value[QS_DECODE_GROUP])
{
    uint4 packed;
    packed.x = qs_round_pair(value[0], value[1]);
    packed.y = qs_round_pair(value[2], value[3]);
    packed.z = qs_round_pair(value[4], value[5]);
    packed.w = qs_round_pair(value[6], value[7]);
    qs_store_16(to, packed);
}

/* The first `count` of 8 elements wherever they lie: rows may end in between. */
static __device__ __forceinline__ void store_ragged(const decode_linear *linear,
                                                    qs_decode_cursor cursor, int count,
                                                    const float value[QS_DECODE_GROUP])
{
    for (int i = 0; i < QS_DECODE_GROUP && i < count; i++) {
        linear->matrix[cursor.at] = qs_bf16_round(value[i]);
        cursor = qs_decode_cursor_step(cursor, 1, 1, linear->in, linear->gap);
    }
}

/* Decode the words of a thread, one a step, from `cursor` on, of a quantum of which the tensor has
 * `count` elements. WHOLE: rows hold whole groups. */
template <bool F16, bool WHOLE>
static __device__ __forceinline__ void
decode_words(const decode_linear *linear, qs_decode_cursor cursor, int count,
             const uint32_t word[QS_DECODE_STEPS], const float *code, const float *absmax)
{
#pragma unroll
    for (int step = 0; step < QS_DECODE_STEPS; step++) {
        const int first = step * QS_DECODE_SPAN + (int)threadIdx.x * QS_DECODE_GROUP;
        const float scale = absmax[threadIdx.x / (QS_DECODE_BLOCK / QS_DECODE_GROUP) +
                                   step * (QS_DECODE_SPAN / QS_DECODE_BLOCK)];
        float value[QS_DECODE_GROUP];
#pragma unroll
        for (int i = 0; i < QS_DECODE_GROUP; i++) {
            value[i] = qs_decode_value(code[qs_decode_nibble(word[step], i)], scale, F16);
        }
        if constexpr (!WHOLE) {
            store_ragged(linear, cursor, count - first, value);
        } else if (first < count) {
            store_group(linear->matrix + cursor.at, value);
        }
        cursor = qs_decode_cursor_step(cursor, linear->step_by, linear->step_cols, linear->in,
                                       linear->gap);
    }
}

/* The linear of a quantum of the job: comparisons with constants, none of which waits for another,
 * where a loop would wait for memory again and again. */
static __device__ __forceinline__ int linear_of(const decode_job &job, uint32_t quantum)
{
    int which = 0;
#pragma unroll
    for (int i = 1; i < QS_OPS_LINEARS_MAX; i++) {
        which += quantum >= job.linear[i].before ? 1 : 0;
    }
    return which;
}

/* Blocks for the borders, which begin first, then a block a quantum. PLAIN: all linears are of rows
 * of whole groups and not of fp16, which takes fewer registers. What does not need memory stands
 * before what waits for it. */
template <bool PLAIN>
__global__ void __launch_bounds__(QS_DECODE_THREADS) decode_kernel(const decode_job job)
{
    __shared__ float code[16];
    __shared__ float absmax[QS_DECODE_BLOCKS];

    if (blockIdx.x < job.border_blocks) {
        fill_border(job.border, blockIdx.x);
        return;
    }
    const uint32_t quantum = blockIdx.x - job.border_blocks;
    const decode_linear *linear = &job.linear[linear_of(job, quantum)];
    const uint32_t local = quantum - linear->before;
    const qs_decode_place place = qs_decode_place_of(&job.unit, linear->quantum + local);

    const float *absmax32 = reinterpret_cast<const float *>(job.unit.base + place.absmax32);
    float scale = __ldg(absmax32 + (job.unit.nested ? 0 : threadIdx.x));
    uint32_t index = 0;
    if (job.unit.nested) { /* first, as what it points at is to be loaded, too */
        index = __ldg(job.unit.base + place.absmax8 + threadIdx.x);
    }
    const uint32_t *packed = reinterpret_cast<const uint32_t *>(job.unit.base + place.packed);
    uint32_t word[QS_DECODE_STEPS];
#pragma unroll
    for (int step = 0; step < QS_DECODE_STEPS; step++) {
        word[step] = __ldg(packed + step * QS_DECODE_THREADS + threadIdx.x);
    }
    const int64_t first = (int64_t)local * QS_DECODE_QUANTUM;
    const qs_decode_cursor cursor = qs_decode_cursor_at(
        qs_decode_cell_of(first + threadIdx.x * QS_DECODE_GROUP, linear->in), linear->stride);
    const int count = (int)qs_hd_min(linear->elems - first, QS_DECODE_QUANTUM);
    if (threadIdx.x < 16) {
        code[threadIdx.x] = job.code[threadIdx.x];
    }
    if (job.unit.nested) {
        scale = qs_decode_absmax(__ldg(linear->map + index), scale, linear->offset);
    }
    absmax[threadIdx.x] = scale;
    __syncthreads(); /* code and absmax are read by all */

    const bool whole = linear->in % QS_DECODE_GROUP == 0;
    if (PLAIN || (whole && !linear->f16)) {
        decode_words<false, true>(linear, cursor, count, word, code, absmax);
    } else if (whole) {
        decode_words<true, true>(linear, cursor, count, word, code, absmax);
    } else if (!linear->f16) {
        decode_words<false, false>(linear, cursor, count, word, code, absmax);
    } else {
        decode_words<true, false>(linear, cursor, count, word, code, absmax);
    }
}

/* ---- raw ---- */

typedef struct {
    qs_decode_unit unit;
    qs_bf16 *matrix;
    int64_t out, stride;
    uint32_t in;
    uint32_t quantum, quanta;
    uint32_t quantum_elems;
    qs_dtype dtype;
} raw_job;

enum { RAW_THREADS = 256 };

static __device__ __forceinline__ float raw_load(const uint8_t *from, uint32_t i, qs_dtype dtype)
{
    if (dtype == QS_F32) {
        return reinterpret_cast<const float *>(from)[i];
    }
    if (dtype == QS_BF16) {
        return qs_bf16_to_f32(reinterpret_cast<const qs_bf16 *>(from)[i]);
    }
    return qs_f16_to_f32(reinterpret_cast<const qs_f16 *>(from)[i]);
}

/* A block copies quanta; GROUP elements a thread and step: 8 if groups of bf16 stay whole, else 1.
 */
template <int GROUP> __global__ void __launch_bounds__(RAW_THREADS) raw_kernel(const raw_job job)
{
    for (uint32_t local = blockIdx.x; local < job.quanta; local += gridDim.x) {
        const uint8_t *from = job.unit.base + qs_decode_raw_place(&job.unit, job.quantum + local);
        const qs_decode_cell start = qs_decode_cell_of((int64_t)local * job.quantum_elems, job.in);
        for (uint32_t i = threadIdx.x * GROUP; i < job.quantum_elems; i += RAW_THREADS * GROUP) {
            const qs_decode_cell cell = qs_decode_cell_after(start, i, job.in);
            if (cell.row >= job.out) {
                break;
            }
            qs_bf16 *to = job.matrix + cell.row * job.stride + cell.col;
            if (GROUP == 1) {
                *to = qs_bf16_round(raw_load(from, i, job.dtype));
            } else {
                qs_store_16(to, qs_load_16(from + (uint64_t)i * sizeof(qs_bf16)));
            }
        }
    }
}

/* ---- host: what the kernels are told ---- */

static qs_decode_unit decode_unit(const qs_unit_view *unit)
{
    const qs_unit_layout *l = &unit->layout;
    qs_decode_unit out;
    out.base = unit->base;
    out.message_bytes = l->message_bytes;
    out.packed_at = l->packed_at;
    out.absmax8_at = l->absmax8_at;
    out.absmax32_at = l->absmax32_at;
    out.raw_at = l->raw_at;
    out.nf4_per_rank = (uint32_t)qs_hd_max(l->nf4_per_rank, 1);
    out.raw_per_rank = (uint32_t)qs_hd_max(l->raw_per_rank, 1);
    out.raw_quantum_bytes = qs_raw_quantum_bytes(&l->size);
    out.nested = l->size.absmax8_per_quantum != 0;
    return out;
}

static decode_linear decode_linear_of(const qs_weight *w, void *matrix, int64_t stride)
{
    decode_linear out;
    out.matrix = (qs_bf16 *)matrix;
    out.map = w->map;
    out.elems = w->out * w->in;
    out.stride = stride;
    out.in = (uint32_t)w->in;
    out.gap = (uint32_t)(stride - w->in);
    out.step_cols = QS_DECODE_SPAN % out.in;
    out.step_by = QS_DECODE_SPAN / out.in * stride + out.step_cols;
    out.quantum = (uint32_t)w->quantum;
    out.quanta = (uint32_t)qs_nf4_quanta(out.elems);
    out.offset = w->offset;
    out.f16 = w->dtype == QS_F16;
    return out;
}

/* Decode the NF4 weights of the job, and fill its borders. */
static qs_status decode_launch(qs_queue *q, const qs_unit_view *unit, decode_job *job)
{
    uint32_t quanta = 0;
    bool plain = true;
    for (int i = 0; i < job->count; i++) {
        job->linear[i].before = quanta;
        quanta += job->linear[i].quanta;
        plain = plain && !job->linear[i].f16 && job->linear[i].in % QS_DECODE_GROUP == 0;
    }
    for (int i = job->count; i < QS_OPS_LINEARS_MAX; i++) {
        job->linear[i].before = UINT32_MAX;
    }
    job->border_blocks = (uint32_t)qs_hd_ceil_div(job->border.groups, BORDER_GROUPS);
    if (job->border_blocks + quanta == 0) {
        return QS_OK;
    }
    job->unit = decode_unit(unit);
    memcpy(job->code, qs_nf4_code, sizeof job->code);
    if (plain) {
        QS_LAUNCH(decode_kernel<true>, job->border_blocks + quanta, QS_DECODE_THREADS, 0,
                  qs_cuda_stream(q), *job);
    } else {
        QS_LAUNCH(decode_kernel<false>, job->border_blocks + quanta, QS_DECODE_THREADS, 0,
                  qs_cuda_stream(q), *job);
    }
    return qs_cuda_launched("decode_kernel");
}

static qs_status raw_launch(qs_queue *q, const qs_unit_view *unit, const qs_weight *w, void *matrix,
                            int64_t stride)
{
    const int64_t elems = unit->layout.size.raw_quantum_elems;
    raw_job job;
    job.unit = decode_unit(unit);
    job.matrix = (qs_bf16 *)matrix;
    job.out = w->out;
    job.stride = stride;
    job.in = (uint32_t)w->in;
    job.quantum = (uint32_t)w->quantum;
    job.quanta = (uint32_t)qs_hd_ceil_div(w->out * w->in, elems);
    job.quantum_elems = (uint32_t)elems;
    job.dtype = w->dtype;
    if (job.quanta == 0) {
        return QS_OK;
    }
    const bool whole =
        w->dtype == QS_BF16 && w->in % 8 == 0 && elems % 8 == 0 && (uintptr_t)unit->base % 16 == 0;
    if (whole) {
        QS_LAUNCH(raw_kernel<8>, qs_cuda_grid(job.quanta), RAW_THREADS, 0, qs_cuda_stream(q), job);
    } else {
        QS_LAUNCH(raw_kernel<1>, qs_cuda_grid(job.quanta), RAW_THREADS, 0, qs_cuda_stream(q), job);
    }
    return qs_cuda_launched("raw_kernel");
}

/* ---- one weight ---- */

extern "C" const qs_cuda_linear *qs_cuda_opened(const qs_cuda_context *context,
                                                const qs_unit_view *unit, const qs_weight *w)
{
    if (context->open_base == NULL || context->open_base != unit->base) {
        return NULL;
    }
    for (int i = 0; i < context->n_linears; i++) {
        const qs_cuda_linear *linear = &context->linears[i];
        if (linear->kind == w->kind && linear->quantum == w->quantum && linear->out == w->out &&
            linear->in == w->in) {
            return linear;
        }
    }
    return NULL;
}

/* The stored bytes, if they are the matrix already: bf16, in one message, rows on 16 bytes. */
static const void *stored_in_place(const qs_unit_view *unit, const qs_weight *w)
{
    const qs_unit_layout *l = &unit->layout;
    if (w->kind != QS_WEIGHT_RAW || w->dtype != QS_BF16 || w->in % 8 != 0 || w->out == 0) {
        return NULL;
    }
    const int64_t last = w->quantum + (w->out * w->in - 1) / l->size.raw_quantum_elems;
    const uint8_t *first = qs_unit_raw_quantum(unit, w->quantum);
    if (w->quantum / l->raw_per_rank != last / l->raw_per_rank || (uintptr_t)first % 16 != 0) {
        return NULL;
    }
    return first;
}

extern "C" qs_status qs_cuda_weight_matrix(qs_queue *q, const qs_unit_view *unit,
                                           const qs_weight *w, const void **matrix, int64_t *stride)
{
    const qs_cuda_context *context = qs_cuda_context_of(q);
    if (context == NULL) {
        return QS_ERR_BUG;
    }
    const qs_cuda_linear *opened = qs_cuda_opened(context, unit, w);
    if (opened != NULL) {
        *matrix = opened->matrix;
        *stride = opened->stride;
        return QS_OK;
    }
    *matrix = stored_in_place(unit, w);
    *stride = w->in;
    if (*matrix != NULL) {
        return QS_OK;
    }
    if (qs_border_bytes(qs_border_elems(w->out, w->in, 0)) > context->single_bytes) {
        return QS_FAIL(QS_ERR_BUG, "weight of %lld x %lld is larger than the limits say",
                       (long long)w->out, (long long)w->in);
    }
    *matrix = context->single;
    *stride = qs_border_stride(w->in, 0);
    if (w->kind == QS_WEIGHT_RAW) {
        return raw_launch(q, unit, w, context->single, *stride);
    }
    decode_job job;
    job.count = 1;
    job.linear[0] = decode_linear_of(w, context->single, *stride);
    job.border.groups = 0;
    return decode_launch(q, unit, &job);
}

/* ---- a unit ---- */

/* Where a slot begins. */
static uint8_t *slot_base(const qs_cuda_context *context, int slot)
{
    const size_t before = (size_t)(slot - 1) * qs_cuda_decoded_bytes(&context->limits);
    return slot == 0 ? (uint8_t *)context->decoded : (uint8_t *)context->kept + before;
}

/* How many weights from `w` on are one matrix: those that the limits join and that can be. */
static int joined_weights(const qs_ops_limits *limits, const qs_weight *w, int i, int count)
{
    const int most = (int)qs_hd_min(qs_cuda_joined(limits, i), count - i);
    int joined = 1;
    while (joined < most && w[i + joined].in == w[i].in) {
        joined++;
    }
    return joined;
}

/* Give linears i to i + joined the matrix that begins at `to`; its bytes. */
static size_t place_joined(qs_cuda_context *context, const qs_weight *w, int i, int joined,
                           uint8_t *to)
{
    const int64_t border = joined * qs_border_width(context->limits.lora_rank);
    const int64_t stride = qs_border_stride(w[i].in, border);
    int64_t out = 0;
    for (int j = 0; j < joined; j++) {
        qs_cuda_linear *linear = &context->linears[i + j];
        *linear = {};
        linear->kind = w[i + j].kind;
        linear->quantum = w[i + j].quantum;
        linear->out = w[i + j].out;
        linear->in = w[i + j].in;
        linear->stride = stride;
        linear->matrix = (qs_bf16 *)to + out * stride;
        linear->place = j;
        linear->joined = joined;
        out += w[i + j].out;
    }
    return qs_border_bytes(qs_border_elems(out, w[i].in, border));
}

/* Give all of a unit their pieces of the slot. */
static qs_status place_linears(qs_cuda_context *context, const qs_weight *w, int count, int slot)
{
    size_t at = 0;
    if (count > QS_OPS_LINEARS_MAX || slot < 0 || slot > context->limits.kept_units) {
        return QS_FAIL(QS_ERR_BUG, "a unit of %d linears in slot %d", count, slot);
    }
    uint8_t *base = slot_base(context, slot);
    for (int i = 0, joined; i < count; i += joined) {
        joined = joined_weights(&context->limits, w, i, count);
        at += place_joined(context, w, i, joined, base + at);
    }
    if (at > qs_cuda_decoded_bytes(&context->limits)) {
        return QS_FAIL(QS_ERR_BUG, "a unit of %zu decoded bytes is larger than the limits say", at);
    }
    return QS_OK;
}

/* Adapters that fit get their places at the edges of the matrix that begins with `first`, one
 * behind the other, and the job what to fill in there. */
static void plan_border(qs_cuda_linear *first, const qs_lora *lora, int64_t width, border_job *job)
{
    int64_t border = 0, below = 0;
    for (int i = 0; i < first->joined; i++) {
        const bool fits = lora[i].a != NULL && lora[i].rank <= width;
        first[i].rank = fits ? lora[i].rank : 0;
        first[i].at = border;
        border += fits ? width : 0;
        below += first[i].out;
    }
    for (int i = 0; border > 0 && i < first->joined; i++) {
        border_linear *to = &job->linear[job->count++];
        qs_cuda_linear *l = &first[i];
        l->border = border;
        to->matrix = (qs_bf16 *)l->matrix;
        to->a = l->rank > 0 ? (const qs_bf16 *)lora[i].a : to->matrix; /* no one reads the latter */
        to->b = l->rank > 0 ? (const qs_bf16 *)lora[i].b : to->matrix;
        to->place = {l->out,     l->in,         l->stride,
                     border,     below + l->at, l->rank > 0 ? (int)width : 0,
                     (int)l->at, l->rank};
        to->groups = qs_border_groups(&to->place);
        job->groups += to->groups;
        below -= l->out;
    }
}

/* `lora` NULL: no adapters. */
static void plan_borders(qs_cuda_context *context, const qs_lora *lora, int count, border_job *job)
{
    const int64_t width = qs_border_width(context->limits.lora_rank);
    job->groups = 0;
    job->count = 0;
    for (int i = 0; lora != NULL && i < count; i += context->linears[i].joined) {
        plan_border(&context->linears[i], lora + i, width, job);
    }
}

/* With `decoded` the weights lie there: the job has borders alone. */
static qs_status decode_linears(qs_queue *q, qs_cuda_context *context, const qs_unit_view *unit,
                                const qs_weight *w, const qs_lora *lora, int count, bool decoded)
{
    decode_job job;
    job.count = 0;
    for (int i = 0; i < count && !decoded; i++) {
        const qs_cuda_linear *linear = &context->linears[i];
        if (w[i].kind == QS_WEIGHT_NF4) {
            job.linear[job.count++] = decode_linear_of(&w[i], linear->matrix, linear->stride);
        } else {
            QS_TRY(raw_launch(q, unit, &w[i], linear->matrix, linear->stride));
        }
    }
    plan_borders(context, lora, count, &job.border);
    return decode_launch(q, unit, &job);
}

extern "C" qs_status qs_cuda_unit_open(qs_queue *q, const qs_unit_view *unit, const qs_weight *w,
                                       const qs_lora *lora, int count, int slot, bool decoded)
{
    qs_cuda_context *context = qs_cuda_context_of(q);
    if (context == NULL) {
        return QS_ERR_BUG;
    }
    qs_cuda_unit_close(q);
    QS_TRY(place_linears(context, w, count, slot));
    QS_TRY(decode_linears(q, context, unit, w, lora, count, decoded));
    context->n_linears = count;
    context->open_base = unit->base;
    return QS_OK;
}

extern "C" void qs_cuda_unit_close(qs_queue *q)
{
    qs_cuda_context *context = qs_cuda_context_of(q);
    if (context != NULL) {
        context->open_base = NULL;
        context->n_linears = 0;
    }
}
