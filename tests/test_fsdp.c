/* Sharded units: what a rank sees between acquire and release, the two buffers, and embedding rows
 * by all-to-all. */
#include <unistd.h>

#include "base/mem.h"
#include "fsdp_fixture.h"
#include "mpirun.h"
#include "team.h"

static int rank_counts[] = {1, 2, 3, 4, 5, 8};
enum { N_RANK_COUNTS = sizeof rank_counts / sizeof *rank_counts };

static qs_status open_base(qs_fsdp **out, team_member *me, fx_base *base, int64_t max_tokens)
{
    const qs_fsdp_options options = fx_options(max_tokens);
    return qs_fsdp_create_from(out, &base->index, me->comm, me->queue, &options, fx_fill, base);
}

static qs_status acquire_checked(qs_fsdp *f, int u)
{
    qs_unit_view view;
    QS_TRY(qs_fsdp_acquire(f, u, &view));
    return fx_check_view(&view, u);
}

static qs_status visit(qs_fsdp *f, int u)
{
    QS_TRY(acquire_checked(f, u));
    return qs_fsdp_release(f, u);
}

/* The first `visited` uses of an order of `count`. */
static qs_status visit_some(qs_fsdp *f, const int *order, int count, int visited)
{
    QS_TRY(qs_fsdp_begin(f, order, count));
    for (int i = 0; i < visited; i++) {
        QS_TRY(visit(f, order[i]));
    }
    return QS_OK;
}

#define VISIT_ALL(f, ...)                                                                          \
    visit_some((f), (const int[]){__VA_ARGS__}, sizeof((const int[]){__VA_ARGS__}) / sizeof(int),  \
               sizeof((const int[]){__VA_ARGS__}) / sizeof(int))

/* ---- gathers ---- */

/* Layers up, head chunks, layers down, as a training pass does. */
static qs_status one_pass(qs_fsdp *f)
{
    return VISIT_ALL(f, 0, 1, 2, 3, 4, 5, 6, 3, 2, 1, 0);
}

static qs_status pass_body(team_member *me)
{
    qs_status st = QS_OK;
    qs_fsdp *f = NULL;
    QS_TRY(open_base(&f, me, me->ctx, 1));
    for (int i = 0; i < 3; i++) {
        QS_GOTO(one_pass(f));
    }
done:
    qs_fsdp_destroy(f);
    return st;
}

ParameterizedTestParameters(fsdp, a_gathered_unit_holds_every_quantum)
{
    return cr_make_param_array(int, rank_counts, N_RANK_COUNTS);
}
ParameterizedTest(int *n, fsdp, a_gathered_unit_holds_every_quantum)
{
    fx_base base;
    fx_base_make(&base, QS_BF16);
    team_expect_ok(*n, pass_body, &base);
}

static qs_status turn_body(team_member *me)
{
    qs_status st = QS_OK;
    qs_fsdp *f = NULL;
    QS_TRY(open_base(&f, me, me->ctx, 1));
    uint64_t received = qs_comm_received_bytes(me->comm);
    QS_GOTO(VISIT_ALL(f, 0, 1, 2, 3, 3, 2, 1, 0));
    received = qs_comm_received_bytes(me->comm) - received;
    qs_fsdp_stats stats = qs_fsdp_get_stats(f);
    /* up: 0 1 2 3; at the turn 3 and 2 still lie in the buffers; down: 1 0 */
    uint64_t expected = me->nranks == 1 ? 0 : FX_LAYERS + 2;
    uint64_t bytes = 0;
    for (int i = 0; me->nranks > 1 && i < FX_LAYERS + 2; i++) {
        int u = i < FX_LAYERS ? i : i - FX_LAYERS;
        bytes += (uint64_t)(me->nranks - 1) * f->layouts[u].message_bytes;
    }
    if (stats.gathers != expected || stats.gathered_bytes != bytes || received != bytes) {
        st = QS_FAIL(QS_ERR_BUG, "%d gathers of %d bytes (%d received), expected %d of %d",
                     (int)stats.gathers, (int)stats.gathered_bytes, (int)received, (int)expected,
                     (int)bytes);
    }
done:
    qs_fsdp_destroy(f);
    return st;
}

ParameterizedTestParameters(fsdp, units_still_in_a_buffer_are_not_gathered_again)
{
    return cr_make_param_array(int, rank_counts, N_RANK_COUNTS);
}
ParameterizedTest(int *n, fsdp, units_still_in_a_buffer_are_not_gathered_again)
{
    fx_base base;
    fx_base_make(&base, QS_BF16);
    team_expect_ok(*n, turn_body, &base);
}

static qs_status detour_body(team_member *me)
{
    qs_status st = QS_OK;
    qs_fsdp *f = NULL;
    QS_TRY(open_base(&f, me, me->ctx, 1));
    QS_GOTO(visit_some(f, (const int[]){0, 3, 2}, 3, 1)); /* 3 is gathered for nothing */
    QS_GOTO(visit_some(f, (const int[]){1, 5, 2}, 3, 1)); /* and so is 5 */
    QS_GOTO(VISIT_ALL(f, 2, 2, 5, 5));
    QS_GOTO(qs_fsdp_begin(f, (const int[]){0, 4}, 2));
    QS_GOTO(acquire_checked(f, 0)); /* the gather of 4 is left in flight at destroy */
done:
    qs_fsdp_destroy(f);
    return st;
}

ParameterizedTestParameters(fsdp, an_order_that_is_given_up_changes_no_byte)
{
    return cr_make_param_array(int, rank_counts, N_RANK_COUNTS);
}
ParameterizedTest(int *n, fsdp, an_order_that_is_given_up_changes_no_byte)
{
    fx_base base;
    fx_base_make(&base, QS_BF16);
    team_expect_ok(*n, detour_body, &base);
}

static qs_status two_held_body(team_member *me)
{
    qs_status st = QS_OK;
    qs_fsdp *f = NULL;
    qs_unit_view first, second, again;
    QS_TRY(open_base(&f, me, me->ctx, 1));
    QS_GOTO(qs_fsdp_begin(f, (const int[]){0, 1, 0, 2}, 4));
    QS_GOTO(qs_fsdp_acquire(f, 0, &first));
    QS_GOTO(qs_fsdp_acquire(f, 1, &second)); /* no room for 2 yet */
    QS_GOTO(qs_fsdp_acquire(f, 0, &again));
    QS_GOTO(fx_check_view(&first, 0));
    QS_GOTO(fx_check_view(&second, 1));
    if (again.base != first.base) {
        st = QS_FAIL(QS_ERR_BUG, "a held unit has moved");
        goto done;
    }
    QS_GOTO(qs_fsdp_release(f, 0));
    QS_GOTO(qs_fsdp_release(f, 1));
    QS_GOTO(visit(f, 2));
    QS_GOTO(fx_check_view(&first, 0)); /* held twice, released once */
    QS_GOTO(qs_fsdp_release(f, 0));
done:
    qs_fsdp_destroy(f);
    return st;
}

ParameterizedTestParameters(fsdp, two_units_can_be_held_together)
{
    return cr_make_param_array(int, rank_counts, N_RANK_COUNTS);
}
ParameterizedTest(int *n, fsdp, two_units_can_be_held_together)
{
    fx_base base;
    fx_base_make(&base, QS_BF16);
    team_expect_ok(*n, two_held_body, &base);
}

static qs_status one_rank_body(team_member *me)
{
    qs_status st = QS_OK;
    qs_fsdp *f = NULL;
    qs_unit_view view;
    QS_TRY(open_base(&f, me, me->ctx, 1));
    QS_GOTO(qs_fsdp_begin(f, (const int[]){1, 2}, 2));
    QS_GOTO(qs_fsdp_acquire(f, 1, &view));
    if (view.base != f->share[1] || f->stats.gathers != 0 ||
        qs_mem_now_bytes(QS_MEM_HOST, QS_MEM_BASE_GATHER) != 0) {
        st = QS_FAIL(QS_ERR_BUG, "one rank copies its unit");
    }
done:
    qs_fsdp_destroy(f);
    return st;
}

Test(fsdp, one_rank_sees_its_share_without_a_copy)
{
    fx_base base;
    fx_base_make(&base, QS_BF16);
    team_expect_ok(1, one_rank_body, &base);
}

typedef struct {
    fx_base base;
    /* Not the communicator's: any call of it moves everything along. */
    pthread_barrier_t all_started;
} idle_case;

/* Poll by the compute queue's idle callback alone until the prefetched unit lies in its buffer. */
static qs_status idle_body(team_member *me)
{
    idle_case *t = me->ctx;
    qs_status st = QS_OK;
    qs_fsdp *f = NULL;
    qs_unit_view view;
    QS_TRY(open_base(&f, me, &t->base, 1));
    QS_GOTO(qs_fsdp_begin(f, (const int[]){0, 1}, 2));
    QS_GOTO(qs_fsdp_acquire(f, 0, &view));
    pthread_barrier_wait(&t->all_started);
    qs_gather_buffer *other = &f->buffers[qs_gather_plan_buffer_of(&f->plan, 1)];
    qs_unit_view ahead = {.layout = f->layouts[1], .base = other->bytes};
    for (int i = 0; i < 100 && (st = fx_check_view(&ahead, 1)) != QS_OK; i++) {
        qs_error_clear();
        usleep(300); /* past the 200 us that lie between two calls */
        qs_queue_idle(me->queue);
    }
    if (st == QS_OK && !other->in_flight) {
        st = QS_FAIL(QS_ERR_BUG, "the gather of the next unit was waited for");
    }
done:
    qs_fsdp_destroy(f);
    return st;
}

Test(fsdp, the_compute_queue_moves_the_gather_along)
{
    idle_case t;
    fx_base_make(&t.base, QS_BF16);
    cr_assert_eq(pthread_barrier_init(&t.all_started, NULL, 3), 0);
    team_expect_ok(3, idle_body, &t);
    pthread_barrier_destroy(&t.all_started);
}

/* ---- more buffers, layers that stay ---- */

typedef struct {
    fx_base base;
    qs_fsdp_options options;
    uint64_t gathers; /* out, of two passes; the same on all ranks */
} room_case;

static qs_status room_body(team_member *me)
{
    room_case *t = me->ctx;
    qs_status st = QS_OK;
    qs_fsdp *f = NULL;
    QS_TRY(qs_fsdp_create_from(&f, &t->base.index, me->comm, me->queue, &t->options, fx_fill,
                               &t->base));
    const qs_fsdp_bytes bytes = qs_fsdp_plan(&t->base.index, me->nranks, &t->options);
    QS_GOTO(qs_comm_barrier(me->comm)); /* all ranks of the process hold theirs */
    const size_t shards = qs_mem_now_bytes(QS_MEM_HOST, QS_MEM_BASE_SHARD);
    const size_t gathers = qs_mem_now_bytes(QS_MEM_HOST, QS_MEM_BASE_GATHER);
    if (shards != (size_t)me->nranks * bytes.device_shard_bytes ||
        gathers != (size_t)me->nranks * bytes.gather_bytes) {
        st = QS_FAIL(QS_ERR_BUG, "held %zu and %zu bytes, planned %zu and %zu a rank", shards,
                     gathers, bytes.device_shard_bytes, bytes.gather_bytes);
        goto done;
    }
    QS_GOTO(one_pass(f));
    QS_GOTO(one_pass(f));
    int64_t most = (int64_t)qs_fsdp_get_stats(f).gathers;
    QS_GOTO(qs_comm_max_i64(me->comm, &most, 1));
    TEAM_CHECK((uint64_t)most == qs_fsdp_get_stats(f).gathers, "ranks gather differently");
    if (me->rank == 0) {
        t->gathers = (uint64_t)most;
    }
done:
    qs_fsdp_destroy(f);
    return st;
}

ParameterizedTestParameters(fsdp, room_saves_gathers)
{
    return cr_make_param_array(int, rank_counts, N_RANK_COUNTS);
}
ParameterizedTest(int *n, fsdp, room_saves_gathers)
{
    uint64_t before = 0;
    for (int64_t keep = 0; keep <= FX_LAYERS + 1; keep++) {
        for (int64_t prefetch = 1; prefetch <= FX_UNITS; prefetch++) {
            room_case t = {.options = fx_options(1)};
            t.options.keep_resident = keep;
            t.options.prefetch = prefetch;
            fx_base_make(&t.base, QS_BF16);
            team_expect_ok(*n, room_body, &t);
            const int layers = keep < FX_LAYERS ? FX_LAYERS - (int)keep : 0;
            if (*n == 1) {
                cr_expect_eq(t.gathers, 0);
            } else if (prefetch >= layers + FX_CHUNKS - 1) { /* room for all: once, for good */
                cr_expect_eq(t.gathers, layers + FX_CHUNKS, "%d %d: %d", (int)keep, (int)prefetch,
                             (int)t.gathers);
            } else {
                cr_expect(prefetch == 1 || t.gathers <= before, "%d %d: %d after %d", (int)keep,
                          (int)prefetch, (int)t.gathers, (int)before);
            }
            if (*n > 1 && keep == 0 && prefetch == 1) { /* 0 and 1 are there for the second pass */
                cr_expect_eq(t.gathers, (4 + 3 + 4) + (2 + 3 + 4), "%d", (int)t.gathers);
            }
            before = t.gathers;
        }
    }
}

/* ---- mistakes and failures ---- */

static qs_status expect_bug(qs_status got, const char *what)
{
    if (got != QS_ERR_BUG) {
        return QS_FAIL(QS_ERR_BUG, "%s: status %d", what, (int)got);
    }
    qs_error_clear();
    return QS_OK;
}

static qs_status misuse_body(team_member *me)
{
    qs_status st = QS_OK;
    qs_fsdp *f = NULL;
    qs_unit_view view;
    QS_TRY(open_base(&f, me, me->ctx, 1));
    QS_GOTO(expect_bug(qs_fsdp_release(f, 0), "release before acquire"));
    QS_GOTO(expect_bug(qs_fsdp_acquire(f, 0, &view), "acquire without an order"));
    QS_GOTO(expect_bug(qs_fsdp_begin(f, (const int[]){FX_UNITS}, 1), "unit past the end"));
    QS_GOTO(expect_bug(qs_fsdp_begin(f, (const int[]){0, -1}, 2), "unit -1"));
    QS_GOTO(expect_bug(qs_fsdp_begin(f, (const int[]){0}, 3 * FX_UNITS + 1), "too long an order"));
    QS_GOTO(qs_fsdp_begin(f, (const int[]){0, 1, 2}, 3));
    QS_GOTO(expect_bug(qs_fsdp_acquire(f, 1, &view), "out of order"));
    QS_GOTO(qs_fsdp_acquire(f, 0, &view));
    QS_GOTO(qs_fsdp_acquire(f, 1, &view));
    if (me->nranks > 1) {
        QS_GOTO(expect_bug(qs_fsdp_acquire(f, 2, &view), "third unit"));
    }
    QS_GOTO(qs_fsdp_release(f, 0));
    QS_GOTO(expect_bug(qs_fsdp_release(f, 0), "second release"));
    QS_GOTO(visit(f, 2)); /* and it still works */
done:
    qs_fsdp_destroy(f);
    return st;
}

ParameterizedTestParameters(fsdp, misuse_is_reported_and_harmless)
{
    return cr_make_param_array(int, rank_counts, N_RANK_COUNTS);
}
ParameterizedTest(int *n, fsdp, misuse_is_reported_and_harmless)
{
    fx_base base;
    fx_base_make(&base, QS_BF16);
    team_expect_ok(*n, misuse_body, &base);
}

static qs_status fail_on_last_rank(void *ctx, int u, int rank, int nranks, uint8_t *message,
                                   uint64_t *bytes_read)
{
    if (rank == nranks - 1 && u == 2) {
        return QS_FAIL(QS_ERR_INPUT_HASH, "unit %d, quantum 0: hash differs", u);
    }
    return fx_fill(ctx, u, rank, nranks, message, bytes_read);
}

static qs_status damaged_body(team_member *me)
{
    fx_base *base = me->ctx;
    qs_fsdp *f = NULL;
    const qs_fsdp_options options = fx_options(1);
    qs_status st = qs_fsdp_create_from(&f, &base->index, me->comm, me->queue, &options,
                                       fail_on_last_rank, base);
    TEAM_CHECK(f == NULL, "a failed create leaves an object");
    return st;
}

static qs_status missing_body(team_member *me)
{
    fx_base *base = me->ctx;
    qs_fsdp *f = NULL;
    const qs_fsdp_options options = fx_options(1);
    return qs_fsdp_create(&f, &base->index, me->comm, me->queue, &options);
}

ParameterizedTestParameters(fsdp, one_ranks_bad_share_is_everyones_error)
{
    return cr_make_param_array(int, rank_counts, N_RANK_COUNTS);
}
ParameterizedTest(int *n, fsdp, one_ranks_bad_share_is_everyones_error)
{
    fx_base base;
    team_member members[TEAM_MAX];
    fx_base_make(&base, QS_BF16);
    team_run(members, *n, damaged_body, &base);
    for (int r = 0; r < *n; r++) {
        cr_expect_eq(members[r].st, QS_ERR_INPUT_HASH, "rank %d: %s", r, members[r].text);
    }
    team_run(members, *n, missing_body, &base);
    for (int r = 0; r < *n; r++) {
        cr_expect_eq(members[r].st, QS_ERR_INPUT_MISSING, "rank %d: %s", r, members[r].text);
    }
}

/* ---- sizes ---- */

static qs_status sizes_body(team_member *me)
{
    fx_base *base = me->ctx;
    qs_fsdp *f = NULL;
    QS_TRY(open_base(&f, me, base, 1));
    qs_status st = qs_comm_barrier(me->comm); /* all ranks of the process hold theirs */
    size_t shards = 0;
    const qs_fsdp_options options = fx_options(1);
    const qs_fsdp_bytes bytes = qs_fsdp_plan(&base->index, me->nranks, &options);
    shards = (size_t)me->nranks * bytes.device_shard_bytes;
    size_t gathers = (size_t)me->nranks * bytes.gather_bytes;
    if (st == QS_OK && (qs_mem_now_bytes(QS_MEM_HOST, QS_MEM_BASE_SHARD) != shards ||
                        qs_mem_now_bytes(QS_MEM_HOST, QS_MEM_BASE_GATHER) != gathers)) {
        st = QS_FAIL(QS_ERR_BUG, "held %zu and %zu bytes, planned %zu and %zu",
                     qs_mem_now_bytes(QS_MEM_HOST, QS_MEM_BASE_SHARD),
                     qs_mem_now_bytes(QS_MEM_HOST, QS_MEM_BASE_GATHER), shards, gathers);
    }
    int64_t read = (int64_t)f->stats.read_bytes, whole = 0;
    if (st == QS_OK) {
        st = qs_comm_sum_i64(me->comm, &read, 1);
    }
    for (int u = 0; u < FX_UNITS; u++) {
        const qs_unit_size *size = &base->units[u].size;
        whole += size->nf4_quanta * (8192 + 256 + 4) +
                 size->raw_quanta * (int64_t)qs_raw_quantum_bytes(size);
    }
    if (st == QS_OK && read != whole) {
        st = QS_FAIL(QS_ERR_BUG, "all ranks read %d bytes of %d", (int)read, (int)whole);
    }
    qs_fsdp_destroy(f);
    return st;
}

ParameterizedTestParameters(fsdp, held_bytes_are_the_plan_and_nobody_reads_anothers_share)
{
    return cr_make_param_array(int, rank_counts, N_RANK_COUNTS);
}
ParameterizedTest(int *n, fsdp, held_bytes_are_the_plan_and_nobody_reads_anothers_share)
{
    fx_base base;
    fx_base_make(&base, QS_BF16);
    team_expect_ok(*n, sizes_body, &base);
    for (int class = 0; class < QS_MEM_CLASS_COUNT; class ++) {
        cr_expect_eq(qs_mem_now_bytes(QS_MEM_HOST, (qs_mem_class) class), 0, "%s is not freed",
                     qs_mem_class_name((qs_mem_class) class));
    }
}

/* ---- embedding ---- */

typedef struct {
    fx_base base;
    int64_t count; /* of the first call; it grows from call to call */
    int bad_rank;  /* asks for an id outside the vocabulary; -1: none */
    qs_status (*calls)(qs_fsdp *f, team_member *me);
} embed_case;

enum { EMBED_CALLS = 4, EMBED_MOST = 600 };

/* What a rank asks for in call `call`: some ask for nothing. */
static int64_t embed_tokens(const embed_case *t, int rank, int call, int32_t *tokens)
{
    const qs_rng rng = qs_rng_make(5, (uint64_t)call, (uint64_t)rank, 1, 0);
    const int64_t count = (rank + call) % 3 == 2 ? 0 : t->count * (call + 1);
    for (int64_t i = 0; i < count; i++) {
        tokens[i] = (int32_t)(qs_rng_u32(&rng, (uint64_t)i) % FX_VOCAB);
    }
    if (rank == t->bad_rank && call == 1) {
        tokens[count / 2] = FX_VOCAB;
    }
    return count;
}

static qs_status ask(qs_fsdp *f, team_member *me, int call)
{
    int32_t tokens[EMBED_MOST];
    const int64_t count = embed_tokens(me->ctx, me->rank, call, tokens);
    QS_TRY(qs_fsdp_embed_ask(f, tokens, count));
    memset(tokens, 0xff, sizeof tokens); /* nobody looks at them any more */
    return QS_OK;
}

static qs_status place_checked(qs_fsdp *f, team_member *me, int call)
{
    int32_t tokens[EMBED_MOST];
    float rows[EMBED_MOST * FX_HIDDEN];
    const int64_t count = embed_tokens(me->ctx, me->rank, call, tokens);
    memset(rows, 0xff, sizeof rows);
    QS_TRY(qs_fsdp_embed_place(f, QS_F32, rows));
    return fx_check_rows(tokens, count, rows);
}

static qs_status embed_calls(qs_fsdp *f, team_member *me)
{
    for (int call = 0; call < EMBED_CALLS; call++) {
        QS_TRY(ask(f, me, call));
        QS_TRY(place_checked(f, me, call));
        const int order[] = {call, call + 1};
        QS_TRY(visit_some(f, order, 2, 1)); /* gathers under way beside the exchanges */
    }
    return QS_OK;
}

/* Rows of one call are on their way, and ids of the next, while units are used. */
static qs_status embed_ahead(qs_fsdp *f, team_member *me)
{
    QS_TRY(ask(f, me, 0));
    QS_TRY(qs_fsdp_embed_answer(f));
    for (int call = 0; call < EMBED_CALLS; call++) {
        if (call + 1 < EMBED_CALLS) {
            QS_TRY(ask(f, me, call + 1));
        }
        TEAM_CHECK(qs_fsdp_embed_open(f) == (call + 1 < EMBED_CALLS ? 2 : 1), "call %d: %d open",
                   call, qs_fsdp_embed_open(f));
        const int order[] = {call, call + 1};
        QS_TRY(visit_some(f, order, 2, 1));
        QS_TRY(place_checked(f, me, call));
        QS_TRY(qs_fsdp_embed_answer(f));
        QS_TRY(qs_fsdp_embed_answer(f)); /* the second time it has nothing to do */
    }
    QS_TRY(qs_fsdp_embed_answer(f)); /* nor without a request */
    return ask(f, me, 0);            /* left under way at destroy */
}

static qs_status embed_misuse(qs_fsdp *f, team_member *me)
{
    float rows[EMBED_MOST * FX_HIDDEN];
    TEAM_CHECK(qs_fsdp_embed_place(f, QS_F32, rows) == QS_ERR_BUG, "rows without a request");
    QS_TRY(ask(f, me, 0));
    TEAM_CHECK(qs_fsdp_embed(f, NULL, 0, rows) == QS_ERR_BUG, "past an open request");
    QS_TRY(ask(f, me, 2));
    TEAM_CHECK(qs_fsdp_embed_ask(f, NULL, 0) == QS_ERR_BUG, "a third request");
    QS_TRY(place_checked(f, me, 0));
    return place_checked(f, me, 2);
}

static qs_status embed_body(team_member *me)
{
    embed_case *t = me->ctx;
    qs_fsdp *f = NULL;
    /* Room for just the largest call: with few tokens and many ranks some rows take several rounds.
     */
    QS_TRY(open_base(&f, me, &t->base, 4 * t->count));
    qs_status st = t->calls(f, me);
    qs_fsdp_destroy(f);
    return st;
}

ParameterizedTestParameters(fsdp, every_token_gets_its_row)
{
    return cr_make_param_array(int, rank_counts, N_RANK_COUNTS);
}
ParameterizedTest(int *n, fsdp, every_token_gets_its_row)
{
    static const qs_dtype dtypes[] = {QS_BF16, QS_F16, QS_F32};
    static const int64_t counts[] = {1, 3, 150}; /* 150: every id several times */
    qs_status (*const calls[])(qs_fsdp *, team_member *) = {embed_calls, embed_ahead};
    for (size_t d = 0; d < sizeof dtypes / sizeof *dtypes; d++) {
        for (size_t c = 0; c < sizeof counts / sizeof *counts; c++) {
            for (size_t k = 0; k < sizeof calls / sizeof *calls; k++) {
                embed_case t = {.count = counts[c], .bad_rank = -1, .calls = calls[k]};
                fx_base_make(&t.base, dtypes[d]);
                team_expect_ok(*n, embed_body, &t);
            }
        }
    }
}

ParameterizedTestParameters(fsdp, requests_out_of_order_are_refused)
{
    return cr_make_param_array(int, rank_counts, N_RANK_COUNTS);
}
ParameterizedTest(int *n, fsdp, requests_out_of_order_are_refused)
{
    embed_case t = {.count = 7, .bad_rank = -1, .calls = embed_misuse};
    fx_base_make(&t.base, QS_BF16);
    team_expect_ok(*n, embed_body, &t);
}

ParameterizedTestParameters(fsdp, a_token_outside_the_vocabulary_is_everyones_error)
{
    return cr_make_param_array(int, rank_counts, N_RANK_COUNTS);
}
ParameterizedTest(int *n, fsdp, a_token_outside_the_vocabulary_is_everyones_error)
{
    qs_status (*const calls[])(qs_fsdp *, team_member *) = {embed_calls, embed_ahead};
    for (size_t k = 0; k < sizeof calls / sizeof *calls; k++) {
        embed_case t = {.count = 7, .bad_rank = *n > 2 ? 2 : 0, .calls = calls[k]};
        team_member members[TEAM_MAX];
        fx_base_make(&t.base, QS_BF16);
        team_run(members, *n, embed_body, &t);
        for (int r = 0; r < *n; r++) {
            cr_expect_eq(members[r].st, QS_ERR_BUG, "rank %d: %d %s", r, (int)members[r].st,
                         members[r].text);
            cr_expect_not_null(strstr(members[r].text, "outside the vocabulary"), "%s",
                               members[r].text);
        }
    }
}

/* ---- the same over MPI ---- */

Test(fsdp, mpi_ranks_end_a_step_with_the_bits_of_one, .timeout = 300)
{
    static const int nranks[] = {2, 3, 5};
    static mpirun_result one, many;
    shell(&one, 60, "mpirun -np 1 %s", case_path("fsdp_step"));
    cr_assert_eq(one.code, 0, "%d: %s", one.code, one.output);
    cr_assert_eq(count_in(&one, "gradient "), 2, "%s", one.output);
    for (size_t i = 0; i < sizeof nranks / sizeof *nranks; i++) {
        shell(&many, 60, "mpirun -np %d %s", nranks[i], case_path("fsdp_step"));
        cr_expect_eq(many.code, 0, "np %d: %d: %s", nranks[i], many.code, many.output);
        cr_expect_str_eq(many.output, one.output, "np %d:\n%s\nnot:\n%s", nranks[i], many.output,
                         one.output);
    }
}
