/* Bytes from ranks that have them to ranks that do not: relay.c and seen.c. */
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/mem.h"
#include "store/io.h"
#include "store/relay.h"
#include "store/seen.h"
#include "team.h"
#include "tests/scratch.h"

enum { PIECE = 1000, OFFER = 5 * PIECE, WANTS = 7 };

/* What rank r offers at `offset`. */
static uint8_t offered(int r, int64_t offset)
{
    return (uint8_t)(offset * 31 + offset / 251 + r * 97);
}

typedef struct {
    int rank;
    int64_t fails_at; /* a read that reaches this byte fails; -1: none does */
} offer;

static qs_status read_offer(void *ctx, int64_t offset, size_t bytes, void *out)
{
    const offer *o = ctx;
    if (o->fails_at >= offset && o->fails_at < offset + (int64_t)bytes) {
        return QS_FAIL(QS_ERR_INPUT_HASH, "rank %d cannot read byte %lld", o->rank,
                       (long long)o->fails_at);
    }
    for (size_t i = 0; i < bytes; i++) {
        ((uint8_t *)out)[i] = offered(o->rank, offset + (int64_t)i);
    }
    return QS_OK;
}

/* Everybody wants something of everybody, itself included: nothing, less than a piece, a piece,
 * and several. */
static qs_status fetch_from_all(team_member *me)
{
    static const size_t sizes[WANTS] = {0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 5, 17};
    static uint8_t room[TEAM_MAX][WANTS][4 * PIECE];
    qs_relay_want wants[WANTS];
    offer mine = {.rank = me->rank, .fails_at = -1};
    memset(room[me->rank], 0, sizeof room[me->rank]);
    for (int i = 0; i < WANTS; i++) {
        wants[i] = (qs_relay_want){.from = (me->rank + i) % me->nranks,
                                   .offset = 7 * i + me->rank,
                                   .bytes = sizes[i],
                                   .to = room[me->rank][i]};
    }
    const int count = me->rank == 1 ? 0 : WANTS; /* one only serves */
    QS_TRY(qs_relay(me->comm, QS_OK, PIECE, wants, count, read_offer, &mine));
    for (int i = 0; i < count; i++) {
        for (size_t b = 0; b < sizes[i]; b++) {
            TEAM_CHECK(room[me->rank][i][b] == offered(wants[i].from, wants[i].offset + (int64_t)b),
                       "byte %zu of want %d", b, i);
        }
        TEAM_CHECK(room[me->rank][i][sizes[i]] == 0, "want %d: written past its end", i);
    }
    return QS_OK;
}

Test(seen, relay_brings_every_stretch)
{
    for (int nranks = 1; nranks <= TEAM_MAX; nranks += nranks < 4 ? 1 : 4) {
        team_expect_ok(nranks, fetch_from_all, NULL);
    }
}

/* ctx: {rank that fails, the byte or -1 for a failure before the call} */
static qs_status fetch_and_fail(team_member *me)
{
    const int64_t *fail = me->ctx;
    static uint8_t room[TEAM_MAX][OFFER];
    offer mine = {.rank = me->rank, .fails_at = me->rank == fail[0] ? fail[1] : -1};
    const qs_relay_want want = {
        .from = (int)fail[0], .offset = 0, .bytes = OFFER, .to = room[me->rank]};
    qs_status st = QS_OK;
    if (me->rank == fail[0] && fail[1] < 0) {
        st = QS_FAIL(QS_ERR_INPUT_HASH, "rank %d has failed before", me->rank);
    }
    return qs_relay(me->comm, st, PIECE, &want, me->rank == fail[0] ? 0 : 1, read_offer, &mine);
}

Test(seen, an_error_of_one_ends_the_relay_of_all)
{
    static const int64_t at[] = {-1, 0, 2 * PIECE, OFFER - 1};
    for (size_t i = 0; i < sizeof at / sizeof *at; i++) {
        int64_t fail[2] = {2, at[i]};
        team_member members[4];
        team_run(members, 4, fetch_and_fail, fail);
        for (int r = 0; r < 4; r++) {
            cr_expect_eq(members[r].st, QS_ERR_INPUT_HASH, "rank %d: %d", r, (int)members[r].st);
            cr_expect(strstr(members[r].text, "rank 2") != NULL, "rank %d: %s", r, members[r].text);
        }
    }
}

/* ---- files that some ranks do not see ---- */

enum { FILE_BYTES = 40 << 20, BLIND_FROM = 2 };

static qs_status read_hidden(team_member *me)
{
    const char *path = me->rank < BLIND_FROM ? me->ctx : "no/such/file";
    qs_seen seen;
    uint8_t *bytes = malloc(FILE_BYTES);
    int fd = -1;
    QS_TRY(qs_seen_find(&seen, path, "its ranks ask", me->comm));
    TEAM_CHECK(bytes != NULL && !seen.everywhere && !qs_seen_by_all(&seen) && !seen.simple,
               "it is hidden from some");
    TEAM_CHECK(seen.mine == (me->rank < BLIND_FROM) && seen.root == 0, "who sees it");
    TEAM_CHECK(seen.server == (seen.mine ? me->rank : (me->rank - BLIND_FROM) % BLIND_FROM),
               "server %d", seen.server);
    FILE *file = seen.mine ? fopen(path, "rb") : NULL;
    fd = file != NULL ? fileno(file) : -1;
    const qs_stretch two[] = {{.offset = 3, .bytes = FILE_BYTES - 3, .to = bytes + 3},
                              {.offset = 0, .bytes = 3, .to = bytes}};
    qs_status st = qs_seen_read(&seen, QS_OK, fd, path, two, 2);
    for (int64_t i = 0; i < FILE_BYTES && st == QS_OK; i++) {
        if (bytes[i] != offered(0, i)) {
            st = QS_FAIL(QS_ERR_BUG, "byte %lld", (long long)i);
        }
    }
    if (file != NULL) {
        fclose(file);
    }
    free(bytes);
    return st;
}

Test(seen, a_hidden_file_is_read_in_bounded_memory)
{
    char dir[SCRATCH_MAX], path[SCRATCH_MAX + 16];
    scratch_make(dir, NULL);
    snprintf(path, sizeof path, "%s/file", dir);
    uint8_t *bytes = malloc(FILE_BYTES);
    cr_assert_not_null(bytes);
    for (int64_t i = 0; i < FILE_BYTES; i++) {
        bytes[i] = offered(0, i);
    }
    cr_assert_eq(qs_io_write_new(path, bytes, FILE_BYTES), QS_OK, "%s", qs_error_text());
    free(bytes);
    team_expect_ok(6, read_hidden, path);
    const size_t servers = BLIND_FROM, each = (16 << 20) + 4096;
    cr_expect_leq(qs_mem_peak_bytes(QS_MEM_HOST, QS_MEM_WORK), servers * each);
    cr_expect_geq(qs_mem_peak_bytes(QS_MEM_HOST, QS_MEM_WORK), (size_t)16 << 20);
    unlink(path);
    rmdir(dir);
}

static qs_status find_nothing(team_member *me)
{
    qs_seen seen;
    QS_TRY(qs_seen_find(&seen, "no/such/file", "nothing happens", me->comm));
    TEAM_CHECK(!seen.mine && !seen.everywhere && seen.root == 0 && seen.server == me->rank,
               "nobody sees it");
    return QS_OK;
}

Test(seen, a_file_that_nobody_sees)
{
    team_expect_ok(3, find_nothing, NULL);
}
