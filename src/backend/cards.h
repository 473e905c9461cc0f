/* Which rank takes which of the GPUs that it sees. A rank may see all cards of its host, as slurm/
 * asks for; its own alone (--gpus-per-task=1); or those of its socket, together with some of the
 * others (--gpu-bind=closest), and in any order. So a number among the visible ones says nothing:
 * all ranks tell each other the ids of the cards they see, and each works out the same answer. */
#ifndef QS_BACKEND_CARDS_H
#define QS_BACKEND_CARDS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/proc.h"

enum { QS_CARDS_MAX = 32, QS_CARDS_ID_BYTES = 16 };

/** What a rank tells the others; sent as bytes. */
typedef struct {
    int32_t count; /* of GPUs that it sees, the first QS_CARDS_MAX of them: 0 where it sees none */
    int32_t local_rank, local_nranks; /* on its host */
    char host[QS_HOST_NAME_BYTES];
    uint8_t ids[QS_CARDS_MAX][QS_CARDS_ID_BYTES]; /* no other card in the world has this one */
} qs_cards_seen;

/** Choose for all ranks, in their order: the card of its number on the host, if no lower rank has
 * taken it, so that rank i has card i where all see all; else the first that is free; where none
 * is, the card of its number all the same, which two then share.
 * \param [out] chosen  [nranks] which of the cards that it sees; -1: it sees none */
void qs_cards_choose(const qs_cards_seen *all, int nranks, int *chosen);

/** Have these two ranks chosen one card? */
bool qs_cards_share(const qs_cards_seen *all, const int *chosen, int a, int b);

#endif
