/* Which rank takes which GPU (src/backend/cards.h), over tables of what each rank sees. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <string.h>

#include "backend/cards.h"

enum { RANKS_MAX = 16 };

/* A letter a rank; what it sees, a digit or letter a card, in CUDA's order; what it is to take. */
typedef struct {
    const char *hosts, *want;
    const char *sees[RANKS_MAX];
} table;

static void fill(qs_cards_seen *all, const table *t)
{
    const int nranks = (int)strlen(t->hosts);
    memset(all, 0, (size_t)nranks * sizeof *all);
    for (int r = 0; r < nranks; r++) {
        for (int other = 0; other < nranks; other++) {
            all[r].local_rank += other < r && t->hosts[other] == t->hosts[r];
            all[r].local_nranks += t->hosts[other] == t->hosts[r];
        }
        for (const char *card = t->sees[r]; *card; card++) {
            all[r].ids[all[r].count++][QS_CARDS_ID_BYTES - 1] = (uint8_t)*card;
        }
    }
}

/* "0-1": the cards that ranks have chosen; '-' for none. */
static void choose(const table *t, char *got)
{
    qs_cards_seen all[RANKS_MAX];
    int chosen[RANKS_MAX];
    const int nranks = (int)strlen(t->hosts);
    fill(all, t);
    qs_cards_choose(all, nranks, chosen);
    for (int r = 0; r < nranks; r++) {
        got[r] = chosen[r] < 0 ? '-' : t->sees[r][chosen[r]];
    }
    got[nranks] = '\0';
    for (int a = 0; a < nranks; a++) {
        for (int b = 0; b < nranks; b++) {
            cr_assert_eq(qs_cards_share(all, chosen, a, b), got[a] == got[b] && got[a] != '-',
                         "%s: ranks %d and %d", got, a, b);
        }
    }
}

static void check(const table *tables, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        char got[RANKS_MAX + 1];
        choose(&tables[i], got);
        cr_expect_str_eq(got, tables[i].want, "table %zu: %s, not %s", i, got, tables[i].want);
    }
}
#define CHECK(tables) check((tables), sizeof(tables) / sizeof *(tables))

Test(cards, where_all_ranks_see_all_cards_each_takes_its_number)
{
    static const table tables[] = {
        {"a", "0", {"0"}},
        {"a", "0", {"01234567"}},
        {"aaaa", "0123", {"0123", "0123", "0123", "0123"}},
        {"aa", "01", {"0123", "0123"}},             /* cards to spare */
        {"aa", "53", {"53", "53"}},                 /* in the order of the process */
        {"aabb", "0123", {"01", "01", "23", "23"}}, /* two hosts */
        {"abab", "0213", {"01", "23", "01", "23"}}, /* in turns */
        {"aab", "012", {"01", "01", "2"}},          /* of different size */
        {"aaaaaaaaaaaaaaaa",
         "0123456789abcdef", /* the largest host of its kind */
         {"0123456789abcdef", "0123456789abcdef", "0123456789abcdef", "0123456789abcdef",
          "0123456789abcdef", "0123456789abcdef", "0123456789abcdef", "0123456789abcdef",
          "0123456789abcdef", "0123456789abcdef", "0123456789abcdef", "0123456789abcdef",
          "0123456789abcdef", "0123456789abcdef", "0123456789abcdef", "0123456789abcdef"}},
    };
    CHECK(tables);
}

Test(cards, where_each_sees_some_nobody_shares_what_another_could_have)
{
    static const table tables[] = {
        {"aaaa", "0123", {"0", "1", "2", "3"}},     /* its own alone */
        {"aaaa", "0123", {"01", "01", "23", "23"}}, /* those of its socket, ranks side by side */
        {"aaaa", "0312", {"01", "23", "01", "23"}}, /* ranks on sockets in turns */
        {"aaaa", "0231", {"0123", "1230", "2301", "3012"}}, /* its own first */
        {"aaa", "102", {"10", "01", "210"}},
        {"aaab", "0124", {"012", "012", "2", "4"}},
        {"aabb", "0132", {"01", "01", "32", "32"}},
        {"ab", "01", {"01", "01"}}, /* two containers of one machine */
    };
    CHECK(tables);
}

Test(cards, where_there_are_too_few_they_share_by_number)
{
    static const table tables[] = {
        {"aa", "00", {"0", "0"}},
        {"aaa", "010", {"01", "01", "01"}},
        {"aaaaa", "01010", {"01", "01", "01", "01", "01"}},
        {"aabb", "0122", {"01", "01", "2", "2"}},
        {"aaaa", "0121", {"01", "01", "2", "01"}},
        {"aa", "--", {"", ""}},
        {"aab", "-0-", {"", "0", ""}},
        {"aabb", "01--", {"01", "01", "", ""}},
    };
    CHECK(tables);
}
