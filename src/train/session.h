/* What train, eval and sample share: the opened base, the sharded weights, the adapter and the
 * model on one queue. */
#ifndef QS_TRAIN_SESSION_H
#define QS_TRAIN_SESSION_H

#include "comm/comm.h"
#include "config/config.h"
#include "data/data.h"
#include "fsdp/fsdp.h"
#include "model/model.h"

typedef struct {
    qs_config config; /* adapter settings may come from the adapter itself */
    qs_comm *comm;    /* borrowed */
    qs_queue *queue;
    const qs_ops *ops;
    qs_base_index *index;
    qs_lora_layout layout;
    float *lora; /* [n_layers * per_layer] the whole LoRA vector; NULL: base only */
    qs_fsdp *fsdp;
    qs_model *model;
} qs_session;

/** Check device and threads, open the base. Collective. */
qs_status qs_session_open(qs_session *s, const qs_config *config, qs_comm *comm);

/** Load an adapter: a PEFT directory, a checkpoint step-N, or a run directory (its newest
 * checkpoint); its settings replace those of the configuration. NULL or "": base only.
 * Collective. */
qs_status qs_session_load_adapter(qs_session *s, const char *path);

/** Load this rank's shares and make the model. Collective. */
qs_status qs_session_build(qs_session *s, const qs_model_shape *shape);

void qs_session_close(qs_session *s);

/** Micro-batches per pass: the configured number, or with `auto` up to 4 when units have to be
 * gathered, else 1. */
int64_t qs_session_group(const qs_config *config, int64_t slots, int nranks);

#endif
