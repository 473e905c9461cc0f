#include "backend/cards.h"

#include <string.h>

/* Has a rank below `nranks` chosen it? */
static bool is_taken(const qs_cards_seen *all, const int *chosen, int nranks, const uint8_t *id)
{
    for (int r = 0; r < nranks; r++) {
        if (chosen[r] >= 0 && memcmp(all[r].ids[chosen[r]], id, QS_CARDS_ID_BYTES) == 0) {
            return true;
        }
    }
    return false;
}

static int choose_one(const qs_cards_seen *all, const int *chosen, int rank)
{
    const qs_cards_seen *mine = &all[rank];
    if (mine->count == 0) {
        return -1;
    }
    const int number = mine->local_rank % mine->count;
    if (!is_taken(all, chosen, rank, mine->ids[number])) {
        return number;
    }
    for (int i = 0; i < mine->count; i++) {
        if (!is_taken(all, chosen, rank, mine->ids[i])) {
            return i;
        }
    }
    return number;
}

void qs_cards_choose(const qs_cards_seen *all, int nranks, int *chosen)
{
    for (int r = 0; r < nranks; r++) {
        chosen[r] = choose_one(all, chosen, r);
    }
}

bool qs_cards_share(const qs_cards_seen *all, const int *chosen, int a, int b)
{
    return chosen[a] >= 0 && chosen[b] >= 0 &&
           memcmp(all[a].ids[chosen[a]], all[b].ids[chosen[b]], QS_CARDS_ID_BYTES) == 0;
}
