/* One tensor of the result: pieces of some rows are decoded or read, get their part of B A and,
 * with DoRA, their length, are rounded once and written.
 *
 * Bound: r multiply-adds a weight; of the base 0.5 byte is read and 2 are written. Every row is
 * computed by one thread in one order, so that the bits do not depend on threads. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "merge/merge_impl.h"

enum {
    PIECE_ELEMS = 1 << 20, /* at least; a row is never cut */
    GROUP_ROWS = 8,        /* rows that share a block of A in the cache */
    BLOCK_COLUMNS = 512,
};

/* ---- memory ---- */

static int64_t max_of(int64_t a, int64_t b)
{
    return a > b ? a : b;
}

qs_status qs_merge_buffers(qs_merge_job *job)
{
    int64_t message = 0, small = 0, columns = 0;
    for (int u = 0; u <= job->index->n_units; u++) {
        const qs_base_unit *unit = qs_merge_unit(job, u);
        qs_unit_layout l = qs_unit_layout_make(&unit->size, 1);
        message = max_of(message, (int64_t)l.message_bytes);
        small = max_of(small, unit->small_bytes);
    }
    for (int i = 0; i < job->n_tensors; i++) {
        columns = max_of(columns, job->tensors[i].columns);
    }
    job->unit = job->layer = -1;
    job->piece_elems = max_of(PIECE_ELEMS, columns);
    QS_TRY(QS_ALLOC(&job->message, job->original ? 0 : message, QS_MEM_WORK));
    QS_TRY(QS_ALLOC(&job->small, small + 1, QS_MEM_WORK));
    QS_TRY(QS_ALLOC(&job->segment, job->peft ? job->layout.per_layer : 0, QS_MEM_LORA));
    QS_TRY(QS_ALLOC(&job->wide, job->piece_elems, QS_MEM_WORK));
    QS_TRY(QS_ALLOC(&job->in, job->piece_elems * 4, QS_MEM_WORK));
    return QS_ALLOC(&job->out, job->piece_elems * 4, QS_MEM_WORK);
}

void qs_merge_buffers_free(qs_merge_job *job)
{
    qs_mem_free(job->message);
    qs_mem_free(job->small);
    qs_mem_free(job->segment);
    qs_mem_free(job->wide);
    qs_mem_free(job->in);
    qs_mem_free(job->out);
}

qs_status qs_merge_load_unit(qs_merge_job *job, int u)
{
    uint64_t ignored = 0;
    if (job->unit == u) {
        return QS_OK;
    }
    job->unit = -1;
    if (job->message != NULL && u < job->index->n_units) {
        QS_TRY(qs_base_read_share(job->index, job->fd, u, 0, 1, job->message, &ignored));
    }
    QS_TRY(qs_base_read_small(job->index, job->fd, qs_merge_unit(job, u), job->small));
    job->unit = u;
    return QS_OK;
}

/* The adapter weights of a layer. */
static qs_status load_segment(qs_merge_job *job, int layer, const float **segment)
{
    if (job->options->vector != NULL) {
        *segment = job->options->vector + layer * job->layout.per_layer;
        return QS_OK;
    }
    if (job->layer != layer) {
        job->layer = -1;
        QS_TRY(qs_peft_read_layer(job->peft, layer, job->segment));
        job->layer = layer;
    }
    *segment = job->segment;
    return QS_OK;
}

/* ---- the arithmetic ---- */

/* Some rows of one tensor on their way. */
typedef struct {
    int64_t rows, columns;
    int64_t first; /* element of the unit's tensor where they begin */
    /* from: NF4 of a unit, or stored numbers */
    const qs_unit_view *view;
    const qs_weight *weight;
    const uint8_t *stored; /* NULL: NF4 */
    qs_dtype stored_dtype;
    /* adapter */
    const float *a; /* [lora_rank, columns]; NULL: none */
    const float *b; /* [rows, lora_rank] */
    const float *m; /* [rows] DoRA's magnitudes; NULL: plain LoRA */
    int lora_rank;
    float scale;
    /* to */
    float *wide;
    uint8_t *out;
    qs_dtype dtype;
} piece;

/* Rows [begin, end) += scale * B A, over a block of columns. */
static void add_block(const piece *p, int64_t begin, int64_t end, int64_t column, int64_t n)
{
    for (int64_t row = begin; row < end; row++) {
        float sum[BLOCK_COLUMNS] = {0};
        const float *b = p->b + row * p->lora_rank;
        float *w = p->wide + row * p->columns + column;
        for (int k = 0; k < p->lora_rank; k++) {
            const float *a = p->a + k * p->columns + column;
            const float factor = b[k];
            for (int64_t j = 0; j < n; j++) {
                sum[j] += factor * a[j];
            }
        }
        for (int64_t j = 0; j < n; j++) {
            w[j] += p->scale * sum[j];
        }
    }
}

/* DoRA: rows [begin, end) of W + scale * B A to the lengths m. The length they had is that of the
 * weights merged into, as in peft: with --original those of the original. A zero row has none. */
static void set_lengths(const piece *p, int64_t begin, int64_t end)
{
    for (int64_t row = begin; row < end; row++) {
        float *w = p->wide + row * p->columns;
        double squares = 0;
        for (int64_t j = 0; j < p->columns; j++) {
            squares += (double)w[j] * (double)w[j];
        }
        const double factor = squares > 0 ? (double)p->m[row] / sqrt(squares) : 0;
        for (int64_t j = 0; j < p->columns; j++) {
            w[j] = (float)(factor * (double)w[j]);
        }
    }
}

/* Rows [begin, end) of the piece. \return whether all of them are finite. */
static bool compute_rows(const piece *p, int64_t begin, int64_t end)
{
    int64_t count = (end - begin) * p->columns;
    int64_t at = begin * p->columns;
    uint8_t *out = p->out + at * (int64_t)qs_dtype_bytes(p->dtype);
    if (p->stored != NULL) {
        const uint8_t *from = p->stored + at * (int64_t)qs_dtype_bytes(p->stored_dtype);
        qs_f32_load(p->wide + at, from, p->stored_dtype, count);
    } else {
        qs_weight_decode(p->view, p->weight, p->first + at, count, p->wide + at);
    }
    for (int64_t column = 0; p->a != NULL && column < p->columns; column += BLOCK_COLUMNS) {
        int64_t left = p->columns - column;
        add_block(p, begin, end, column, left < BLOCK_COLUMNS ? left : BLOCK_COLUMNS);
    }
    if (p->m != NULL) {
        set_lengths(p, begin, end);
    }
    qs_f32_store(out, p->dtype, p->wide + at, count);
    return qs_all_finite(out, p->dtype, count);
}

static bool compute_piece(const piece *p, int threads)
{
    int bad = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic)                                    \
    reduction(|                                                                                    \
              : bad) if (p->rows > GROUP_ROWS)
    for (int64_t begin = 0; begin < p->rows; begin += GROUP_ROWS) {
        int64_t end = begin + GROUP_ROWS < p->rows ? begin + GROUP_ROWS : p->rows;
        bad |= !compute_rows(p, begin, end);
    }
    return bad == 0;
}

/* ---- a tensor ---- */

/* Where the numbers of a tensor come from, within the unit that is in memory. */
typedef struct {
    const qs_merge_tensor *tensor;
    const qs_base_tensor *entry;
    int64_t row; /* of the whole tensor, where the unit's begins */
    qs_unit_view view;
    qs_weight weight;
    const float *segment; /* NULL: no adapter */
} source;

/* Stored numbers from element `first` of the unit's tensor on: in memory already, or read. NULL:
 * NF4. */
static qs_status find_stored(qs_merge_job *job, const source *s, int64_t first, int64_t count,
                             const uint8_t **stored, qs_dtype *dtype)
{
    const qs_base_tensor *e = s->entry;
    const qs_unit_layout *l = &s->view.layout;
    *dtype = e->dtype;
    *stored = NULL;
    if (s->tensor->original != NULL) {
        (void)qs_st_to_dtype(s->tensor->original->dtype, dtype); /* checked when it was opened */
        int64_t size = (int64_t)qs_dtype_bytes(*dtype);
        *stored = job->in;
        return qs_st_read(job->original, s->tensor->original,
                          (s->row * s->tensor->columns + first) * size, count * size, job->in);
    }
    int64_t at = first * (int64_t)qs_dtype_bytes(e->dtype);
    if (e->kind == QS_TENSOR_SMALL) {
        *stored = job->small + e->byte + at;
    } else if (e->kind == QS_TENSOR_RAW) { /* one message: the quanta of a tensor are one run */
        size_t quantum = qs_raw_quantum_bytes(&l->size);
        *stored = job->message + l->raw_at + (size_t)e->quantum * quantum + at;
    }
    return QS_OK;
}

static qs_status write_piece(qs_merge_job *job, const source *s, int64_t row, int64_t rows,
                             qs_st_writer *writer, int64_t item)
{
    const qs_lora_layout *lora = &job->layout;
    const qs_merge_tensor *t = s->tensor;
    piece p = {.rows = rows,
               .columns = t->columns,
               .first = row * t->columns,
               .view = &s->view,
               .weight = &s->weight,
               .lora_rank = lora->lora_rank,
               .scale = lora->scale,
               .wide = job->wide,
               .out = job->out,
               .dtype = job->dtype};
    size_t bytes = (size_t)(rows * t->columns) * qs_dtype_bytes(job->dtype);
    QS_TRY(find_stored(job, s, p.first, rows * t->columns, &p.stored, &p.stored_dtype));
    if (s->segment == NULL && p.stored != NULL && p.stored_dtype == job->dtype) {
        return qs_st_writer_put(writer, item, p.stored, bytes);
    }
    if (s->segment != NULL) {
        p.a = s->segment + lora->a_at[t->linear];
        p.b = s->segment + lora->b_at[t->linear] + (s->row + row) * lora->lora_rank;
        p.m = lora->dora ? s->segment + lora->m_at[t->linear] + s->row + row : NULL;
    }
    if (!compute_piece(&p, job->options->threads)) {
        return QS_FAIL(QS_ERR_NUMERIC,
                       "%s: tensor %s: a weight in rows %lld .. %lld is not finite in %s%s",
                       job->options->output, t->name, (long long)(s->row + row),
                       (long long)(s->row + row + rows - 1), qs_dtype_name(job->dtype),
                       job->dtype == QS_F16 ? "; choose --dtype bf16" : "; the adapter diverged");
    }
    return qs_st_writer_put(writer, item, job->out, bytes);
}

static qs_status write_part(qs_merge_job *job, source *s, qs_st_writer *writer, int64_t item)
{
    const qs_merge_tensor *t = s->tensor;
    int64_t rows = s->entry->rank == 2 ? s->entry->shape[0] : 1;
    int64_t step = max_of(1, job->piece_elems / t->columns);
    for (int64_t row = 0; row < rows; row += step) {
        int64_t n = rows - row < step ? rows - row : step;
        QS_TRY(write_piece(job, s, row, n, writer, item));
    }
    s->row += rows;
    return QS_OK;
}

qs_status qs_merge_write_tensor(qs_merge_job *job, const qs_merge_tensor *t, qs_st_writer *writer,
                                int64_t item)
{
    source s = {.tensor = t};
    if (t->linear >= 0) {
        QS_TRY(load_segment(job, t->layer, &s.segment));
    }
    for (int u = t->unit; u < t->unit + t->units; u++) {
        const qs_base_unit *unit = qs_merge_unit(job, u);
        if (t->original == NULL) {
            QS_TRY(qs_merge_load_unit(job, u));
        }
        s.entry = &unit->tensors[t->entry];
        s.view = (qs_unit_view){qs_unit_layout_make(&unit->size, 1), job->message};
        s.weight = qs_base_weight(job->index, s.entry);
        QS_TRY(write_part(job, &s, writer, item));
    }
    return QS_OK;
}
