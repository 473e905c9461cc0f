/* What a weight is on a backend: Y = I W^T in fp32 shows every element of W, which must be
 * qs_weight_decode's, rounded to the backend's type: the same bits, whatever the layout, and
 * whether the unit was opened or not. */
#include <criterion/criterion.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "adapter.h"

/* ---- a unit of many tensors: both kinds, full of random bytes with sane scales ---- */

enum { NF4_QUANTA = 12, RAW_QUANTA = 9, RAW_ELEMS = 1000 };

typedef struct {
    qs_unit_view host, device;
    float *map; /* on the device */
} many;

static void put_scales(const qs_unit_view *view, float scale, uint64_t seed)
{
    const qs_unit_layout *l = &view->layout;
    const int64_t per = l->size.absmax32_per_quantum;
    float *random = fx_random(l->size.nf4_quanta * per, seed);
    for (int64_t q = 0; q < l->size.nf4_quanta; q++) {
        float *to = (float *)(uintptr_t)qs_unit_nf4_quantum(view, q).absmax32;
        for (int64_t i = 0; i < per; i++) {
            to[i] = scale * (1.0F + 0.4F * random[q * per + i]);
        }
    }
    free(random);
}

static void put_raw(const qs_unit_view *view, uint64_t seed)
{
    const qs_unit_size *size = &view->layout.size;
    float *random = fx_random(size->raw_quanta * size->raw_quantum_elems, seed);
    for (int64_t q = 0; q < size->raw_quanta; q++) {
        qs_f32_store((uint8_t *)(uintptr_t)qs_unit_raw_quantum(view, q), size->raw_dtype,
                     random + q * size->raw_quantum_elems, size->raw_quantum_elems);
    }
    free(random);
}

static many many_make(const tw_backend *b, bool nested, int nranks, float scale, qs_dtype raw_dtype,
                      int64_t raw_elems)
{
    const qs_unit_size size = {.nf4_quanta = NF4_QUANTA,
                               .raw_quanta = RAW_QUANTA,
                               .raw_quantum_elems = raw_elems,
                               .raw_dtype = raw_dtype,
                               .absmax8_per_quantum = nested ? 256 : 0,
                               .absmax32_per_quantum = nested ? 1 : 256};
    many m = {.host = {.layout = qs_unit_layout_make(&size, nranks)}};
    const size_t bytes = m.host.layout.message_bytes * (size_t)nranks;
    uint8_t *base = NULL;
    cr_assert_eq(posix_memalign((void **)&base, 64, bytes), 0);
    const qs_rng rng = qs_rng_make(5, 0, 0, 98, 0);
    for (size_t i = 0; i < bytes; i++) {
        base[i] = (uint8_t)(qs_rng_u32(&rng, i) >> 9);
    }
    m.host.base = base;
    put_scales(&m.host, scale, 77);
    put_raw(&m.host, 78);
    m.device = m.host;
    m.device.base = tw_upload(b, base, bytes);
    m.map = tw_upload(b, qs_dynamic_map, sizeof qs_dynamic_map);
    return m;
}

static void many_free(const tw_backend *b, many *m)
{
    tw_free(b, (void *)(uintptr_t)m->device.base);
    tw_free(b, m->map);
    free((void *)(uintptr_t)m->host.base);
}

/* ---- seeing a weight ---- */

static float *identity(int64_t n)
{
    float *x = calloc((size_t)(n * n), sizeof *x);
    cr_assert_not_null(x);
    for (int64_t i = 0; i < n; i++) {
        x[i * n + i] = 1.0F;
    }
    return x;
}

/* W [out, in] of the backend, from Y [in, out] = I W^T. */
static float *see(const tw_backend *b, const qs_unit_view *unit, const qs_weight *w)
{
    float *eye = identity(w->in);
    qs_mat x = {tw_upload_as_act(b, eye, w->in * w->in), w->in, w->in, w->in, b->ops->act_dtype};
    tw_mat y = tw_mat_make_as(b, QS_F32, w->in, w->out, 0, 1.0F, 1);
    cr_assert_eq(b->ops->linear_forward(b->queue, unit, w, NULL, &x, &y.device), QS_OK, "%s: %s",
                 b->name, qs_error_text());
    float *transposed = tw_mat_read(b, &y.device);
    float *out = malloc((size_t)(w->out * w->in) * sizeof *out);
    cr_assert_not_null(out);
    for (int64_t i = 0; i < w->in; i++) {
        for (int64_t o = 0; o < w->out; o++) {
            out[o * w->in + i] = transposed[i * w->out + o];
        }
    }
    free(transposed);
    free(eye);
    tw_free(b, x.data);
    tw_mat_free(b, &y);
    return out;
}

/* Equal but for the sign of a zero, which a sum with zeros does not keep. */
static void assert_weight(const tw_backend *b, const qs_unit_view *unit, const qs_weight *w,
                          const qs_unit_view *host, const qs_weight *host_w)
{
    float *got = see(b, unit, w);
    float *want = malloc((size_t)(w->out * w->in) * sizeof *want);
    cr_assert_not_null(want);
    qs_weight_decode(host, host_w, 0, w->out * w->in, want);
    int64_t zeros = 0;
    for (int64_t i = 0; i < w->out * w->in; i++) {
        const float rounded = qs_f32_round(want[i], b->ops->act_dtype);
        cr_assert_eq(got[i], rounded,
                     "%s: %lld x %lld from quantum %lld: element %lld is %a, not %a", b->name,
                     (long long)w->out, (long long)w->in, (long long)w->quantum, (long long)i,
                     (double)got[i], (double)rounded);
        zeros += rounded == 0.0F;
    }
    cr_assert_lt(zeros, w->out * w->in / 4 + 2, "a weight of zeros proves nothing");
    free(want);
    free(got);
}

static qs_weight on_device(const qs_weight *w, const many *m)
{
    qs_weight out = *w;
    out.map = w->map != NULL ? m->map : NULL;
    return out;
}

/* ---- tests ---- */

/* One quantum and less, rows that cross quanta, odd widths, widths of several steps of the kernel.
 */
static const struct {
    int64_t quantum, out, in;
} tensors[] = {{0, 50, 333}, {2, 64, 256},  {3, 3, 5}, {4, 25, 648},
               {5, 1, 1},    {6, 150, 328}, {9, 5, 9}};

enum { TENSORS = sizeof tensors / sizeof *tensors };

static void check_nf4(const tw_backend *b, qs_dtype dtype, bool nested, int nranks, float scale)
{
    many m = many_make(b, nested, nranks, scale, QS_BF16, RAW_ELEMS);
    qs_ops_limits limits = ad_limits_of(1, 8, 8, 13, false);
    qs_weight host[TENSORS], device[TENSORS];
    qs_lora none[TENSORS] = {0};
    limits.n_linears = TENSORS;
    for (int i = 0; i < TENSORS; i++) {
        host[i] = (qs_weight){.kind = QS_WEIGHT_NF4,
                              .out = limits.out[i] = tensors[i].out,
                              .in = limits.in[i] = tensors[i].in,
                              .quantum = tensors[i].quantum,
                              .dtype = dtype,
                              .map = nested ? qs_dynamic_map : NULL,
                              .offset = nested ? 0.37F * scale : 0.0F};
        device[i] = on_device(&host[i], &m);
    }
    tw_open(b, &limits);
    for (int opened = 0; opened <= 1; opened++) {
        if (opened == 1) {
            cr_assert_eq(b->ops->unit_open(b->queue, &m.device, device, none, TENSORS, 0, false),
                         QS_OK, "%s: %s", b->name, qs_error_text());
        }
        for (int i = 0; i < TENSORS; i++) {
            assert_weight(b, &m.device, &device[i], &m.host, &host[i]);
        }
    }
    b->ops->unit_close(b->queue);
    b->ops->close(b->queue);
    many_free(b, &m);
}

static void types(const tw_backend *b)
{
    check_nf4(b, QS_BF16, true, 3, 0.05F);
    check_nf4(b, QS_F16, true, 2, 0.05F);
    check_nf4(b, QS_F32, true, 1, 0.05F);
}

Test(twin_unit, weights_of_all_types)
{
    tw_each_backend(types);
}

static void layouts(const tw_backend *b)
{
    check_nf4(b, QS_BF16, false, 4, 0.05F);
    check_nf4(b, QS_F16, false, 5, 0.05F);
    check_nf4(b, QS_BF16, true, 5, 0.05F);
}

Test(twin_unit, weights_of_all_layouts)
{
    tw_each_backend(layouts);
}

/* fp16 near its largest number and among its subnormals; bf16 far outside of fp16. Subnormals of
 * fp32 are left out: what a matrix unit does with them is not the decode's affair. */
static void scales(const tw_backend *b)
{
    check_nf4(b, QS_F16, false, 2, 30000.0F);
    check_nf4(b, QS_F16, false, 2, 3e-6F);
    check_nf4(b, QS_BF16, false, 2, 1e37F);
    check_nf4(b, QS_BF16, true, 2, 1e-32F);
}

Test(twin_unit, weights_of_extreme_scales)
{
    tw_each_backend(scales);
}

/* Raw weights, in place or copied: in one message and across, whole 16-byte pieces and not, quanta
 * that end inside of rows. */
static void check_raw(const tw_backend *b, qs_dtype dtype, int nranks, int64_t elems, int64_t in)
{
    many m = many_make(b, true, nranks, 0.05F, dtype, elems);
    const int64_t first = 2, rows = (RAW_QUANTA - first) * elems / in;
    const qs_weight w = {.kind = QS_WEIGHT_RAW,
                         .out = rows < 20 ? rows : 20,
                         .in = in,
                         .quantum = first,
                         .dtype = dtype};
    const qs_ops_limits limits = ad_limits_of(1, w.out, w.in, 8, false);
    const qs_lora none = {0};
    tw_open(b, &limits);
    assert_weight(b, &m.device, &w, &m.host, &w);
    cr_assert_eq(b->ops->unit_open(b->queue, &m.device, &w, &none, 1, 0, false), QS_OK);
    assert_weight(b, &m.device, &w, &m.host, &w);
    b->ops->unit_close(b->queue);
    b->ops->close(b->queue);
    many_free(b, &m);
}

static void raw(const tw_backend *b)
{
    static const qs_dtype dtypes[] = {QS_BF16, QS_F16, QS_F32};
    for (int i = 0; i < 3; i++) {
        for (int nranks = 1; nranks <= 3; nranks += 2) {
            check_raw(b, dtypes[i], nranks, 200, 40);
            check_raw(b, dtypes[i], nranks, 200, 64); /* quanta end inside rows */
            check_raw(b, dtypes[i], nranks, 333, 333);
            check_raw(b, dtypes[i], nranks, 77, 24);
            check_raw(b, dtypes[i], nranks, 64, 64);
        }
    }
}

Test(twin_unit, raw_weights)
{
    tw_each_backend(raw);
}

/* A weight of either kind at the same number and of the same shape, both in one opened unit; and a
 * unit that is opened in another's place. */
static void kinds(const tw_backend *b)
{
    many m = many_make(b, true, 2, 0.05F, QS_BF16, RAW_ELEMS);
    const qs_weight host[2] = {
        {.kind = QS_WEIGHT_NF4,
         .out = 30,
         .in = 56,
         .quantum = 1,
         .dtype = QS_BF16,
         .map = qs_dynamic_map,
         .offset = 0.02F},
        {.kind = QS_WEIGHT_RAW, .out = 30, .in = 56, .quantum = 1, .dtype = QS_BF16}};
    const qs_weight device[2] = {on_device(&host[0], &m), on_device(&host[1], &m)};
    qs_ops_limits limits = ad_limits_of(1, 30, 56, 8, false);
    const qs_lora none[2] = {0};
    limits.n_linears = 2;
    limits.out[1] = 30;
    limits.in[1] = 56;
    tw_open(b, &limits);
    for (int first = 0; first <= 1; first++) {
        const int count = 2 - first; /* both, then the second alone in the first one's place */
        cr_assert_eq(b->ops->unit_open(b->queue, &m.device, device + first, none, count, 0, false),
                     QS_OK);
        for (int i = 0; i < 2; i++) {
            assert_weight(b, &m.device, &device[i], &m.host, &host[i]);
        }
    }
    b->ops->unit_close(b->queue);
    b->ops->close(b->queue);
    many_free(b, &m);
}

Test(twin_unit, kinds_do_not_mix)
{
    tw_each_backend(kinds);
}

/* Other bytes where an opened unit lay, as when a buffer is gathered into again: after unit_close
 * they are what counts. */
static void reuse(const tw_backend *b)
{
    many m = many_make(b, true, 2, 0.05F, QS_BF16, RAW_ELEMS);
    const qs_weight host = {.kind = QS_WEIGHT_NF4,
                            .out = 30,
                            .in = 56,
                            .quantum = 1,
                            .dtype = QS_BF16,
                            .map = qs_dynamic_map,
                            .offset = 0.02F};
    const qs_weight device = on_device(&host, &m);
    const qs_ops_limits limits = ad_limits_of(1, 30, 56, 8, false);
    const qs_lora none = {0};
    const size_t bytes = m.host.layout.message_bytes * 2;
    tw_open(b, &limits);
    cr_assert_eq(b->ops->unit_open(b->queue, &m.device, &device, &none, 1, 0, false), QS_OK);
    assert_weight(b, &m.device, &device, &m.host, &host);
    uint8_t *packed = (uint8_t *)(uintptr_t)qs_unit_nf4_quantum(&m.host, 1).packed;
    for (int i = 0; i < 30 * 56 / 2; i++) {
        packed[i] ^= 0x5a;
    }
    b->ops->unit_close(b->queue);
    cr_assert_eq(qs_queue_copy(b->queue, (void *)(uintptr_t)m.device.base, m.host.base, bytes),
                 QS_OK);
    for (int opened = 0; opened <= 1; opened++) {
        assert_weight(b, &m.device, &device, &m.host, &host);
        cr_assert_eq(b->ops->unit_open(b->queue, &m.device, &device, &none, 1, 0, false), QS_OK);
    }
    b->ops->unit_close(b->queue);
    b->ops->close(b->queue);
    many_free(b, &m);
}

Test(twin_unit, a_closed_unit_is_forgotten)
{
    tw_each_backend(reuse);
}

/* ---- slots ---- */

enum { SLOTS = 4 };

/* A weight of its own in each slot. */
static qs_weight in_slot(int slot)
{
    return (qs_weight){.kind = slot == 2 ? QS_WEIGHT_RAW : QS_WEIGHT_NF4,
                       .out = 30,
                       .in = 56 + 8 * slot,
                       .quantum = slot,
                       .dtype = QS_BF16,
                       .map = qs_dynamic_map,
                       .offset = 0.02F};
}

static void open_slot(const tw_backend *b, const many *m, int slot, bool decoded)
{
    const qs_weight host = in_slot(slot), device = on_device(&host, m);
    const qs_lora none = {0};
    cr_assert_eq(b->ops->unit_open(b->queue, &m->device, &device, &none, 1, slot, decoded), QS_OK,
                 "%s: %s", b->name, qs_error_text());
    assert_weight(b, &m->device, &device, &m->host, &host);
}

/* Units stay decoded while others are opened, and their bytes are not read again. */
static void slots(const tw_backend *b)
{
    many m = many_make(b, true, 2, 0.05F, QS_BF16, RAW_ELEMS);
    qs_ops_limits limits = ad_limits_of(1, 30, 56 + 8 * SLOTS, 8, false);
    const size_t bytes = m.host.layout.message_bytes * 2;
    limits.kept_units = SLOTS - 1;
    tw_open(b, &limits);
    for (int slot = 0; slot < SLOTS; slot++) {
        open_slot(b, &m, slot, false);
    }
    b->ops->unit_close(b->queue);
    if (b->ops->kept_bytes(&limits) > 0) { /* the CPU keeps none: it reads the bytes */
        cr_assert_eq(qs_queue_zero(b->queue, (void *)(uintptr_t)m.device.base, bytes), QS_OK);
    } else {
        cr_assert(tw_is_cpu(b));
    }
    for (int slot = SLOTS - 1; slot >= 0; slot--) {
        open_slot(b, &m, slot, true);
    }
    const qs_lora none = {0};
    const qs_weight one = in_slot(0);
    if (!tw_is_cpu(b)) {
        cr_assert_eq(b->ops->unit_open(b->queue, &m.device, &one, &none, 1, SLOTS, true),
                     QS_ERR_BUG, "there is no such slot");
        qs_error_clear();
    }
    b->ops->unit_close(b->queue);
    b->ops->close(b->queue);
    many_free(b, &m);
}

Test(twin_unit, slots_keep_their_units)
{
    tw_each_backend(slots);
}

/* ---- joined ---- */

enum { JOINED = 6 };

/* Linears of one matrix by the limits: kinds and types mixed, rows that cross quanta, odd widths,
 * more than the operations join; and one that has another width than the one before it. */
static qs_weight joined_one(int i, int64_t in)
{
    static const struct {
        qs_weight_kind kind;
        qs_dtype dtype;
        int64_t quantum, out;
    } of[JOINED] = {{QS_WEIGHT_NF4, QS_BF16, 0, 50}, {QS_WEIGHT_RAW, QS_BF16, 0, 7},
                    {QS_WEIGHT_NF4, QS_F16, 3, 3},   {QS_WEIGHT_NF4, QS_BF16, 4, 60},
                    {QS_WEIGHT_RAW, QS_BF16, 4, 1},  {QS_WEIGHT_NF4, QS_BF16, 7, 9}};
    const bool nf4 = of[i].kind == QS_WEIGHT_NF4;
    return (qs_weight){.kind = of[i].kind,
                       .out = of[i].out,
                       .in = i == 4 ? 2 * in : in,
                       .quantum = of[i].quantum,
                       .dtype = of[i].dtype,
                       .map = nf4 ? qs_dynamic_map : NULL,
                       .offset = nf4 ? 0.02F : 0.0F};
}

/* Without adapters, with them, and once more with the weights as they lie there. */
static void check_joined(const tw_backend *b, int64_t in, int rank)
{
    many m = many_make(b, true, 3, 0.05F, QS_BF16, RAW_ELEMS);
    qs_ops_limits limits = ad_limits_of(1, 60, 2 * in, rank, false);
    qs_weight host[JOINED], device[JOINED];
    adapter ad[JOINED];
    qs_lora lora[JOINED];
    limits.n_linears = JOINED;
    limits.kept_units = 1;
    for (int i = 0; i < JOINED; i++) {
        host[i] = joined_one(i, in);
        device[i] = on_device(&host[i], &m);
        limits.out[i] = host[i].out;
        limits.in[i] = host[i].in;
        limits.joined[i] = i > 0 && i != 5;
        ad[i] = adapter_make(b, 1, host[i].in, host[i].out, rank > 0 ? rank : 1, 0.0F);
        lora[i] = i == 1 ? (qs_lora){0} : ad[i].device;
    }
    limits.in[4] = in; /* the unit has another one, and less elsewhere */
    limits.out[0] += 20;
    tw_open(b, &limits);
    for (int pass = 0; pass < 3; pass++) {
        cr_assert_eq(b->ops->unit_open(b->queue, &m.device, device, pass == 0 ? NULL : lora, JOINED,
                                       1, pass == 2),
                     QS_OK, "%s: %s", b->name, qs_error_text());
        for (int i = 0; i < JOINED; i++) {
            assert_weight(b, &m.device, &device[i], &m.host, &host[i]);
        }
    }
    b->ops->unit_close(b->queue);
    b->ops->close(b->queue);
    for (int i = 0; i < JOINED; i++) {
        adapter_free(b, &ad[i]);
    }
    many_free(b, &m);
}

static void joined(const tw_backend *b)
{
    check_joined(b, 64, 8);
    check_joined(b, 333, 5);
    check_joined(b, 56, 0);
}

Test(twin_unit, joined_weights_lie_below_each_other)
{
    tw_each_backend(joined);
}
