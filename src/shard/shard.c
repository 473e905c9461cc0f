/* Shares and the slot tree.
 *
 * The tree over 6 slots, as an example:
 *
 *     level 3                 (0)                  root: (1)+(2,1) = ((0+1)+(2+3)) + (4+5)
 *     level 2       (0)                 (1)        (2,1) covers slots 4..7, of which 4 and 5 exist
 *     level 1   (0)     (1)        (2)       .     (1,3) would cover 6 and 7: skipped
 *     level 0  0   1   2   3      4   5   .   .
 *
 * With 2 ranks, rank 0 has slots 0..2 and sends (1,0) and (0,2); rank 1 has 3..5 and sends (0,3)
 * and (2,1). */
#include "shard/shard.h"

#include "base/minmax.h"

int64_t qs_shard_width(int64_t total, int nranks)
{
    return total / nranks + (total % nranks != 0 ? 1 : 0);
}

/* rank * width, held at total: the product may pass 2^63 only for shares past the end, so compare
 * by division. */
static int64_t share_begin(int64_t total, int64_t width, int rank)
{
    return width > 0 && rank > total / width ? total : qs_min_i64(rank * width, total);
}

qs_range qs_shard_of(int64_t total, int rank, int nranks)
{
    int64_t width = qs_shard_width(total, nranks);
    int64_t begin = share_begin(total, width, rank);
    return (qs_range){.begin = begin, .end = begin + qs_min_i64(width, total - begin)};
}

int qs_shard_owner(int64_t total, int64_t index, int nranks)
{
    return (int)(index / qs_shard_width(total, nranks));
}

/* floor(rank * slots / nranks) without the product: with slots = q nranks + m it is rank q +
 * floor(rank m / nranks). */
static int64_t slot_cut(int64_t slots, int rank, int nranks)
{
    return rank * (slots / nranks) + rank * (slots % nranks) / nranks;
}

qs_range qs_slots_of(int64_t slots, int rank, int nranks)
{
    return (qs_range){.begin = slot_cut(slots, rank, nranks),
                      .end = slot_cut(slots, rank + 1, nranks)};
}

/* Level of the root: the smallest k with 2^k >= slots. */
static int root_level(int64_t slots)
{
    int level = 0;
    while (level < 62 && (INT64_C(1) << level) < slots) {
        level++;
    }
    return level;
}

/* End of the slots that the node of `level` starting at `begin` covers. */
static int64_t covered_end(int64_t slots, int64_t begin, int level)
{
    int64_t width = INT64_C(1) << level;
    return begin > slots - width ? slots : begin + width;
}

int qs_slot_nodes(int64_t slots, qs_range range, qs_slot_node out[QS_SLOT_NODES_MAX])
{
    const int top = root_level(slots);
    int count = 0;
    for (int64_t begin = range.begin; begin < range.end;) {
        int level = 0;
        while (level < top && begin % (INT64_C(2) << level) == 0 &&
               covered_end(slots, begin, level + 1) <= range.end) {
            level++;
        }
        out[count++] = (qs_slot_node){.level = level, .index = begin >> level};
        begin = covered_end(slots, begin, level);
    }
    return count;
}

int qs_slot_siblings(qs_slot_node left, qs_slot_node right)
{
    return left.level == right.level && left.index % 2 == 0 && right.index == left.index + 1;
}

int qs_slot_alone(int64_t slots, qs_slot_node node)
{
    if (node.level >= root_level(slots) || node.index % 2 != 0) {
        return 0; /* the root has no parent; a right child has a sibling */
    }
    return covered_end(slots, node.index << node.level, node.level) == slots;
}

qs_slot_node qs_slot_parent(qs_slot_node node)
{
    return (qs_slot_node){.level = node.level + 1, .index = node.index / 2};
}
