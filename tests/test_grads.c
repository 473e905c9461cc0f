/* The slot tree over ranks: the bits of one rank's sums on any number of ranks, and what the
 * buffers hold. */
#include <stdlib.h>

#include "base/mem.h"
#include "fsdp/lora_gather.h"
#include "fsdp/partials.h"
#include "fsdp_fixture.h"
#include "team.h"

static int rank_counts[] = {1, 2, 3, 4, 5, 8};
enum { N_RANK_COUNTS = sizeof rank_counts / sizeof *rank_counts };

typedef struct {
    qs_lora_layout layout;
    int64_t slots, group;
    int per_host;        /* ranks of each of several hosts: two levels; 0: one */
    bool attached;       /* reductions in the queue of the gathers */
    const float *expect; /* [n_layers * per_layer] */
    double norm;         /* of `expect` */
    fx_base base;
} tree_case;

/* ---- the plain tree of one rank ---- */

/* Sum of node (level, index) into out: left, then right if it exists. */
static void plain_node(const qs_lora_layout *layout, int layer, int64_t slots, int level,
                       int64_t index, float *out)
{
    memset(out, 0, (size_t)layout->per_layer * sizeof *out);
    if (level == 0) {
        fx_gradient(out, layout, layer, index);
        return;
    }
    plain_node(layout, layer, slots, level - 1, 2 * index, out);
    if ((2 * index + 1) << (level - 1) >= slots) {
        return;
    }
    float *right = malloc((size_t)layout->per_layer * sizeof *right);
    cr_assert_not_null(right);
    plain_node(layout, layer, slots, level - 1, 2 * index + 1, right);
    for (int64_t i = 0; i < layout->per_layer; i++) {
        out[i] += right[i];
    }
    free(right);
}

static float *plain_tree(const qs_lora_layout *layout, int64_t slots)
{
    float *out = malloc((size_t)(layout->n_layers * layout->per_layer) * sizeof *out);
    cr_assert_not_null(out);
    int level = 0;
    while (((int64_t)1 << level) < slots) {
        level++;
    }
    for (int l = 0; l < layout->n_layers; l++) {
        plain_node(layout, l, slots, level, 0, out + l * layout->per_layer);
    }
    return out;
}

/* Sums of chunks in order, as the definition has it. */
static double plain_norm(const qs_lora_layout *layout, const float *full)
{
    double sum = 0;
    for (int64_t c = 0; c < layout->n_layers * layout->chunks; c++) {
        double chunk = 0;
        for (int64_t i = 0; i < QS_LORA_CHUNK; i++) {
            double x = full[c * QS_LORA_CHUNK + i];
            chunk += x * x;
        }
        sum += chunk;
    }
    return sqrt(sum);
}

static void make_case(tree_case *t, int layers, int64_t chunks, int64_t slots, int64_t group)
{
    *t = (tree_case){.layout = fx_lora(layers, chunks), .slots = slots, .group = group};
    float *expect = plain_tree(&t->layout, slots);
    t->norm = plain_norm(&t->layout, expect);
    t->expect = expect;
    fx_base_make(&t->base, QS_BF16);
}

static void free_case(tree_case *t)
{
    free((void *)t->expect);
}

/* ---- levels ---- */

static void levels_destroy(qs_levels *levels)
{
    qs_comm_destroy(levels->inside);
    qs_comm_destroy(levels->across);
}

/* The ranks as they are, or as if each `per_host` neighbours were a host's. */
static qs_status levels_make(qs_levels *levels, team_member *me, int per_host)
{
    *levels = (qs_levels){.world = me->comm};
    if (per_host == 0) {
        return QS_OK;
    }
    QS_TRY(qs_comm_split(me->comm, me->rank / per_host, &levels->inside));
    return qs_comm_split(me->comm, me->rank % per_host, &levels->across);
}

static qs_status grads_make(qs_grads **out, const tree_case *t, const qs_levels *levels,
                            team_member *me)
{
    return qs_grads_create(out, &t->layout, qs_ops_cpu(), levels, me->queue, t->slots, t->group);
}

/* ---- bits ---- */

static qs_status one_step(team_member *me, tree_case *t, const qs_levels *levels, qs_grads *grads,
                          float *full)
{
    float *shard = NULL;
    double norm = 0;
    QS_TRY(fx_backward(grads, &t->layout, me->rank, me->nranks, t->slots, t->group));
    QS_TRY(qs_grads_finish(grads, &shard));
    QS_TRY(qs_grads_norm(grads, shard, &norm));
    QS_TRY(qs_lora_gather(&t->layout, levels, me->queue, (size_t[FX_EXCHANGE]){0}, shard, full));
    for (int64_t i = 0; i < t->layout.n_layers * t->layout.per_layer; i++) {
        TEAM_CHECK(memcmp(&full[i], &t->expect[i], sizeof *full) == 0, "element %d is %a, not %a",
                   (int)i, (double)full[i], (double)t->expect[i]);
    }
    TEAM_CHECK(norm == t->norm, "norm is %a, not %a", norm, t->norm);
    return QS_OK;
}

static qs_status tree_body(team_member *me)
{
    tree_case *t = me->ctx;
    qs_status st = QS_OK;
    qs_grads *grads = NULL;
    qs_fsdp *f = NULL;
    float *full = NULL;
    qs_levels levels = {0};
    QS_GOTO(levels_make(&levels, me, t->per_host));
    QS_GOTO(QS_ALLOC(&full, t->layout.n_layers * t->layout.per_layer, QS_MEM_LORA));
    QS_GOTO(grads_make(&grads, t, &levels, me));
    if (t->attached) {
        const qs_fsdp_options options = fx_options(1);
        QS_GOTO(qs_fsdp_create_from(&f, &t->base.index, me->comm, me->queue, &options, fx_fill,
                                    &t->base));
        qs_grads_attach(grads, f);
    }
    for (int step = 0; step < 2; step++) {
        QS_GOTO(one_step(me, t, &levels, grads, full));
        if (f != NULL) { /* a gather under way between the reductions of this step and the next */
            qs_unit_view view;
            QS_GOTO(qs_fsdp_begin(f, (const int[]){step, step + 1}, 2));
            QS_GOTO(qs_fsdp_acquire(f, step, &view));
            QS_GOTO(fx_check_view(&view, step));
            QS_GOTO(qs_fsdp_release(f, step));
        }
    }
done:
    qs_grads_destroy(grads);
    qs_fsdp_destroy(f);
    levels_destroy(&levels);
    qs_mem_free(full);
    return st;
}

/* On every way of cutting the ranks into hosts. */
static void expect_tree(int nranks, tree_case *t)
{
    for (t->per_host = 0; t->per_host < nranks; t->per_host++) {
        if (t->per_host == 0 || nranks % t->per_host == 0) {
            team_expect_ok(nranks, tree_body, t);
        }
    }
}

static const int64_t slot_counts[] = {1, 2, 3, 5, 6, 7, 8, 13, 16};
enum { N_SLOT_COUNTS = sizeof slot_counts / sizeof *slot_counts };

ParameterizedTestParameters(grads, every_rank_count_has_the_bits_of_the_plain_tree)
{
    return cr_make_param_array(int, rank_counts, N_RANK_COUNTS);
}
ParameterizedTest(int *n, grads, every_rank_count_has_the_bits_of_the_plain_tree)
{
    for (size_t s = 0; s < N_SLOT_COUNTS; s++) {
        tree_case t;
        make_case(&t, 3, 5, slot_counts[s], 1);
        for (int64_t group = 1; group <= 4; group++) {
            t.group = group;
            t.attached = group % 2 == 0;
            expect_tree(*n, &t);
        }
        free_case(&t);
    }
}

ParameterizedTestParameters(grads, ragged_and_empty_shards_have_the_bits_of_the_plain_tree)
{
    return cr_make_param_array(int, rank_counts, N_RANK_COUNTS);
}
ParameterizedTest(int *n, grads, ragged_and_empty_shards_have_the_bits_of_the_plain_tree)
{
    static const int64_t chunks[] = {1, 2, 7, 9}; /* 1 chunk, 8 ranks: seven own nothing */
    for (size_t c = 0; c < sizeof chunks / sizeof *chunks; c++) {
        for (int layers = 1; layers <= 5; layers += 4) {
            tree_case t;
            make_case(&t, layers, chunks[c], 6, 2);
            expect_tree(*n, &t);
            free_case(&t);
        }
    }
}

Test(grads, the_gradients_tell_orders_of_addition_apart)
{
    /* Else the tests above would pass with any order. */
    qs_lora_layout layout = fx_lora(1, 1);
    float *tree = plain_tree(&layout, 8);
    float *in_turn = calloc((size_t)layout.per_layer, sizeof *in_turn);
    float *grad = calloc((size_t)layout.per_layer, sizeof *grad);
    cr_assert(in_turn != NULL && grad != NULL);
    for (int64_t slot = 0; slot < 8; slot++) {
        memset(grad, 0, (size_t)layout.per_layer * sizeof *grad);
        fx_gradient(grad, &layout, 0, slot);
        for (int64_t i = 0; i < layout.per_layer; i++) {
            in_turn[i] += grad[i];
        }
    }
    int differ = 0;
    for (int64_t i = 0; i < layout.per_layer; i++) {
        differ += tree[i] != in_turn[i];
    }
    cr_expect_gt(differ, QS_LORA_CHUNK / 4, "%d", differ);
    free(tree);
    free(in_turn);
    free(grad);
}

/* ---- the vector's gather ---- */

static qs_status gather_body(team_member *me)
{
    const qs_lora_layout *layout = me->ctx;
    qs_status st = QS_OK;
    float *shard = NULL, *full = NULL;
    int64_t width = qs_lora_shard_width(layout, me->nranks);
    qs_range mine = qs_lora_shard(layout, me->rank, me->nranks);
    QS_GOTO(QS_ALLOC(&shard, layout->n_layers * width, QS_MEM_OPTIM));
    QS_GOTO(QS_ALLOC(&full, layout->n_layers * layout->per_layer, QS_MEM_LORA));
    for (int l = 0; l < layout->n_layers; l++) {
        for (int64_t i = 0; i < width; i++) { /* padding must go nowhere */
            shard[l * width + i] =
                mine.begin + i < mine.end ? (float)(l * layout->per_layer + mine.begin + i) : -1.0f;
        }
    }
    QS_GOTO(qs_lora_gather(layout, &(qs_levels){.world = me->comm}, me->queue,
                           (size_t[FX_EXCHANGE]){0}, shard, full));
    for (int64_t i = 0; i < layout->n_layers * layout->per_layer; i++) {
        if (full[i] != (float)i) {
            st = QS_FAIL(QS_ERR_BUG, "element %d is %g", (int)i, (double)full[i]);
            break;
        }
    }
done:
    qs_mem_free(shard);
    qs_mem_free(full);
    return st;
}

ParameterizedTestParameters(grads, gathered_vectors_are_in_order_without_padding)
{
    return cr_make_param_array(int, rank_counts, N_RANK_COUNTS);
}
ParameterizedTest(int *n, grads, gathered_vectors_are_in_order_without_padding)
{
    for (int64_t chunks = 1; chunks <= 9; chunks += 4) {
        qs_lora_layout layout = fx_lora(11, chunks); /* more layers than are in flight */
        team_expect_ok(*n, gather_body, &layout);
    }
}

typedef struct {
    qs_lora_layout layout;
    int per_host;
} magnitude_case;

/* Three linears' magnitudes: in one chunk, across two, across many; nothing but they is numbered.
 */
static magnitude_case magnitude_case_make(int per_host)
{
    magnitude_case c = {.layout = fx_lora(11, 9), .per_host = per_host};
    const int64_t at[] = {100, 4000, 9000}, count[] = {50, 200, 20000};
    c.layout.dora = true;
    for (int i = 0; i < QS_LINEAR_COUNT; i++) {
        c.layout.targeted[i] = i < 3;
        c.layout.in[i] = 0;
        c.layout.out[i] = i < 3 ? count[i] : 0;
        c.layout.m_at[i] = i < 3 ? at[i] : -1;
    }
    return c;
}

static qs_status magnitude_body(team_member *me)
{
    const magnitude_case *c = me->ctx;
    const qs_lora_layout *layout = &c->layout;
    qs_status st = QS_OK;
    float *shard = NULL, *send = NULL, *full = NULL;
    qs_levels levels = {0};
    const int64_t width = qs_lora_shard_width(layout, me->nranks), rows = 50 + 200 + 20000;
    const qs_range mine = qs_lora_shard(layout, me->rank, me->nranks);
    QS_GOTO(levels_make(&levels, me, c->per_host));
    QS_GOTO(QS_ALLOC(&shard, layout->n_layers * width, QS_MEM_OPTIM));
    QS_GOTO(QS_ALLOC(&send, layout->n_layers * qs_lora_magnitude_width(layout, me->nranks),
                     QS_MEM_LORA));
    QS_GOTO(QS_ALLOC(&full, layout->n_layers * rows, QS_MEM_LORA));
    TEAM_CHECK(qs_lora_magnitudes(layout) == rows, "%d magnitudes",
               (int)qs_lora_magnitudes(layout));
    for (int l = 0; l < layout->n_layers; l++) {
        int64_t number = 0;
        for (int64_t i = 0; i < width; i++) {
            shard[l * width + i] = -1.0F;
        }
        for (int i = 0; i < 3; i++) {
            for (int64_t e = layout->m_at[i]; e < layout->m_at[i] + layout->out[i]; e++) {
                const float value = (float)(l * rows + number++);
                if (e >= mine.begin && e < mine.end) {
                    shard[l * width + e - mine.begin] = value;
                }
            }
        }
    }
    QS_GOTO(qs_lora_gather_magnitudes(layout, &levels, me->queue, (size_t[FX_EXCHANGE]){0}, shard,
                                      send, full));
    for (int64_t i = 0; i < layout->n_layers * rows; i++) {
        TEAM_CHECK(full[i] == (float)i, "magnitude %d is %g", (int)i, (double)full[i]);
    }
done:
    levels_destroy(&levels);
    qs_mem_free(shard);
    qs_mem_free(send);
    qs_mem_free(full);
    return st;
}

ParameterizedTestParameters(grads, gathered_magnitudes_are_in_order)
{
    return cr_make_param_array(int, rank_counts, N_RANK_COUNTS);
}
ParameterizedTest(int *n, grads, gathered_magnitudes_are_in_order)
{
    magnitude_case c = magnitude_case_make(0);
    team_expect_ok(*n, magnitude_body, &c);
    if (*n == 4 || *n == 8) { /* hosts of two ranks: across, then inside */
        c.per_host = 2;
        team_expect_ok(*n, magnitude_body, &c);
    }
}

/* ---- what crosses between hosts ---- */

/* Bytes that ranks of this rank's number on other hosts send it in a step: their hosts' nodes of
 * the tree, cut to its shard. */
static uint64_t expected_across(const tree_case *t, const team_member *me)
{
    const qs_range shard = qs_lora_shard(&t->layout, me->rank, me->nranks);
    int64_t nodes = 0;
    for (int first = 0; first < me->nranks; first += t->per_host) {
        const int last = first + t->per_host - 1;
        const qs_range host = {qs_slots_of(t->slots, first, me->nranks).begin,
                               qs_slots_of(t->slots, last, me->nranks).end};
        qs_slot_node found[QS_SLOT_NODES_MAX];
        const bool own = me->rank >= first && me->rank <= last;
        nodes += own ? 0 : qs_slot_nodes(t->slots, host, found);
    }
    return (uint64_t)(t->layout.n_layers * nodes * (shard.end - shard.begin)) * sizeof(float);
}

static qs_status across_body(team_member *me)
{
    tree_case *t = me->ctx;
    qs_status st = QS_OK;
    qs_levels levels = {0};
    qs_grads *grads = NULL;
    float *full = NULL, *shard = NULL;
    QS_GOTO(levels_make(&levels, me, t->per_host));
    QS_GOTO(QS_ALLOC(&full, t->layout.n_layers * t->layout.per_layer, QS_MEM_LORA));
    QS_GOTO(grads_make(&grads, t, &levels, me));
    QS_GOTO(fx_backward(grads, &t->layout, me->rank, me->nranks, t->slots, t->group));
    QS_GOTO(qs_grads_finish(grads, &shard));
    const uint64_t summed = qs_comm_received_bytes(levels.across);
    TEAM_CHECK(summed == expected_across(t, me), "%d bytes of sums across, not %d", (int)summed,
               (int)expected_across(t, me));
    QS_GOTO(qs_lora_gather(&t->layout, &levels, me->queue, (size_t[FX_EXCHANGE]){0}, shard, full));
    uint64_t weights = 0;
    for (int r = me->rank % t->per_host; r < me->nranks; r += t->per_host) {
        const qs_range theirs = qs_lora_shard(&t->layout, r, me->nranks);
        weights += r == me->rank ? 0 : (uint64_t)(theirs.end - theirs.begin) * sizeof(float);
    }
    weights *= (uint64_t)t->layout.n_layers;
    const uint64_t gathered = qs_comm_received_bytes(levels.across) - summed;
    TEAM_CHECK(gathered == weights, "%d bytes of weights across, not %d", (int)gathered,
               (int)weights);
done:
    qs_grads_destroy(grads);
    levels_destroy(&levels);
    qs_mem_free(full);
    return st;
}

Test(grads, a_host_sends_its_sum_once)
{
    static const int shapes[][2] = {{4, 2}, {6, 2}, {6, 3}, {8, 4}};
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i++) {
        for (size_t s = 0; s < N_SLOT_COUNTS; s++) {
            tree_case t = {.layout = fx_lora(4, 7),
                           .slots = slot_counts[s],
                           .group = 2,
                           .per_host = shapes[i][1]};
            team_expect_ok(shapes[i][0], across_body, &t);
        }
    }
}

/* ---- memory ---- */

static qs_status memory_body(team_member *me)
{
    tree_case *t = me->ctx;
    qs_grads *grads = NULL;
    qs_levels levels;
    QS_TRY(levels_make(&levels, me, t->per_host));
    QS_TRY(qs_comm_barrier(me->comm));
    QS_TRY(grads_make(&grads, t, &levels, me));
    QS_TRY(qs_comm_barrier(me->comm)); /* all ranks of the process hold theirs */
    size_t held = qs_mem_now_bytes(QS_MEM_HOST, QS_MEM_LORA_GRAD);
    QS_TRY(qs_comm_barrier(me->comm));
    qs_grads_destroy(grads);
    levels_destroy(&levels);
    size_t n = (size_t)me->nranks;
    size_t plan = n * qs_grads_bytes(&t->layout, me->nranks, t->per_host, t->slots, t->group);
    size_t lists = n * (64 << 10); /* node lists and stacks, far below one gradient */
    TEAM_CHECK(held <= plan + lists, "%zu bytes held, %zu planned", held, plan);
    if (me->nranks == 1) {
        TEAM_CHECK(held >= plan, "%zu bytes held, %zu planned", held, plan);
    }
    return QS_OK;
}

ParameterizedTestParameters(grads, held_bytes_stay_within_the_plan)
{
    return cr_make_param_array(int, rank_counts, N_RANK_COUNTS);
}
ParameterizedTest(int *n, grads, held_bytes_stay_within_the_plan)
{
    for (size_t s = 0; s < N_SLOT_COUNTS; s++) {
        for (int64_t group = 1; group <= 16; group *= 4) {
            tree_case t = {.layout = fx_lora(6, 16), .slots = slot_counts[s], .group = group};
            team_expect_ok(*n, memory_body, &t);
            t.per_host = *n % 2 == 0 ? *n / 2 : 0;
            team_expect_ok(*n, memory_body, &t);
        }
    }
    cr_expect_eq(qs_mem_now_bytes(QS_MEM_HOST, QS_MEM_LORA_GRAD), 0);
}

Test(grads, one_pass_needs_no_copy_of_all_layers)
{
    /* 2 slots of each rank in one pass: an open gradient and a sum, and two reductions under way.
     */
    cr_expect_eq(qs_partials_buffers(80, 16, 8, 3, 2, 2), 4);
    cr_expect_eq(qs_partials_buffers(80, 8, 8, 3, 1, 2), 3);
    /* Two passes: every layer keeps the first pass's sum. */
    cr_expect_eq(qs_partials_buffers(80, 16, 8, 3, 1, 2), 81);
    /* One rank, 16 slots one by one: at most (0..7) (8..11) (12, 13) (14), and the open one. */
    cr_expect_eq(qs_partials_buffers(80, 16, 1, 0, 1, 2), 4 * 80 + 1);
    /* Ranks without a slot hold nothing. */
    cr_expect_eq(qs_partials_buffers(80, 1, 8, 0, 1, 2), 0);
}

/* ---- mistakes ---- */

static qs_status expect_bug(qs_status got, const char *what)
{
    TEAM_CHECK(got == QS_ERR_BUG, "%s: status %d", what, (int)got);
    qs_error_clear();
    return QS_OK;
}

static qs_status no_slot(qs_grads *g, int layer, int64_t slot, const char *what)
{
    float *grad = NULL;
    QS_TRY(expect_bug(qs_grads_slot(g, layer, slot, &grad), what));
    TEAM_CHECK(grad == NULL, "%s: a buffer", what);
    return QS_OK;
}

static qs_status mistakes(qs_grads *g, int64_t first)
{
    float *shard = NULL;
    QS_TRY(no_slot(g, 0, first + 1, "slot out of turn"));
    QS_TRY(no_slot(g, 3, first, "layer past the end"));
    QS_TRY(no_slot(g, -1, first, "layer -1"));
    QS_TRY(expect_bug(qs_grads_add(g, 0, first), "add without slot"));
    QS_TRY(expect_bug(qs_grads_reduce(g, 0), "reduce without slots"));
    QS_TRY(expect_bug(qs_grads_finish(g, &shard), "finish without reductions"));
    float *grad = NULL, *again = NULL;
    QS_TRY(qs_grads_slot(g, 2, first, &grad));
    QS_TRY(qs_grads_slot(g, 2, first, &again));
    TEAM_CHECK(grad != NULL && again == grad, "an open slot moves");
    QS_TRY(no_slot(g, 1, first, "two open slots"));
    QS_TRY(expect_bug(qs_grads_add(g, 1, first), "add to another layer"));
    QS_TRY(expect_bug(qs_grads_reduce(g, 2), "reduce with an open slot"));
    QS_TRY(qs_grads_add(g, 2, first));
    QS_TRY(expect_bug(qs_grads_add(g, 2, first), "add twice"));
    QS_TRY(expect_bug(qs_grads_reduce(g, 2), "reduce with a missing slot"));
    return QS_OK;
}

static qs_status mistakes_body(team_member *me)
{
    tree_case *t = me->ctx;
    qs_status st = QS_OK;
    qs_grads *grads = NULL;
    float *full = NULL;
    qs_levels levels = {0};
    QS_GOTO(levels_make(&levels, me, t->per_host));
    QS_GOTO(expect_bug(qs_grads_create(&grads, &t->layout, qs_ops_cpu(), &levels, me->queue, 0, 1),
                       "no slots"));
    QS_GOTO(QS_ALLOC(&full, t->layout.n_layers * t->layout.per_layer, QS_MEM_LORA));
    QS_GOTO(grads_make(&grads, t, &levels, me));
    QS_GOTO(mistakes(grads, qs_slots_of(t->slots, me->rank, me->nranks).begin));
    QS_GOTO(one_step(me, t, &levels, grads, full)); /* a fresh step is right again */
    /* Reduced, but not finished: the step is given up, and the next one is right. */
    QS_GOTO(fx_backward(grads, &t->layout, me->rank, me->nranks, t->slots, t->group));
    QS_GOTO(expect_bug(qs_grads_reduce(grads, 0), "reduce twice"));
    QS_GOTO(one_step(me, t, &levels, grads, full));
done:
    qs_grads_destroy(grads);
    levels_destroy(&levels);
    qs_mem_free(full);
    return st;
}

ParameterizedTestParameters(grads, mistakes_are_reported_and_end_with_the_step)
{
    return cr_make_param_array(int, rank_counts, N_RANK_COUNTS);
}
ParameterizedTest(int *n, grads, mistakes_are_reported_and_end_with_the_step)
{
    tree_case t;
    make_case(&t, 3, 3, 16, 2);
    team_expect_ok(*n, mistakes_body, &t);
    if (*n > 2 && *n % 2 == 0) {
        t.per_host = 2;
        team_expect_ok(*n, mistakes_body, &t);
    }
    free_case(&t);
}

static qs_status long_pass_body(team_member *me)
{
    qs_lora_layout *layout = me->ctx;
    qs_grads *g = NULL;
    qs_status st =
        qs_grads_create(&g, layout, qs_ops_cpu(), &(qs_levels){.world = me->comm}, me->queue, 8, 8);
    /* Counted for one pass: all slots of a layer before the next layer, each reduced at once. */
    for (int l = 0; st == QS_OK && l < layout->n_layers; l++) {
        for (int64_t slot = 0; st == QS_OK && slot < 7; slot++) {
            float *grad = NULL;
            st = qs_grads_slot(g, l, slot, &grad);
            st = st == QS_OK ? qs_grads_add(g, l, slot) : st;
        }
    }
    qs_grads_destroy(g);
    return st;
}

Test(grads, layers_out_of_the_planned_order_are_an_error_not_an_overrun)
{
    qs_lora_layout layout = fx_lora(9, 1);
    team_member member;
    team_run(&member, 1, long_pass_body, &layout);
    cr_expect_eq(member.st, QS_ERR_BUG);
    cr_expect_not_null(strstr(member.text, "buffers are taken"), "%s", member.text);
}
