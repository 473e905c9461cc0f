/* Token files: what is read is what was written, shifted inside documents; wrong files are refused
 * by field. */
#include <criterion/criterion.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "data/data.h"
#include "store/io.h"
#include "support/make_data.h"
#include "team.h"
#include "tests/scratch.h"

static char dir[SCRATCH_MAX];
static char path[128];
static const make_data_spec packed = {
    .vocab = 97, .n_sequences = 20, .min_len = 1, .max_len = 40, .max_docs = 4, .seed = 7};
static const make_data_spec plain = {
    .vocab = 50, .n_sequences = 6, .min_len = 2, .max_len = 9, .max_docs = 1, .seed = 3};

static void make_dir(void)
{
    scratch_make(dir, NULL);
    (void)snprintf(path, sizeof path, "%s/train.h5", dir);
}

static void remove_dir(void)
{
    scratch_remove(dir);
}

#define CR_OK(expr) cr_assert_eq((expr), QS_OK, "%s", qs_error_text())

TestSuite(data, .init = make_dir, .fini = remove_dir);

static qs_status open_alone(qs_data **out, int64_t vocab, int64_t seq_len)
{
    qs_comm *self = NULL;
    cr_assert_eq(qs_comm_self_create(&self), QS_OK);
    qs_status st = qs_data_open(out, path, vocab, seq_len, self);
    qs_comm_destroy(self);
    return st;
}

Test(data, every_sequence_reads_back_shifted_within_documents)
{
    make_data_arrays a = make_data_create(&packed);
    qs_data *d = NULL;
    qs_batch *b = NULL;
    CR_OK(make_data_write(path, &a));
    CR_OK(open_alone(&d, 97, 40));
    cr_assert_gt(a.n_docs, a.n_sequences, "several documents in some sequence");
    cr_assert_eq(d->n_docs, a.n_docs);
    CR_OK(qs_batch_create(&b, 40, 40));
    int64_t targets = 0;
    for (int64_t s = 0; s < a.n_sequences; s++) {
        const int64_t number = 1000 + s, begin = a.seq_offsets[s];
        CR_OK(qs_data_read(d, &s, &number, 1, b));
        cr_assert_eq(b->n_tokens, a.seq_offsets[s + 1] - begin);
        cr_assert_eq(b->n_targets, a.seq_targets[s]);
        cr_assert_eq(b->cu_seqlens[0], 0);
        cr_assert_eq(b->cu_seqlens[b->n_docs], b->n_tokens);
        targets += b->n_targets;
        int64_t doc = d->seq_first_doc[s];
        for (int64_t t = 0; t < b->n_tokens; t++) {
            const int64_t i = begin + t;
            while (a.doc_offsets[doc + 1] <= i) {
                doc++;
                cr_assert_eq(b->cu_seqlens[doc - d->seq_first_doc[s]], t);
            }
            const bool last = i + 1 == a.doc_offsets[doc + 1];
            const int32_t want = last || a.labels[i + 1] == -100 ? -1 : a.labels[i + 1];
            cr_assert_eq((uint32_t)b->tokens[t], a.tokens[i]);
            cr_assert_eq(b->target[t], want, "sequence %ld position %ld", (long)s, (long)t);
            cr_assert_eq(b->position[t], i - a.doc_offsets[doc]);
            cr_assert_eq(b->sample[t], number);
            cr_assert_eq(b->row_at[t], t);
        }
    }
    cr_assert_eq(targets, a.n_targets);
    cr_assert_eq(d->bytes_read, 8u * (uint64_t)a.n_tokens, "each token once, each label once");
    qs_batch_destroy(b);
    qs_data_close(d);
    make_data_free(&a);
}

Test(data, batches_are_ragged_and_end_to_end)
{
    make_data_arrays a = make_data_create(&packed);
    qs_data *d = NULL;
    qs_batch *b = NULL;
    const int64_t sequences[3] = {5, 0, 19}, numbers[3] = {7, 8, 9};
    CR_OK(make_data_write(path, &a));
    CR_OK(open_alone(&d, 0, 0));
    CR_OK(qs_batch_create(&b, 120, 120));
    CR_OK(qs_data_read(d, sequences, numbers, 3, b));
    cr_assert_eq(b->n_sequences, 3);
    int64_t t = 0;
    for (int i = 0; i < 3; i++) {
        for (int64_t k = a.seq_offsets[sequences[i]]; k < a.seq_offsets[sequences[i] + 1];
             k++, t++) {
            cr_assert_eq((uint32_t)b->tokens[t], a.tokens[k]);
            cr_assert_eq(b->sample[t], numbers[i]);
        }
    }
    cr_assert_eq(b->n_tokens, t);
    cr_assert_eq(b->cu_seqlens[b->n_docs], t);
    CR_OK(qs_data_read(d, sequences, numbers, 0, b));
    cr_assert_eq(b->n_tokens, 0, "a batch may be empty");
    qs_batch_destroy(b);
    CR_OK(qs_batch_create(&b, a.seq_offsets[6] - a.seq_offsets[5], 40));
    cr_assert_eq(qs_data_read(d, sequences, numbers, 2, b), QS_ERR_BUG, "two do not fit");
    qs_batch_destroy(b);
    qs_data_close(d);
    make_data_free(&a);
}

typedef struct {
    make_data_arrays *a;
} shared;

static qs_status compare_index(team_member *me)
{
    make_data_arrays *a = ((shared *)me->ctx)->a;
    qs_data *d = NULL;
    qs_batch *b = NULL;
    QS_TRY(qs_data_open(&d, path, 97, 40, me->comm));
    TEAM_CHECK(d->n_tokens == a->n_tokens && d->n_targets == a->n_targets && d->n_docs == a->n_docs,
               "totals");
    TEAM_CHECK(memcmp(d->seq_offsets, a->seq_offsets, (size_t)(a->n_sequences + 1) * 8) == 0,
               "seq_offsets");
    TEAM_CHECK(memcmp(d->doc_offsets, a->doc_offsets, (size_t)(a->n_docs + 1) * 8) == 0,
               "doc_offsets");
    TEAM_CHECK(memcmp(d->seq_targets, a->seq_targets, (size_t)a->n_sequences * 4) == 0,
               "seq_targets");
    TEAM_CHECK(strlen(d->content) == 32, "content");
    QS_TRY(qs_batch_create(&b, 40, 40));
    for (int64_t s = me->rank; s < a->n_sequences; s += me->nranks) {
        QS_TRY(qs_data_read(d, &s, &s, 1, b));
        TEAM_CHECK((uint32_t)b->tokens[0] == a->tokens[a->seq_offsets[s]], "first token");
    }
    qs_batch_destroy(b);
    qs_data_close(d);
    return QS_OK;
}

Test(data, all_ranks_get_the_index_and_read_for_themselves)
{
    make_data_arrays a = make_data_create(&packed);
    shared ctx = {&a};
    CR_OK(make_data_write(path, &a));
    for (int n = 1; n <= 5; n++) {
        team_expect_ok(n, compare_index, &ctx);
    }
    make_data_free(&a);
}

static qs_status open_missing(team_member *me)
{
    qs_data *d = NULL;
    qs_status st = qs_data_open(&d, path, 0, 0, me->comm);
    TEAM_CHECK(d == NULL, "something was opened");
    return st;
}

Test(data, a_missing_file_fails_on_all_ranks_alike)
{
    team_member members[3];
    team_run(members, 3, open_missing, NULL);
    for (int r = 0; r < 3; r++) {
        cr_assert_eq(members[r].st, QS_ERR_INPUT_MISSING, "%s", members[r].text);
    }
}

/** Write changed arrays, and expect qs_data_open to name `words`. */
static void expect_refused(make_data_arrays *a, qs_status status, const char *words)
{
    qs_data *d = NULL;
    CR_OK(make_data_write(path, a));
    cr_assert_eq(open_alone(&d, 50, 9), status, "%s: %s", words, qs_error_text());
    cr_assert_not_null(strstr(qs_error_text(), words), "%s: %s", words, qs_error_text());
    cr_assert_not_null(strstr(qs_error_text(), "train.h5"));
    cr_assert_null(d);
    qs_error_clear();
}

#define EXPECT_REFUSED(change, back, words)                                                        \
    do {                                                                                           \
        change;                                                                                    \
        expect_refused(&a, QS_ERR_INPUT_VALUE, words);                                             \
        back;                                                                                      \
    } while (0)

Test(data, wrong_index_fields_are_refused_by_name)
{
    make_data_arrays a = make_data_create(&plain);
    qs_data *d = NULL;
    const int64_t last = a.n_sequences;
    EXPECT_REFUSED(a.seq_len = 0, a.seq_len = 9, "seq_len=0");
    EXPECT_REFUSED(a.packed = 2, a.packed = 0, "packed=2");
    EXPECT_REFUSED(a.n_targets++, a.n_targets--, "n_targets=");
    EXPECT_REFUSED(a.n_targets = -1, a.n_targets = 0, "n_targets=-1");
    a.n_targets = 0;
    for (int64_t s = 0; s < last; s++) {
        a.n_targets += a.seq_targets[s];
    }
    EXPECT_REFUSED(a.seq_offsets[0] = 1, a.seq_offsets[0] = 0, "seq_offsets must run from 0");
    EXPECT_REFUSED(a.seq_offsets[last]--, a.seq_offsets[last]++, "seq_offsets must run");
    EXPECT_REFUSED(a.doc_offsets[last]++, a.doc_offsets[last]--, "doc_offsets must run");
    int64_t saved = a.seq_offsets[2];
    EXPECT_REFUSED(a.seq_offsets[2] = a.seq_offsets[1], a.seq_offsets[2] = saved, "seq_offsets[2]");
    EXPECT_REFUSED(a.seq_offsets[2] = INT64_MIN, a.seq_offsets[2] = saved, "seq_offsets[2]");
    EXPECT_REFUSED(a.seq_offsets[2] = INT64_MAX, a.seq_offsets[2] = saved, "seq_offsets[3]");
    EXPECT_REFUSED(a.seq_offsets[2]++, a.seq_offsets[2] = saved, "not a document border");
    EXPECT_REFUSED(a.doc_offsets[2] = -5, a.doc_offsets[2] = saved, "doc_offsets[2]");
    EXPECT_REFUSED(a.seq_targets[1] += 100, a.seq_targets[1] -= 100, "seq_targets[1]");
    EXPECT_REFUSED(a.seq_len = 3, a.seq_len = 9, "more than seq_len=3");
    EXPECT_REFUSED(a.vocab = 51; a.decode_count++, a.vocab = 50;
                   a.decode_count--, "the model's 50");
    a.version = 2;
    expect_refused(&a, QS_ERR_INPUT_UNKNOWN, "format_version=2");
    a.version = 1;
    CR_OK(make_data_write(path, &a));
    CR_OK(open_alone(&d, 50, 9));
    qs_data_close(d);
    cr_assert_eq(open_alone(&d, 50, 3), QS_ERR_INPUT_VALUE);
    cr_assert_not_null(strstr(qs_error_text(), "more than train.seq_len=3"), "%s", qs_error_text());
    make_data_free(&a);
}

Test(data, several_documents_in_a_file_that_is_not_packed_are_refused)
{
    make_data_arrays a = make_data_create(&packed);
    qs_data *d = NULL;
    a.packed = 0;
    CR_OK(make_data_write(path, &a));
    cr_assert_eq(open_alone(&d, 0, 0), QS_ERR_INPUT_VALUE);
    cr_assert_not_null(strstr(qs_error_text(), "packed=0"), "%s", qs_error_text());
    make_data_free(&a);
}

/** Write changed arrays; reading and verifying must name `words`. */
static void expect_bad_content(make_data_arrays *a, const char *words)
{
    qs_data *d = NULL;
    qs_batch *b = NULL;
    qs_status st = QS_OK;
    CR_OK(make_data_write(path, a));
    CR_OK(open_alone(&d, 50, 9));
    CR_OK(qs_batch_create(&b, 9, 9));
    for (int64_t s = 0; st == QS_OK && s < a->n_sequences; s++) {
        st = qs_data_read(d, &s, &s, 1, b);
    }
    cr_assert_eq(st, QS_ERR_INPUT_VALUE, "%s", words);
    cr_assert_not_null(strstr(qs_error_text(), words), "%s: %s", words, qs_error_text());
    qs_error_clear();
    cr_assert_eq(qs_data_verify(path), QS_ERR_INPUT_VALUE);
    cr_assert_not_null(strstr(qs_error_text(), words), "%s: %s", words, qs_error_text());
    qs_error_clear();
    qs_batch_destroy(b);
    qs_data_close(d);
}

Test(data, wrong_ids_labels_and_counts_are_found_when_read)
{
    make_data_arrays a = make_data_create(&plain);
    const int64_t at = a.seq_offsets[3] + 1;
    CR_OK(make_data_write(path, &a));
    CR_OK(qs_data_verify(path));
    uint32_t token = a.tokens[at];
    a.tokens[at] = 50;
    expect_bad_content(&a, "sequence 3, position 1: token id 50");
    a.tokens[at] = UINT32_MAX;
    expect_bad_content(&a, "token id 4294967295");
    a.tokens[at] = token;
    int32_t label = a.labels[at];
    a.labels[at] = -99;
    expect_bad_content(&a, "sequence 3, position 1: label -99");
    a.labels[at] = 50;
    expect_bad_content(&a, "label 50");
    a.labels[at] = label == -100 ? 1 : -100;
    expect_bad_content(&a, "seq_targets[3]");
    make_data_free(&a);
}

static void flip(int64_t at)
{
    FILE *f = fopen(path, "r+b");
    fseek(f, at, SEEK_SET);
    int c = fgetc(f);
    fseek(f, at, SEEK_SET);
    fputc(c ^ 1, f);
    fclose(f);
}

static qs_status open_and_check(team_member *me)
{
    qs_data *d = NULL;
    QS_TRY(qs_data_open(&d, path, 0, 0, me->comm));
    const qs_status st = qs_data_check_hashes(d, me->comm);
    qs_data_close(d);
    return st;
}

/* An id that another one has become is an id all the same. */
Test(data, damaged_tokens_and_labels_are_found_on_all_ranks_before_they_are_used)
{
    make_data_arrays a = make_data_create(&packed);
    team_member members[TEAM_MAX];
    qs_data *d = NULL;
    CR_OK(make_data_write(path, &a));
    CR_OK(open_alone(&d, 0, 0));
    const int64_t places[2] = {d->tokens_at + 4 * 11, d->labels_at + 4 * 11};
    qs_data_close(d);
    team_expect_ok(3, open_and_check, NULL);
    for (int i = 0; i < 2; i++) {
        flip(places[i]);
        team_run(members, 3, open_and_check, NULL);
        for (int r = 0; r < 3; r++) {
            cr_assert_eq(members[r].st, QS_ERR_INPUT_HASH, "%s", members[r].text);
        }
        flip(places[i]);
    }
    make_data_free(&a);
}

typedef struct {
    void (*change)(void);
    qs_status expected;
    int64_t token_at;
} later_change;
static later_change later;

static void change_nothing(void)
{
}

static void touch(void)
{
    cr_assert_eq(utimensat(AT_FDCWD, path, NULL, 0), 0);
}

static void change_a_token(void)
{
    flip(later.token_at);
}

static void cut_short(void)
{
    cr_assert_eq(truncate(path, later.token_at), 0);
}

static void put_another_in_its_place(void)
{
    char moved[160];
    (void)snprintf(moved, sizeof moved, "%s.old", path);
    cr_assert_eq(rename(path, moved), 0);
    CR_OK(qs_io_write_file(path, "another", 7));
}

static qs_status change_while_open(team_member *me)
{
    qs_data *d = NULL;
    QS_TRY(qs_data_open(&d, path, 0, 0, me->comm));
    qs_status st = qs_data_check_hashes(d, me->comm);
    if (st == QS_OK && qs_comm_rank(me->comm) == 0) {
        later.change();
    }
    st = st == QS_OK ? qs_comm_agree(me->comm, QS_OK) : st; /* changed for all */
    st = st == QS_OK ? qs_data_check_unchanged(d, me->comm) : st;
    qs_data_close(d);
    return st;
}

Test(data, what_is_written_over_while_it_is_open_is_found_on_all_ranks)
{
    static const later_change changes[] = {{change_nothing, QS_OK, 0},
                                           {touch, QS_OK, 0},
                                           {put_another_in_its_place, QS_OK, 0},
                                           {change_a_token, QS_ERR_INPUT_HASH, 0},
                                           {cut_short, QS_ERR_INPUT_HASH, 0}};
    const struct timespec old[2] = {{.tv_sec = 1000000000}, {.tv_sec = 1000000000}};
    for (size_t i = 0; i < sizeof changes / sizeof *changes; i++) {
        qs_data *d = NULL;
        team_member members[TEAM_MAX];
        (void)unlink(path);
        CR_OK(make_data_file(path, &packed));
        CR_OK(open_alone(&d, 0, 0));
        later = changes[i];
        later.token_at = d->tokens_at + 4 * 11;
        qs_data_close(d);
        cr_assert_eq(utimensat(AT_FDCWD, path, old, 0), 0); /* clocks of files are coarse */
        team_run(members, 3, change_while_open, NULL);
        for (int r = 0; r < 3; r++) {
            cr_assert_eq(members[r].st, later.expected, "%zu: %s", i, members[r].text);
            cr_assert(members[r].st == QS_OK ||
                          strstr(members[r].text, "was changed while the run was reading it"),
                      "%zu: %s", i, members[r].text);
        }
    }
}

static void layout_of(make_data_arrays *a, char content[33], char layout[33])
{
    qs_data *d = NULL;
    CR_OK(make_data_write(path, a));
    CR_OK(open_alone(&d, 0, 0));
    strcpy(content, d->content);
    strcpy(layout, d->layout);
    qs_data_close(d);
}

/* A resumed run is told apart by it: the same tokens with another mask train something else. */
Test(data, the_same_tokens_with_other_labels_or_borders_have_another_layout)
{
    char content[2][33], layout[3][33];
    make_data_arrays a = make_data_create(&packed);
    layout_of(&a, content[0], layout[0]);
    int at = 0;
    while (a.labels[at] < 0) { /* of a target */
        at++;
    }
    a.labels[at] ^= 1;
    layout_of(&a, content[1], layout[1]);
    cr_assert_str_eq(content[1], content[0]);
    cr_assert_str_neq(layout[1], layout[0]);
    a.labels[at] ^= 1;
    layout_of(&a, content[1], layout[2]);
    cr_assert_str_eq(layout[2], layout[0]);
    make_data_free(&a);
}

/* ---- the chat template ---- */

static const char a_template[] =
    "{% for m in messages %}\xc2\xab{{ m.content }}\xc2\xbb{% endfor %}";

static qs_status open_with_template(team_member *me)
{
    qs_data *d = NULL;
    QS_TRY(qs_data_open(&d, path, 0, 0, me->comm));
    const bool there = d->chat_template != NULL && strcmp(d->chat_template, a_template) == 0;
    qs_data_close(d);
    return there ? QS_OK : QS_FAIL(QS_ERR_BUG, "the template has not come");
}

Test(data, the_chat_template_comes_to_every_rank)
{
    make_data_arrays a = make_data_create(&packed);
    team_member members[TEAM_MAX];
    a.chat_template = a_template;
    CR_OK(make_data_write(path, &a));
    CR_OK(qs_data_verify(path));
    for (int nranks = 1; nranks <= 3; nranks++) {
        team_run(members, nranks, open_with_template, NULL);
        for (int r = 0; r < nranks; r++) {
            cr_assert_eq(members[r].st, QS_OK, "%s", members[r].text);
        }
    }
    make_data_free(&a);
}

Test(data, files_without_a_chat_template_have_none)
{
    make_data_arrays a = make_data_create(&packed);
    static const char *const hashes[] = {NULL, "00"}; /* the first files had the hash alone */
    for (size_t i = 0; i < 2; i++) {
        qs_data *d = NULL;
        a.template_sha256 = hashes[i];
        CR_OK(make_data_write(path, &a));
        CR_OK(open_alone(&d, 0, 0));
        cr_assert_null(d->chat_template);
        qs_data_close(d);
    }
    make_data_free(&a);
}

Test(data, a_chat_template_that_is_none_is_refused)
{
    enum { LIMIT = 256 << 10 };
    char *longest = malloc(LIMIT + 2);
    memset(longest, 'x', LIMIT + 1);
    longest[LIMIT + 1] = '\0';
    const struct {
        const char *text, *sha256;
        qs_status st;
        const char *says;
    } rows[] = {{longest + 1, NULL, QS_OK, ""},
                {longest, NULL, QS_ERR_INPUT_FORMAT, "has 262145 bytes; at most 262144"},
                {"", NULL, QS_OK, ""},
                {"x\xff", NULL, QS_ERR_INPUT_VALUE, "is not UTF-8"},
                {"x", "", QS_ERR_INPUT_HASH, "does not match template_sha256"},
                {"x", "00", QS_ERR_INPUT_HASH, "does not match template_sha256"}};
    make_data_arrays a = make_data_create(&packed);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        qs_data *d = NULL;
        a.chat_template = rows[i].text;
        a.template_sha256 = rows[i].sha256;
        CR_OK(make_data_write(path, &a));
        qs_error_clear();
        cr_assert_eq(open_alone(&d, 0, 0), rows[i].st, "%zu: %s", i, qs_error_text());
        cr_assert_not_null(strstr(qs_error_text(), rows[i].says), "%zu: %s", i, qs_error_text());
        cr_assert(rows[i].st != QS_OK || strcmp(d->chat_template, rows[i].text) == 0);
        qs_data_close(d);
    }
    qs_error_clear();
    make_data_free(&a);
    free(longest);
}

Test(data, verify_finds_flipped_bits_and_a_wrong_decode_table)
{
    make_data_arrays a = make_data_create(&packed);
    qs_data *d = NULL;
    CR_OK(make_data_write(path, &a));
    CR_OK(qs_data_verify(path));
    CR_OK(open_alone(&d, 0, 0));
    int64_t places[2] = {d->tokens_at + 4 * 11, d->labels_at + 4 * 11};
    qs_data_close(d);
    for (int i = 0; i < 2; i++) {
        flip(places[i]);
        cr_assert_eq(qs_data_verify(path), QS_ERR_INPUT_HASH);
        cr_assert_not_null(strstr(qs_error_text(), i == 0 ? "tokens hashes" : "labels hashes"));
        qs_error_clear();
        flip(places[i]);
        CR_OK(qs_data_verify(path));
    }
    a.decode_offsets[3] = a.decode_offsets[5];
    CR_OK(make_data_write(path, &a));
    cr_assert_eq(qs_data_verify(path), QS_ERR_INPUT_VALUE);
    cr_assert_not_null(strstr(qs_error_text(), "decode_offsets[4]"), "%s", qs_error_text());
    qs_error_clear();
    make_data_free(&a);
}

Test(data, a_file_cut_off_at_any_length_is_refused)
{
    void *bytes = NULL;
    size_t size = 0;
    CR_OK(make_data_file(path, &plain));
    CR_OK(qs_io_read_file(path, 1 << 24, &bytes, &size));
    for (size_t cut = 0; cut < size; cut += 97) {
        CR_OK(qs_io_write_file(path, bytes, cut));
        qs_status st = qs_data_verify(path);
        cr_assert_eq(st, QS_ERR_INPUT_FORMAT, "cut at %zu: %d %s", cut, (int)st, qs_error_text());
        qs_error_clear();
    }
    free(bytes);
}

Test(data, order_is_a_permutation_that_depends_on_seed_and_epoch)
{
    make_data_spec spec = packed;
    qs_data *d = NULL;
    int64_t orders[3][101];
    spec.n_sequences = 101;
    CR_OK(make_data_file(path, &spec));
    CR_OK(open_alone(&d, 0, 0));
    for (int e = 0; e < 3; e++) {
        bool seen[101] = {false};
        for (int64_t p = 0; p < 101; p++) {
            int64_t s = qs_data_order(d, e == 2 ? 43 : 42, e == 1, p);
            cr_assert(s >= 0 && s < 101 && !seen[s]);
            seen[s] = true;
            orders[e][p] = s;
            cr_assert_eq(s, qs_data_order(d, e == 2 ? 43 : 42, e == 1, p), "a pure function");
        }
    }
    cr_assert_neq(memcmp(orders[0], orders[1], sizeof orders[0]), 0);
    cr_assert_neq(memcmp(orders[0], orders[2], sizeof orders[0]), 0);
    qs_data_close(d);
}

Test(data, longest_bounds_every_run_of_samples)
{
    make_data_spec spec = plain;
    qs_data *d = NULL;
    spec.n_sequences = 5;
    spec.max_len = 1000; /* no two alike */
    CR_OK(make_data_file(path, &spec));
    CR_OK(open_alone(&d, 0, 0));
    for (int64_t count = 1; count <= 17; count++) {
        int64_t most_tokens = 0, most_targets = 0;
        for (uint64_t seed = 0; seed < 400; seed++) {
            for (int64_t first = 0; first < 5; first++) {
                int64_t tokens = 0, targets = 0;
                for (int64_t i = first; i < first + count; i++) {
                    int64_t s = qs_data_order(d, seed, i / 5, i % 5);
                    tokens += d->seq_offsets[s + 1] - d->seq_offsets[s];
                    targets += d->seq_targets[s];
                }
                most_tokens = tokens > most_tokens ? tokens : most_tokens;
                most_targets = targets > most_targets ? targets : most_targets;
            }
        }
        cr_assert_leq(most_tokens, qs_data_longest(d, count), "count %ld", (long)count);
        cr_assert_leq(most_targets, qs_data_most_targets(d, count), "count %ld", (long)count);
        cr_assert_leq(qs_data_longest(d, count), count * 1000);
    }
    qs_data_close(d);
}

static int descending(const void *a, const void *b)
{
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x < y) - (x > y);
}

/* Lengths with many alike; the longest ones, each as often as epochs border on each other. */
Test(data, longest_is_the_sum_of_the_longest)
{
    make_data_spec spec = plain;
    qs_data *d = NULL;
    int64_t lengths[60], targets[60];
    spec.n_sequences = 60;
    spec.min_len = 2;
    spec.max_len = 30;
    CR_OK(make_data_file(path, &spec));
    CR_OK(open_alone(&d, 0, 0));
    for (int s = 0; s < 60; s++) {
        lengths[s] = d->seq_offsets[s + 1] - d->seq_offsets[s];
        targets[s] = d->seq_targets[s];
    }
    qsort(lengths, 60, sizeof *lengths, descending);
    qsort(targets, 60, sizeof *targets, descending);
    for (int64_t count = 0; count <= 200; count++) {
        const int64_t times = count < 2 ? 1 : (count - 2) / 60 + 2;
        int64_t tokens = 0, learned = 0, left = count;
        for (int i = 0; i < 60 && left > 0; i++) {
            const int64_t take = left < times ? left : times;
            tokens += take * lengths[i];
            learned += take * targets[i];
            left -= take;
        }
        cr_assert_eq(qs_data_longest(d, count), tokens, "count %ld", (long)count);
        cr_assert_eq(qs_data_most_targets(d, count), learned, "count %ld", (long)count);
    }
    qs_data_close(d);
}

/* A rank that lacks memory must not come to other sizes than its peers, who would then send it
 * messages of another length. */
Test(data, longest_needs_no_memory)
{
    enum { N = 1 << 20 }; /* 8 MiB of numbers: malloc would have to ask the system for them */
    int64_t *offsets = malloc((N + 1) * sizeof *offsets);
    uint32_t *targets = malloc(N * sizeof *targets);
    qs_data d = {.seq_len = 1000, .n_sequences = N, .seq_offsets = offsets, .seq_targets = targets};
    struct rlimit limit;
    cr_assert(offsets != NULL && targets != NULL);
    offsets[0] = 0;
    for (int64_t s = 0; s < N; s++) {
        targets[s] = s == N / 2 ? 40 : 30;
        offsets[s + 1] = offsets[s] + (s == N / 2 ? 70 : 60);
    }
    cr_assert_eq(getrlimit(RLIMIT_AS, &limit), 0);
    const rlim_t before = limit.rlim_cur;
    limit.rlim_cur = 1 << 20; /* less than there is already: whoever asks gets none */
    cr_assert_eq(setrlimit(RLIMIT_AS, &limit), 0);
    const int64_t tokens = qs_data_longest(&d, 3), learned = qs_data_most_targets(&d, 3);
    limit.rlim_cur = before;
    cr_assert_eq(setrlimit(RLIMIT_AS, &limit), 0);
    cr_assert_eq(tokens, 2 * 70 + 60);
    cr_assert_eq(learned, 2 * 40 + 30);
    free(offsets);
    free(targets);
}

Test(data, prompts_have_no_targets)
{
    make_data_spec spec = plain;
    qs_data *d = NULL;
    spec.prompts = true;
    CR_OK(make_data_file(path, &spec));
    CR_OK(qs_data_verify(path));
    CR_OK(open_alone(&d, 50, 0));
    cr_assert_eq(d->n_targets, 0);
    qs_data_close(d);
}

Test(data, the_decode_table_gives_the_bytes_of_an_id)
{
    qs_decode_table t;
    CR_OK(make_data_file(path, &plain));
    CR_OK(qs_decode_table_read(&t, path));
    cr_assert_eq(t.vocab, 50);
    cr_assert_eq(t.offsets[43] - t.offsets[42], 4);
    cr_assert_eq(memcmp(t.bytes + t.offsets[42], "<42>", 4), 0);
    qs_decode_table_free(&t);
    CR_OK(qs_io_write_file(path, "x", 1));
    cr_assert_eq(qs_decode_table_read(&t, path), QS_ERR_INPUT_FORMAT);
    cr_assert_null(t.offsets);
}

Test(data, description_brackets_what_is_not_learned)
{
    make_data_spec spec = {
        .vocab = 5, .n_sequences = 1, .min_len = 4, .max_len = 4, .max_docs = 1, .seed = 1};
    make_data_arrays a = make_data_create(&spec);
    static const uint32_t tokens[4] = {1, 2, 3, 4};
    static const int32_t labels[4] = {-100, -100, 3, 4};
    char text[4096] = "";
    for (int i = 0; i < 4; i++) {
        a.tokens[i] = tokens[i];
        a.labels[i] = labels[i];
    }
    a.seq_targets[0] = 2;
    a.n_targets = 2;
    CR_OK(make_data_write(path, &a));
    FILE *out = fmemopen(text, sizeof text, "w");
    CR_OK(qs_data_describe(path, out));
    fclose(out);
    cr_assert_not_null(strstr(text, "⟦<1><2>⟧<3><4>\n"), "%s", text);
    cr_assert_not_null(strstr(text, "tokens learned   2 (50.0 %)"), "%s", text);
    make_data_free(&a);
}
