/* N ranks as N threads for tests. Criterion's asserts belong to the test's own thread, so a rank
 * reports by its status: the body returns QS_FAIL(...) for what it finds wrong, and the caller
 * looks at every member. */
#ifndef QS_TESTS_TEAM_H
#define QS_TESTS_TEAM_H

#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <pthread.h>
#include <stdio.h>

#include "comm/comm.h"

enum { TEAM_MAX = 8 };

typedef struct team_member team_member;
typedef qs_status (*team_body)(team_member *me);

struct team_member {
    int rank, nranks;
    qs_comm *comm;
    qs_queue *queue; /* compute */
    void *ctx;       /* the same for all */
    team_body body;
    qs_status st;
    char text[512];
};

/** Return an error from a body unless `condition` holds. */
#define TEAM_CHECK(condition, ...)                                                                 \
    do {                                                                                           \
        if (!(condition)) {                                                                        \
            return QS_FAIL(QS_ERR_BUG, __VA_ARGS__);                                               \
        }                                                                                          \
    } while (0)

static inline void *team_start(void *arg)
{
    team_member *me = arg;
    me->st = qs_queue_create(&me->queue, 1);
    if (me->st == QS_OK) {
        me->st = me->body(me);
    }
    if (me->st != QS_OK) {
        snprintf(me->text, sizeof me->text, "%s", qs_error_text());
    }
    qs_queue_destroy(me->queue);
    qs_comm_destroy(me->comm);
    return NULL;
}

/** Run `body` on `nranks` ranks and leave their results in `members[nranks]`. */
static inline void team_run(team_member *members, int nranks, team_body body, void *ctx)
{
    qs_comm *comms[TEAM_MAX];
    pthread_t threads[TEAM_MAX];
    cr_assert_leq(nranks, TEAM_MAX);
    cr_assert_eq(qs_comm_threads_create(comms, nranks), QS_OK);
    for (int r = 0; r < nranks; r++) {
        members[r] =
            (team_member){.rank = r, .nranks = nranks, .comm = comms[r], .ctx = ctx, .body = body};
        cr_assert_eq(pthread_create(&threads[r], NULL, team_start, &members[r]), 0);
    }
    for (int r = 0; r < nranks; r++) {
        pthread_join(threads[r], NULL);
    }
}

/** Run `body` and expect success of every rank. */
static inline void team_expect_ok(int nranks, team_body body, void *ctx)
{
    team_member members[TEAM_MAX];
    team_run(members, nranks, body, ctx);
    for (int r = 0; r < nranks; r++) {
        cr_expect_eq(members[r].st, QS_OK, "rank %d of %d: %d %s", r, nranks, (int)members[r].st,
                     members[r].text);
    }
}

#endif
