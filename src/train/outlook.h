/* A run on paper: what it would hold and how long its steps would take, on GPUs that need not be
 * there. It is planned by the functions that a real run calls (plan.h). Nothing here is collective.
 */
#ifndef QS_TRAIN_OUTLOOK_H
#define QS_TRAIN_OUTLOOK_H

#include "device/gpu_kinds.h"
#include "train/forecast.h"
#include "train/plan.h"

/** What a plan is made from: the base's index, or the one that a checkpoint's config.json implies,
 * and the indices of the token files. */
typedef struct {
    qs_base_index *index;
    qs_data *train, *eval; /* eval may be NULL */
    bool assumed;          /* there is no data.train: full sequences of train.seq_len */
} qs_outlook_inputs;

/** Open what cfg->base (a base.h5, or a directory with config.json) and cfg->data name. Token files
 * that do not exist yet are assumed. */
qs_status qs_outlook_open(qs_outlook_inputs *in, const qs_config *cfg);
void qs_outlook_close(qs_outlook_inputs *in);

/** Where the run would be. */
typedef struct {
    const qs_gpu_kind *gpu; /* NULL: the CPU */
    int nranks, per_node;   /* per_node may be more than there are */
    int threads;            /* of a rank: matters on the CPU alone */
} qs_outlook_place;

typedef struct {
    qs_plan_choice choice; /* what `auto` stands for there */
    qs_memory_plan memory;
    qs_step_work work;
} qs_outlook;

/** QS_ERR_CONFIG_PAIR for a model that the GPU's operations do not take. */
qs_status qs_outlook_make(qs_outlook *out, const qs_outlook_inputs *in, const qs_config *cfg,
                          const qs_outlook_place *place);

/** Bytes of device memory (on the CPU: of the host's) that a rank needs, and may have: the card's,
 * or on the CPU what this host would give it (room.h), or memory.device_limit, the smaller. */
size_t qs_outlook_needed(const qs_outlook *outlook);
size_t qs_outlook_allowed(const qs_config *cfg, const qs_outlook_place *place);

/** Ranks of a node, of which there may be fewer than it has room for. */
int qs_outlook_local_nranks(const qs_outlook_place *place);

/** What would make a run fit that does not: changes of the configuration, or more GPUs. */
typedef struct {
    char settings[256]; /* "train.recompute: full, train.micro_batch: 1"; "": none are enough */
    int nranks;         /* enough with the settings as they are; 0: no number below 4096 is */
} qs_outlook_remedy;
qs_status qs_outlook_find_remedy(qs_outlook_remedy *out, const qs_outlook_inputs *in,
                                 const qs_config *cfg, const qs_outlook_place *place);

#endif
