/* The promise of the strict table: every operation gives the same bits for any number of threads
 * and any instruction set, also when several ranks of one process call it at once. */
#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <math.h>
#include <pthread.h>
#include <string.h>

#include "base/mem.h"
#include "kernels/cpu/isa.h"
#include "kernels/ops.h"
#include "ops_fixture.h"

enum { ROWS = 403, IN = 333, OUT = 290, RANK = 8, HEADS = 6, KV_HEADS = 2, DIM = 20, N_OPS = 22 };

static const char *const names[N_OPS] = {"linear_forward",
                                         "linear_backward",
                                         "lora_forward",
                                         "lora_backward",
                                         "rmsnorm_forward",
                                         "rmsnorm_backward",
                                         "rope",
                                         "attention_forward",
                                         "attention_backward",
                                         "attention_forward, capped",
                                         "attention_backward, capped",
                                         "silu_forward",
                                         "silu_backward",
                                         "gelu_forward",
                                         "gelu_backward",
                                         "add, scale",
                                         "head",
                                         "head, capped",
                                         "square_sums",
                                         "accumulate",
                                         "update",
                                         "dora"};

/* FNV-1a over the bytes of a result. */
static uint64_t hash(const void *data, int64_t bytes, uint64_t start)
{
    const uint8_t *p = data;
    uint64_t h = start == 0 ? 14695981039346656037U : start;
    for (int64_t i = 0; i < bytes; i++) {
        h = (h ^ p[i]) * 1099511628211U;
    }
    return h;
}

static uint64_t hash_mat(const qs_mat *mat, uint64_t start)
{
    uint64_t h = start;
    for (int64_t t = 0; t < mat->rows; t++) {
        h = hash(qs_mat_f32(mat) + t * mat->stride, mat->cols * (int64_t)sizeof(float), h);
    }
    return h;
}

static void linear_ops(qs_queue *q, uint64_t out[4])
{
    const qs_ops *ops = qs_ops_cpu();
    fx_weight_spec spec = {QS_WEIGHT_NF4, OUT, IN, QS_BF16, true, 3, 0};
    fx_unit unit = fx_unit_create(&spec, 1);
    qs_mat x = fx_mat(ROWS, IN, 3, 2), y = fx_mat(ROWS, OUT, 1, 3), dy = fx_mat(ROWS, OUT, 0, 4);
    qs_mat dx = fx_mat(ROWS, IN, 2, 5), xa = fx_mat(ROWS, RANK, 0, 6),
           work = fx_mat(ROWS, RANK, 0, 7);
    float *bias = fx_random(OUT, 8), *a = fx_random(RANK * IN, 9), *b = fx_random(RANK * OUT, 10);
    float *da = fx_random(RANK * IN, 11), *db = fx_random(RANK * OUT, 12);
    int64_t sample[ROWS], row_at[ROWS];
    for (int t = 0; t < ROWS; t++) {
        sample[t] = t / 50;
        row_at[t] = t % 50;
    }
    qs_lora lora = {.a = a,
                    .b = b,
                    .rank = RANK,
                    .scale = 2.0F,
                    .dropout = 0.1F,
                    .seed = 1,
                    .step = 2,
                    .site = QS_RNG_DROPOUT,
                    .sample = sample,
                    .row_at = row_at};
    cr_assert_eq(ops->linear_forward(q, &unit.view, &unit.weight, bias, &x, &y), QS_OK);
    out[0] = hash_mat(&y, 0);
    cr_assert_eq(ops->linear_backward(q, &unit.view, &unit.weight, &dy, &dx, true), QS_OK);
    out[1] = hash_mat(&dx, 0);
    cr_assert_eq(ops->lora_forward(q, &lora, &x, &xa, &y), QS_OK);
    out[2] = hash_mat(&y, hash_mat(&xa, 0));
    cr_assert_eq(ops->lora_backward(q, &lora, &x, &xa, &dy, &work, da, db, &dx), QS_OK);
    out[3] = hash(da, RANK * IN * 4, hash(db, RANK * OUT * 4, hash_mat(&dx, 0)));
    qs_mat *mats[] = {&x, &y, &dy, &dx, &xa, &work};
    for (size_t i = 0; i < sizeof mats / sizeof *mats; i++) {
        fx_mat_free(mats[i]);
    }
    float *rest[] = {bias, a, b, da, db};
    for (size_t i = 0; i < sizeof rest / sizeof *rest; i++) {
        free(rest[i]);
    }
    fx_unit_destroy(&unit);
}

/* Norms, a linear both ways with dropout, the gradient of the magnitudes. */
static void dora_ops(qs_queue *q, uint64_t *out)
{
    const qs_ops *ops = qs_ops_cpu();
    const fx_weight_spec spec = {QS_WEIGHT_NF4, OUT, IN, QS_BF16, true, 3, 0};
    fx_unit unit = fx_unit_create(&spec, 1);
    qs_mat x = fx_mat(ROWS, IN, 3, 2), y = fx_mat(ROWS, OUT, 1, 3), dy = fx_mat(ROWS, OUT, 0, 4);
    qs_mat dx = fx_mat(ROWS, IN, 2, 5), xa = fx_mat(ROWS, RANK, 0, 6),
           work = fx_mat(ROWS, RANK, 0, 7);
    float *a = fx_random(RANK * IN, 9), *b = fx_random(RANK * OUT, 10), *m = fx_random(OUT, 8);
    float da[RANK * IN], db[RANK * OUT], norm[OUT], gain[OUT], dm[OUT];
    int64_t sample[ROWS] = {0}, row_at[ROWS];
    for (int t = 0; t < ROWS; t++) {
        row_at[t] = t;
    }
    qs_lora lora = {.a = a, .b = b, .rank = RANK, .scale = 2.0F, .dropout = 0.1F, .seed = 1};
    lora.sample = sample;
    lora.row_at = row_at;
    cr_assert_eq(ops->dora_norms(q, &unit.view, &unit.weight, &lora, m, norm, gain), QS_OK);
    lora.norm = norm;
    lora.gain = gain;
    cr_assert_eq(ops->linear_lora_forward(q, &unit.view, &unit.weight, m, NULL, &lora, &x, &xa, &y),
                 QS_OK);
    cr_assert_eq(ops->dora_backward(q, &unit.view, &unit.weight, &lora, &x, &xa, &dy, dm), QS_OK);
    cr_assert_eq(ops->linear_lora_backward(q, &unit.view, &unit.weight, &lora, &x, &xa, &dy, &work,
                                           da, db, &dx, false),
                 QS_OK);
    *out = hash(norm, sizeof norm, hash(gain, sizeof gain, hash(dm, sizeof dm, hash_mat(&y, 0))));
    *out = hash(da, sizeof da, hash(db, sizeof db, hash_mat(&dx, *out)));
    qs_mat *mats[] = {&x, &y, &dy, &dx, &xa, &work};
    for (size_t i = 0; i < sizeof mats / sizeof *mats; i++) {
        fx_mat_free(mats[i]);
    }
    free(a);
    free(b);
    free(m);
    fx_unit_destroy(&unit);
}

static void row_ops(qs_queue *q, uint64_t out[8])
{
    const qs_ops *ops = qs_ops_cpu();
    qs_mat x = fx_mat(ROWS, IN, 3, 1), y = fx_mat(ROWS, IN, 0, 2), dy = fx_mat(ROWS, IN, 0, 3);
    qs_mat dx = fx_mat(ROWS, IN, 0, 4), z = fx_mat(ROWS, IN, 0, 5);
    float *w = fx_random(IN, 6), rstd[ROWS];
    int32_t position[ROWS];
    for (int t = 0; t < ROWS; t++) {
        position[t] = t % 7;
    }
    for (int64_t i = 0; i < ROWS * x.stride; i++) {
        qs_mat_f32(&x)[i] *= 5.0F;
    }
    cr_assert_eq(ops->rmsnorm_forward(q, &x, w, 1e-6F, rstd, &y), QS_OK);
    out[0] = hash(rstd, sizeof rstd, hash_mat(&y, 0));
    cr_assert_eq(ops->rmsnorm_backward(q, &dy, &x, w, rstd, &dx), QS_OK);
    out[1] = hash_mat(&dx, 0);
    float *cosine = fx_random(7 * 16, 7), *sine = fx_random(7 * 16, 8);
    cr_assert_eq(ops->rope(q, &x, 10, 32, 32, cosine, sine, position, false), QS_OK);
    out[2] = hash_mat(&x, 0);
    for (int glu = QS_GLU_SILU; glu <= QS_GLU_GELU_TANH; glu++) {
        cr_assert_eq(ops->glu_forward(q, (qs_glu)glu, &x, &y, &z), QS_OK);
        out[3 + 2 * glu] = hash_mat(&z, 0);
        cr_assert_eq(ops->glu_backward(q, (qs_glu)glu, &x, &y, &dy, &dy, &dx), QS_OK);
        out[4 + 2 * glu] = hash_mat(&dy, hash_mat(&dx, 0));
    }
    cr_assert_eq(ops->add(q, &x, &y, &y), QS_OK);
    cr_assert_eq(ops->scale(q, 0.3F, &y), QS_OK);
    out[7] = hash_mat(&y, 0);
    qs_mat *mats[] = {&x, &y, &dy, &dx, &z};
    for (size_t i = 0; i < sizeof mats / sizeof *mats; i++) {
        fx_mat_free(mats[i]);
    }
    free(w);
    free(cosine);
    free(sine);
}

static void attention_ops(qs_queue *q, float cap, uint64_t out[2])
{
    const qs_ops *ops = qs_ops_cpu();
    static const int32_t cu[] = {0, 1, 66, 66, ROWS};
    qs_attention_shape shape = {.n_heads = HEADS,
                                .n_kv_heads = KV_HEADS,
                                .head_dim = DIM,
                                .scale = 0.3F,
                                .cap = cap,
                                .cu_seqlens = cu,
                                .n_docs = 4};
    qs_mat qm = fx_mat(ROWS, HEADS * DIM, 0, 1), o = fx_mat(ROWS, HEADS * DIM, 0, 2);
    qs_mat km = fx_mat(ROWS, KV_HEADS * DIM, 0, 3), vm = fx_mat(ROWS, KV_HEADS * DIM, 0, 4);
    qs_mat d_o = fx_mat(ROWS, HEADS * DIM, 0, 5), dq = fx_mat(ROWS, HEADS * DIM, 0, 6);
    qs_mat dk = fx_mat(ROWS, KV_HEADS * DIM, 0, 7), dv = fx_mat(ROWS, KV_HEADS * DIM, 0, 8);
    float lse[HEADS * ROWS], delta[HEADS * ROWS];
    cr_assert_eq(ops->attention_forward(q, &shape, &qm, &km, &vm, &o, lse), QS_OK);
    out[0] = hash(lse, sizeof lse, hash_mat(&o, 0));
    cr_assert_eq(
        ops->attention_backward(q, &shape, &qm, &km, &vm, &o, lse, &d_o, delta, &dq, &dk, &dv),
        QS_OK);
    out[1] = hash_mat(&dv, hash_mat(&dk, hash_mat(&dq, 0)));
    qs_mat *mats[] = {&qm, &km, &vm, &o, &d_o, &dq, &dk, &dv};
    for (size_t i = 0; i < sizeof mats / sizeof *mats; i++) {
        fx_mat_free(mats[i]);
    }
}

static uint64_t head_op(qs_queue *q, float cap)
{
    enum { HEAD_ROWS = 45, HIDDEN = 70, VOCAB = 1200, CHUNK = 700 };
    const qs_ops *ops = qs_ops_cpu();
    int64_t size = HEAD_ROWS * HIDDEN;
    float max[HEAD_ROWS], sum[HEAD_ROWS], target_logit[HEAD_ROWS], loss[HEAD_ROWS];
    int32_t target[HEAD_ROWS];
    float *x = fx_random(size, 1), *dx = fx_random(size, 2), *o = fx_random(size, 3);
    float *w_target = fx_random(size, 4);
    for (int t = 0; t < HEAD_ROWS; t++) {
        target[t] = t * 26;
    }
    qs_head_state s = {HEAD_ROWS, HIDDEN, cap, x, target, max, sum, target_logit, o, w_target};
    for (int64_t row0 = 0; row0 < VOCAB; row0 += CHUNK) {
        int64_t rows = VOCAB - row0 < CHUNK ? VOCAB - row0 : CHUNK;
        fx_weight_spec spec = {QS_WEIGHT_RAW, rows, HIDDEN, QS_BF16, true, 2, HIDDEN};
        fx_unit unit = fx_unit_create(&spec, 50 + (uint64_t)row0);
        cr_assert_eq(ops->head_chunk(q, &unit.view, &unit.weight, row0, &s), QS_OK);
        fx_unit_destroy(&unit);
    }
    cr_assert_eq(ops->head_finish(q, &s, 0.5F, loss, dx), QS_OK);
    uint64_t h = hash(dx, size * 4, hash(loss, sizeof loss, 0));
    free(x);
    free(dx);
    free(o);
    free(w_target);
    return h;
}

static void optim_ops(qs_queue *q, uint64_t out[3])
{
    enum { CHUNKS = 21, COUNT = CHUNKS * 4096 };
    const qs_ops *ops = qs_ops_cpu();
    float *x = fx_random(COUNT, 1), *y = fx_random(COUNT, 2), *m = fx_random(COUNT, 3);
    float *v = fx_random(COUNT, 4);
    double sums[CHUNKS];
    cr_assert_eq(ops->square_sums(q, x, CHUNKS, sums), QS_OK);
    out[0] = hash(sums, sizeof sums, 0);
    cr_assert_eq(ops->accumulate(q, x, y, COUNT - 3), QS_OK);
    out[1] = hash(x, COUNT * 4, 0);
    for (int i = 0; i < COUNT; i++) {
        v[i] = fabsf(v[i]);
    }
    qs_update_args a = {QS_OPTIM_ADAMW, 1e-3, 0.9, 0.999, 1e-8, 0.1, 0.7, 0.19, 0.002};
    cr_assert_eq(ops->update(q, &a, COUNT - 3, y, x, m, v), QS_OK);
    out[2] = hash(v, COUNT * 4, hash(m, COUNT * 4, hash(x, COUNT * 4, 0)));
    free(x);
    free(y);
    free(m);
    free(v);
}

static void all_ops(qs_queue *q, uint64_t out[N_OPS])
{
    uint64_t rows[8];
    linear_ops(q, out);
    row_ops(q, rows);
    memcpy(out + 4, rows, 3 * sizeof *rows);
    attention_ops(q, 0.0F, out + 7);
    attention_ops(q, 0.2F, out + 9);
    memcpy(out + 11, rows + 3, 5 * sizeof *rows);
    out[16] = head_op(q, 0.0F);
    out[17] = head_op(q, 2.0F);
    optim_ops(q, out + 18);
    dora_ops(q, out + 21);
}

static void all_ops_with(int threads, uint64_t out[N_OPS])
{
    qs_queue *q = fx_queue(threads);
    all_ops(q, out);
    qs_queue_destroy(q);
}

static void compare(const uint64_t *a, const uint64_t *b, const char *what)
{
    for (int i = 0; i < N_OPS; i++) {
        cr_assert_eq(a[i], b[i], "%s: %s", names[i], what);
    }
}

Test(bits, do_not_depend_on_the_number_of_threads)
{
    uint64_t one[N_OPS], more[N_OPS];
    all_ops_with(1, one);
    for (int threads = 2; threads <= 5; threads++) {
        all_ops_with(threads, more);
        compare(one, more, "other bits with more threads");
    }
}

Test(bits, do_not_depend_on_the_instruction_set)
{
    const char *const isas[] = {"portable", "avx2", "avx512"};
    uint64_t first[N_OPS], other[N_OPS];
    cr_assert(qs_isa_force("portable"));
    all_ops_with(2, first);
    int more = 0;
    for (int i = 1; i < 3; i++) {
        if (qs_isa_force(isas[i])) {
            cr_assert_str_eq(qs_isa_get()->name, isas[i]);
            all_ops_with(2, other);
            compare(first, other, isas[i]);
            more++;
        }
    }
    if (more == 0) {
        cr_skip_test("this CPU runs the portable kernels only");
    }
}

static void *rank_main(void *arg)
{
    all_ops_with(2, arg);
    return NULL;
}

Test(bits, do_not_depend_on_other_ranks_in_the_process)
{
    enum { RANKS = 3 };
    uint64_t alone[N_OPS], together[RANKS][N_OPS];
    all_ops_with(1, alone);
    pthread_t thread[RANKS];
    for (int r = 0; r < RANKS; r++) {
        cr_assert_eq(pthread_create(&thread[r], NULL, rank_main, together[r]), 0);
    }
    for (int r = 0; r < RANKS; r++) {
        pthread_join(thread[r], NULL);
    }
    for (int r = 0; r < RANKS; r++) {
        compare(alone, together[r], "other bits with other ranks at work");
    }
}

Test(bits, an_unknown_instruction_set_is_refused)
{
    const char *name = qs_isa_get()->name;
    cr_assert_not(qs_isa_force("sse9"));
    cr_assert_str_eq(qs_isa_get()->name, name);
}

Test(bits, the_environment_chooses_the_instruction_set)
{
    cr_assert_eq(setenv("QSHARD_CPU_ISA", "portable", 1), 0);
    cr_assert_str_eq(qs_isa_get()->name, "portable");
}

Test(bits, scratch_stays_below_what_the_plan_is_told)
{
    const qs_ops_limits limits = {.threads = 2,
                                  .tokens = ROWS,
                                  .documents = 4,
                                  .loss_rows = 45,
                                  .widest = IN,
                                  .head_dim = DIM,
                                  .dropout = true};
    size_t told = qs_ops_cpu()->scratch_bytes(&limits);
    uint64_t out[N_OPS];
    all_ops_with(2, out);
    size_t held = qs_mem_peak_bytes(QS_MEM_HOST, QS_MEM_WORK);
    cr_assert_gt(held, 0);
    cr_assert_leq(held, told);
    cr_assert_lt(told, 2 * held, "told %zu, held %zu: not a useful bound", told, held);
}

static void count_idle(void *ctx)
{
    ++*(int *)ctx;
}

Test(bits, long_operations_let_the_communication_progress)
{
    int calls = 0;
    qs_queue *q = fx_queue(2);
    qs_queue_set_idle(q, count_idle, &calls);
    uint64_t out[N_OPS];
    for (int i = 0; i < 50 && calls == 0; i++) {
        all_ops(q, out);
    }
    cr_assert_gt(calls, 0);
    qs_queue_destroy(q);
}
