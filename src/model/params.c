/* The parameters that are not gathered: norms and biases as floats, the places of the linears in
 * their units, and the RoPE tables. */
#include "model/model_impl.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "base/mem.h"

/* Angles in fp32 as transformers computes them, then cosine and sine correctly rounded. */
static qs_status make_rope_table(const qs_model *m, const double *inv_freq, float magnitude,
                                 qs_rope_table *table)
{
    const int half = m->config->rotary_dim / 2;
    const int64_t positions = m->shape.max_tokens;
    QS_TRY(QS_ALLOC(&table->cos, positions * half, QS_MEM_BASE_SMALL));
    QS_TRY(QS_ALLOC(&table->sin, positions * half, QS_MEM_BASE_SMALL));
    for (int64_t p = 0; p < positions; p++) {
        for (int i = 0; i < half; i++) {
            const float angle = (float)p * (float)inv_freq[i];
            table->cos[p * half + i] = (float)cos((double)angle) * magnitude;
            table->sin[p * half + i] = (float)sin((double)angle) * magnitude;
        }
    }
    return QS_OK;
}

/* Floats that the small tensors of a unit widen to. */
static int64_t small_count(const qs_base_unit *unit)
{
    int64_t count = 0;
    for (int i = 0; i < unit->n_tensors; i++) {
        if (unit->tensors[i].kind == QS_TENSOR_SMALL) {
            count += unit->tensors[i].shape[0];
        }
    }
    return count;
}

static qs_status require(const qs_base_index *index, const qs_base_unit *unit, const char *suffix,
                         int64_t rows, int64_t cols, const qs_base_tensor **out)
{
    const qs_base_tensor *t = qs_base_find(unit, suffix);
    if (t == NULL) {
        return QS_FAIL(QS_ERR_INPUT_TENSOR,
                       "%s: unit %s has no tensor that ends in \"%s\": quantize the model again",
                       index->path, unit->name, suffix);
    }
    const int64_t have_cols = t->rank > 1 ? t->shape[1] : 1;
    if (t->shape[0] != rows || have_cols != cols) {
        return QS_FAIL(QS_ERR_INPUT_TENSOR,
                       "%s: tensor \"%s\" is [%lld, %lld], config.json asks for [%lld, %lld]",
                       index->path, t->name, (long long)t->shape[0], (long long)have_cols,
                       (long long)rows, (long long)cols);
    }
    *out = t;
    return QS_OK;
}

/* Widens a small tensor to the next free floats. */
static qs_status take_small(const qs_base_index *index, const qs_base_unit *unit,
                            const char *suffix, int64_t count, const uint8_t *bytes,
                            float **free_at, const float **out)
{
    const qs_base_tensor *t = NULL;
    QS_TRY(require(index, unit, suffix, count, 1, &t));
    if (t->kind != QS_TENSOR_SMALL) {
        return QS_FAIL(QS_ERR_INPUT_TENSOR, "%s: tensor \"%s\" should be unquantized", index->path,
                       t->name);
    }
    qs_base_small_f32(t, bytes, *free_at);
    *out = *free_at;
    *free_at += count;
    return QS_OK;
}

/* The weight of a norm. Gemma's is 1 + w: transformers, too, adds in fp32, so this is the same
 * number. */
static qs_status take_norm(const qs_base_index *index, const qs_base_unit *unit, const char *suffix,
                           int64_t count, const uint8_t *bytes, float **free_at, const float **out)
{
    float *w = *free_at;
    QS_TRY(take_small(index, unit, suffix, count, bytes, free_at, out));
    for (int64_t i = 0; i < count && index->config.norm_plus_one; i++) {
        w[i] = 1.0F + w[i];
    }
    return QS_OK;
}

static qs_status load_norms(const qs_model *m, const qs_base_unit *unit, const uint8_t *bytes,
                            float **free_at, qs_layer_params *p)
{
    const float **const to[QS_NORM_COUNT] = {[QS_NORM_INPUT] = &p->norm1,
                                             [QS_NORM_POST_ATTENTION] =
                                                 qs_norms_behind(m->config) ? &p->post1 : &p->norm2,
                                             [QS_NORM_PRE_FEEDFORWARD] = &p->norm2,
                                             [QS_NORM_POST_FEEDFORWARD] = &p->post2,
                                             [QS_NORM_Q] = &p->q_norm,
                                             [QS_NORM_K] = &p->k_norm};
    for (int i = 0; i < QS_NORM_COUNT; i++) {
        char name[64];
        const int64_t width = qs_norm_width(m->config, (qs_norm)i);
        snprintf(name, sizeof name, "%s.weight", qs_norm_path((qs_norm)i));
        if (width > 0) {
            QS_TRY(take_norm(m->index, unit, name, width, bytes, free_at, to[i]));
        }
    }
    return QS_OK;
}

static qs_status load_layer(qs_model *m, int layer, const uint8_t *bytes, float **free_at)
{
    const qs_base_index *index = m->index;
    const qs_base_unit *unit = &index->units[qs_base_layer_unit(index, layer)];
    qs_layer_params *p = &m->layers[layer];
    QS_TRY(load_norms(m, unit, bytes, free_at, p));
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        char name[64];
        int64_t out = 0, in = 0;
        const qs_base_tensor *t = NULL;
        qs_linear_shape(m->config, (qs_linear)i, &out, &in);
        if (out == 0) {
            continue;
        }
        snprintf(name, sizeof name, "%s.weight", qs_linear_path((qs_linear)i));
        QS_TRY(require(index, unit, name, out, in, &t));
        p->linear[i] = qs_model_weight(m, t);
        if (m->config->bias[i]) {
            snprintf(name, sizeof name, "%s.bias", qs_linear_path((qs_linear)i));
            QS_TRY(take_small(index, unit, name, out, bytes, free_at, &p->bias[i]));
        }
    }
    return QS_OK;
}

/* Largest small section, so that one buffer reads them all. */
static int64_t largest_small(const qs_base_index *index)
{
    int64_t most = index->final.small_bytes;
    for (int u = 0; u < index->n_units; u++) {
        most = index->units[u].small_bytes > most ? index->units[u].small_bytes : most;
    }
    return most;
}

static qs_status load_all(qs_model *m, int fd, uint8_t *bytes)
{
    const qs_base_index *index = m->index;
    float *free_at = m->small;
    for (int l = 0; l < m->config->n_layers; l++) {
        const qs_base_unit *unit = &index->units[qs_base_layer_unit(index, l)];
        QS_TRY(qs_base_read_small(index, fd, unit, bytes));
        QS_TRY(load_layer(m, l, bytes, &free_at));
    }
    float *last = free_at;
    QS_TRY(qs_base_read_small(index, fd, &index->final, bytes));
    QS_TRY(take_norm(index, &index->final, "norm.weight", m->config->hidden, bytes, &free_at,
                     &m->final_norm));
    for (int64_t i = 0; i < m->config->hidden; i++) { /* here, so that nobody divides logits */
        last[i] = (float)((double)last[i] / m->config->logits_scaling);
    }
    return QS_OK;
}

/* Replace the host's floats at *data by the same on the device. */
static qs_status move_to_device(qs_model *m, float **data, int64_t count)
{
    float *host = *data, *device = NULL;
    if (qs_device_is_host(m->device)) {
        return QS_OK;
    }
    QS_TRY(QS_DEVICE_ALLOC(m->device, &device, count, QS_MEM_BASE_SMALL));
    *data = device;
    qs_status st = qs_queue_copy(m->queue, device, host, (size_t)count * sizeof *host);
    if (st == QS_OK) {
        st = qs_queue_wait(m->queue);
    }
    qs_mem_free(host);
    return st;
}

/* The layers' norms and biases pointed into the host's floats. */
static void point_one_to(const qs_model *m, const float *host, const float **to)
{
    *to = *to != NULL ? m->small + (*to - host) : NULL;
}

static void point_to(qs_model *m, const float *host)
{
    for (int l = 0; l < m->config->n_layers; l++) {
        qs_layer_params *p = &m->layers[l];
        const float **const norms[] = {&p->norm1, &p->norm2,  &p->post1,
                                       &p->post2, &p->q_norm, &p->k_norm};
        for (size_t i = 0; i < sizeof norms / sizeof *norms; i++) {
            point_one_to(m, host, norms[i]);
        }
        for (int i = 0; i < QS_LINEAR_COUNT; i++) {
            point_one_to(m, host, &p->bias[i]);
        }
    }
    point_one_to(m, host, &m->final_norm);
}

/* The tables of full layers, or of all, and where windowed layers turn otherwise, theirs. */
static qs_status load_rope_tables(qs_model *m)
{
    const int64_t count = m->shape.max_tokens * (m->config->rotary_dim / 2);
    double inv_freq[QS_HEAD_DIM_MAX / 2];
    qs_hf_rope_frequencies(m->config, m->shape.seq_len, inv_freq);
    QS_TRY(make_rope_table(m, inv_freq, (float)m->config->rope_magnitude, &m->rope));
    QS_TRY(move_to_device(m, &m->rope.cos, count));
    QS_TRY(move_to_device(m, &m->rope.sin, count));
    if (m->config->rope_local_theta > 0) {
        qs_hf_rope_local_frequencies(m->config, inv_freq);
        QS_TRY(make_rope_table(m, inv_freq, 1.0F, &m->rope_local));
        QS_TRY(move_to_device(m, &m->rope_local.cos, count));
        QS_TRY(move_to_device(m, &m->rope_local.sin, count));
    }
    return QS_OK;
}

/* The numbers of a micro-batch's rows, by which its stream is copied for the linears where no norm
 * stands in front of them. */
static qs_status make_every_row(qs_model *m)
{
    const int64_t count = m->shape.max_tokens;
    int32_t *host = NULL;
    if (qs_norms_in_front(m->config)) {
        return QS_OK;
    }
    QS_TRY(QS_ALLOC(&host, count, QS_MEM_BASE_SMALL));
    for (int64_t i = 0; i < count; i++) {
        host[i] = (int32_t)i;
    }
    if (qs_device_is_host(m->device)) {
        m->every_row = host;
        return QS_OK;
    }
    qs_status st = QS_DEVICE_ALLOC(m->device, &m->every_row, count, QS_MEM_BASE_SMALL);
    if (st == QS_OK) {
        st = qs_queue_copy(m->queue, m->every_row, host, (size_t)count * sizeof *host);
    }
    if (st == QS_OK) {
        st = qs_queue_wait(m->queue);
    }
    qs_mem_free(host);
    return st;
}

/* The maps on the device; the index's own where they can be read. */
static qs_status load_maps(qs_model *m)
{
    enum { MAP = 256 };
    const int64_t count = (int64_t)m->index->n_maps * MAP;
    if (qs_device_is_host(m->device)) {
        return QS_OK;
    }
    QS_TRY(QS_DEVICE_ALLOC(m->device, &m->maps, count, QS_MEM_BASE_SMALL));
    QS_TRY(qs_queue_copy(m->queue, m->maps, m->index->maps, (size_t)count * sizeof *m->maps));
    return qs_queue_wait(m->queue);
}

qs_weight qs_model_weight(const qs_model *m, const qs_base_tensor *tensor)
{
    qs_weight w = qs_base_weight(m->index, tensor);
    if (w.map != NULL && m->maps != NULL) {
        w.map = m->maps + (w.map - m->index->maps);
    }
    return w;
}

qs_status qs_model_load_params(qs_model *m)
{
    qs_status st = QS_OK;
    const qs_base_index *index = m->index;
    const float *host = NULL;
    uint8_t *bytes = NULL;
    int64_t count = small_count(&index->final);
    int fd = -1;
    for (int u = 0; u < index->n_units; u++) {
        count += small_count(&index->units[u]);
    }
    QS_GOTO(load_maps(m));
    QS_GOTO(QS_ALLOC(&m->small, count, QS_MEM_BASE_SMALL));
    QS_GOTO(QS_ALLOC(&m->layers, m->config->n_layers, QS_MEM_BASE_SMALL));
    QS_GOTO(QS_ALLOC(&bytes, largest_small(index), QS_MEM_WORK));
    fd = index->small != NULL ? -1 : open(index->path, O_RDONLY | O_CLOEXEC);
    if (index->small == NULL && fd < 0) {
        st =
            QS_FAIL(QS_ERR_INPUT_MISSING, "%s: cannot be opened: %s", index->path, strerror(errno));
        goto done;
    }
    QS_GOTO(load_all(m, fd, bytes));
    host = m->small;
    QS_GOTO(move_to_device(m, &m->small, count));
    point_to(m, host);
    QS_GOTO(load_rope_tables(m));
    QS_GOTO(make_every_row(m));
done:
    if (fd >= 0) {
        close(fd);
    }
    qs_mem_free(bytes);
    return st;
}
