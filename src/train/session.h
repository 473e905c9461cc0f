/* What train, eval and sample share: the opened base, the sharded weights, the adapter and the
 * model on one queue. */
#ifndef QS_TRAIN_SESSION_H
#define QS_TRAIN_SESSION_H

#include "backend/levels.h"
#include "comm/comm.h"
#include "fsdp/fsdp.h"
#include "model/model.h"
#include "train/lora_vector.h"
#include "train/room.h"
#include "train/setting.h"
#include "train/watchdog.h"

typedef struct {
    qs_setting on; /* what it runs on: configuration, base, ranks */
    qs_watchdog watchdog;
    qs_comm *comm;        /* over the host's memory; borrowed */
    qs_comm *device_comm; /* over the device's memory; on the CPU the same */
    qs_shard_group shard; /* the ranks that share one copy of the base with this one */
    qs_comm *base_comm;   /* theirs over the device's memory; may be device_comm */
    qs_room host;         /* what this rank may have of its host's memory */
    qs_backend_levels levels;
    qs_backend backend;
    qs_device *device;
    qs_queue *queue;
    bool ops_open;
    qs_lora_vector lora;
    qs_fsdp *fsdp;
    qs_model *model;
} qs_session;

/** Watch over this rank from now on; open the base; choose the device, the same kind on all ranks,
 * and threads. A model that the GPU's operations do not take is refused with device: cuda
 * (QS_ERR_CONFIG_PAIR) and computed on the CPU with auto. Collective. */
qs_status qs_session_open(qs_session *s, const qs_config *config, qs_comm *comm);

/** Load an adapter (lora_vector.h); NULL or "": base only. Collective. */
qs_status qs_session_load_adapter(qs_session *s, const char *path);

/** Start the communicator of the device, prepare the operations for `shape`, and make room for the
 * LoRA vector where there is an adapter to train (`trained`) or one was loaded. Collective. */
qs_status qs_session_connect(qs_session *s, const qs_model_shape *shape, bool trained);

/** Load this rank's shares and make the model. Collective, after qs_session_connect. */
qs_status qs_session_build(qs_session *s, const qs_model_shape *shape);

void qs_session_close(qs_session *s);

enum { QS_SESSION_COMMS_MAX = 8 };

/** All communicators of the session, each once. \return how many. */
int qs_session_comms(const qs_session *session, const qs_comm *out[QS_SESSION_COMMS_MAX]);

/** Bytes that this rank has received so far by all communicators, and those from other hosts. */
void qs_session_traffic(const qs_session *s, uint64_t *received, uint64_t *foreign);

#endif
