/* Shares cover exactly; the slot tree adds in one order whatever the cut. */
#define _GNU_SOURCE /* asprintf */
#include <criterion/criterion.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "shard/shard.h"

Test(shard, shares_cover_exactly_and_owners_agree)
{
    for (int64_t total = 0; total <= 60; total++) {
        for (int nranks = 1; nranks <= 9; nranks++) {
            int64_t next = 0, width = qs_shard_width(total, nranks);
            for (int r = 0; r < nranks; r++) {
                qs_range share = qs_shard_of(total, r, nranks);
                cr_assert_eq(share.begin, next);
                cr_assert(share.end >= share.begin && share.end - share.begin <= width);
                for (int64_t i = share.begin; i < share.end; i++) {
                    cr_assert_eq(qs_shard_owner(total, i, nranks), r);
                }
                next = share.end;
            }
            cr_assert_eq(next, total);
            cr_assert(width * nranks >= total && (total == 0 || width * nranks < total + nranks));
        }
    }
}

Test(shard, huge_totals_do_not_overflow)
{
    const int64_t total = INT64_MAX - 5;
    const int nranks = 1 << 20;
    qs_range last = qs_shard_of(total, nranks - 1, nranks);
    cr_assert_eq(last.end, total);
    cr_assert_eq(qs_shard_owner(total, total - 1, nranks),
                 (int)((total - 1) / qs_shard_width(total, nranks)));
    qs_range slots = qs_slots_of(total, nranks - 1, nranks);
    cr_assert_eq(slots.end, total);
}

Test(shard, more_ranks_than_elements_leaves_empty_shares)
{
    for (int r = 0; r < 8; r++) {
        qs_range share = qs_shard_of(3, r, 8);
        cr_assert_eq(share.end - share.begin, r < 3);
    }
}

Test(slots, cut_is_balanced_and_covers_exactly)
{
    for (int64_t slots = 0; slots <= 100; slots++) {
        for (int nranks = 1; nranks <= 17; nranks++) {
            int64_t next = 0;
            for (int r = 0; r < nranks; r++) {
                qs_range range = qs_slots_of(slots, r, nranks);
                cr_assert_eq(range.begin, next);
                cr_assert_eq(range.begin, r * slots / nranks);
                int64_t count = range.end - range.begin;
                cr_assert(count == slots / nranks || count == slots / nranks + 1);
                next = range.end;
            }
            cr_assert_eq(next, slots);
        }
    }
}

/* ---- the tree, with the bracketed expression as value ---- */

typedef struct {
    qs_slot_node node;
    char *text;
} value;

/* The definition, top down: what the sum of a node is. Allocated. */
static char *defined(int64_t slots, int level, int64_t index)
{
    char *text = NULL;
    if (level == 0) {
        cr_assert_geq(asprintf(&text, "%ld", (long)index), 0);
        return text;
    }
    char *left = defined(slots, level - 1, 2 * index);
    if (((2 * index + 1) << (level - 1)) >= slots) {
        return left; /* the right child lies beyond the last slot */
    }
    char *right = defined(slots, level - 1, 2 * index + 1);
    cr_assert_geq(asprintf(&text, "(%s+%s)", left, right), 0);
    free(left);
    free(right);
    return text;
}

/* What a rank and the receiver do: values arrive in slot order; neighbours are added when they are
 * siblings. */
static int push_value(int64_t slots, value *stack, int depth, value v)
{
    stack[depth++] = v;
    for (;;) {
        value *top = &stack[depth - 1];
        if (qs_slot_alone(slots, top->node)) {
            top->node = qs_slot_parent(top->node);
        } else if (depth >= 2 && qs_slot_siblings(stack[depth - 2].node, top->node)) {
            value *left = &stack[depth - 2];
            char *sum = NULL;
            cr_assert_geq(asprintf(&sum, "(%s+%s)", left->text, top->text), 0);
            free(left->text);
            free(top->text);
            left->text = sum;
            left->node = qs_slot_parent(left->node);
            depth--;
        } else {
            return depth;
        }
    }
}

static int root_of(int64_t slots)
{
    int level = 0;
    while ((1L << level) < slots) {
        level++;
    }
    return level;
}

/* The expression that comes out when the ranks' cuts are `cut[nranks + 1]`. Allocated. */
static char *finished(int64_t slots, const int64_t *cut, int nranks)
{
    value stack[QS_SLOT_NODES_MAX];
    int depth = 0;
    for (int r = 0; r < nranks; r++) {
        qs_slot_node nodes[QS_SLOT_NODES_MAX];
        int count = qs_slot_nodes(slots, (qs_range){cut[r], cut[r + 1]}, nodes);
        cr_assert_leq(count, 2 * root_of(slots) + 1);
        int64_t next = cut[r];
        for (int i = 0; i < count; i++) {
            cr_assert_eq(nodes[i].index << nodes[i].level, next, "nodes cover in order");
            next = (nodes[i].index + 1) << nodes[i].level;
            next = next < slots ? next : slots;
            value v = {nodes[i], defined(slots, nodes[i].level, nodes[i].index)};
            depth = push_value(slots, stack, depth, v);
        }
        cr_assert_eq(next, cut[r + 1], "nodes cover the whole range");
    }
    cr_assert_eq(depth, 1, "slots=%ld: %d values are left", (long)slots, depth);
    cr_assert_eq(stack[0].node.level, root_of(slots));
    cr_assert_eq(stack[0].node.index, 0);
    return stack[0].text;
}

static void check_cut(int64_t slots, const int64_t *cut, int nranks)
{
    char *expected = defined(slots, root_of(slots), 0);
    char *got = finished(slots, cut, nranks);
    cr_assert_str_eq(got, expected, "slots=%ld nranks=%d", (long)slots, nranks);
    free(expected);
    free(got);
}

Test(slots, every_rank_count_gives_the_same_expression)
{
    for (int64_t slots = 1; slots <= 40; slots++) {
        for (int nranks = 1; nranks <= 9; nranks++) {
            int64_t cut[10] = {0};
            for (int r = 0; r < nranks; r++) {
                cut[r + 1] = qs_slots_of(slots, r, nranks).end;
            }
            check_cut(slots, cut, nranks);
        }
    }
}

Test(slots, every_contiguous_cut_gives_the_same_expression)
{
    for (int64_t slots = 1; slots <= 24; slots++) {
        for (int64_t a = 0; a <= slots; a++) {
            for (int64_t b = a; b <= slots; b++) {
                int64_t cut[] = {0, a, b, slots};
                check_cut(slots, cut, 3);
            }
        }
    }
}

Test(slots, the_example_of_the_header_comment)
{
    char *text = defined(6, 3, 0);
    cr_assert_str_eq(text, "(((0+1)+(2+3))+(4+5))");
    free(text);
    qs_slot_node nodes[QS_SLOT_NODES_MAX];
    cr_assert_eq(qs_slot_nodes(6, (qs_range){3, 6}, nodes), 2);
    cr_assert(nodes[0].level == 0 && nodes[0].index == 3);
    cr_assert(nodes[1].level == 2 && nodes[1].index == 1);
}

Test(slots, nodes_are_maximal)
{
    for (int64_t slots = 1; slots <= 40; slots++) {
        for (int64_t a = 0; a <= slots; a++) {
            for (int64_t b = a; b <= slots; b++) {
                qs_slot_node nodes[QS_SLOT_NODES_MAX];
                int count = qs_slot_nodes(slots, (qs_range){a, b}, nodes);
                for (int i = 0; i < count; i++) {
                    cr_assert(!qs_slot_alone(slots, nodes[i]));
                    cr_assert(i == 0 || !qs_slot_siblings(nodes[i - 1], nodes[i]));
                }
                cr_assert_eq(count == 0, a == b);
            }
        }
    }
}

Test(slots, huge_counts_stay_within_the_node_limit)
{
    const int64_t slots = (INT64_C(1) << 61) + 12345;
    qs_slot_node nodes[QS_SLOT_NODES_MAX];
    int count = qs_slot_nodes(slots, (qs_range){1, slots - 1}, nodes);
    cr_assert(count > 0 && count <= QS_SLOT_NODES_MAX);
    cr_assert_eq(qs_slot_nodes(slots, (qs_range){0, slots}, nodes), 1);
    cr_assert_eq(nodes[0].level, 62);
}

/* ---- float sums, where the order shows ---- */

typedef struct {
    qs_slot_node at[QS_SLOT_NODES_MAX];
    float sum[QS_SLOT_NODES_MAX];
    int depth;
} float_stack;

static void push_float(int64_t slots, float_stack *s, qs_slot_node node, float sum)
{
    s->at[s->depth] = node;
    s->sum[s->depth++] = sum;
    for (;;) {
        qs_slot_node *top = &s->at[s->depth - 1];
        if (qs_slot_alone(slots, *top)) {
            *top = qs_slot_parent(*top);
        } else if (s->depth > 1 && qs_slot_siblings(top[-1], *top)) {
            s->sum[s->depth - 2] += s->sum[s->depth - 1];
            top[-1] = qs_slot_parent(*top);
            s->depth--;
        } else {
            return;
        }
    }
}

/* Each rank adds its own slots; what remains on its stack are the nodes that it sends. */
static float sum_over_ranks(const float *x, int64_t slots, int nranks)
{
    float_stack whole = {.depth = 0};
    for (int r = 0; r < nranks; r++) {
        qs_range range = qs_slots_of(slots, r, nranks);
        float_stack mine = {.depth = 0};
        for (int64_t slot = range.begin; slot < range.end; slot++) {
            push_float(slots, &mine, (qs_slot_node){0, slot}, x[slot]);
        }
        qs_slot_node nodes[QS_SLOT_NODES_MAX];
        cr_assert_eq(qs_slot_nodes(slots, range, nodes), mine.depth);
        for (int i = 0; i < mine.depth; i++) {
            cr_assert(nodes[i].level == mine.at[i].level && nodes[i].index == mine.at[i].index);
            push_float(slots, &whole, mine.at[i], mine.sum[i]);
        }
    }
    cr_assert_eq(whole.depth, 1);
    return whole.sum[0];
}

Test(slots, float_sums_are_bit_equal_where_plain_sums_are_not)
{
    enum { SLOTS = 37 };
    float x[SLOTS], plain = 0.0f;
    uint32_t seed = 1;
    for (int i = 0; i < SLOTS; i++) {
        seed = seed * 1664525u + 1013904223u;
        x[i] = (float)(seed >> 8) * 0x1p-24f - 0.5f;
        plain += x[i];
    }
    float one_rank = sum_over_ranks(x, SLOTS, 1);
    cr_assert_neq(plain, one_rank, "the data must be able to show a difference");
    for (int nranks = 2; nranks <= 40; nranks++) {
        float sum = sum_over_ranks(x, SLOTS, nranks);
        cr_assert_arr_eq(&sum, &one_rank, sizeof sum, "%d ranks", nranks);
    }
}
