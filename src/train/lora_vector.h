/* The LoRA vector of a session: as an adapter that was read has it, and as the operations take it.
 */
#ifndef QS_TRAIN_LORA_VECTOR_H
#define QS_TRAIN_LORA_VECTOR_H

#include "comm/comm.h"
#include "device/device.h"
#include "train/setting.h"

typedef struct {
    float *loaded;     /* [n_layers * per_layer] as read, on the host; NULL: nothing was */
    void *weights;     /* the same in the ops' act_dtype on the device; NULL: base only */
    void *send;        /* [n_layers * shard_width] of that type: scratch of the gather, or NULL */
    float *magnitudes; /* DoRA's [n_layers * qs_lora_magnitudes] on the device, where that type is
                          not fp32; else NULL: they are read of `weights` */
    float *magnitudes_send; /* [n_layers * qs_lora_magnitude_width]: ditto */
} qs_lora_vector;

/** Read an adapter: a PEFT directory, a checkpoint step-N, or a run directory (its newest
 * checkpoint). Its settings replace those of on->config, its layout is on->layout. Rank 0 reads it,
 * the others need not see it. Collective. */
qs_status qs_lora_vector_load(qs_lora_vector *v, qs_setting *on, const char *path, qs_comm *comm);

/** Room on the device of `queue` for a vector that is trained or was loaded, and what was loaded
 * into it; nothing where there is none. Not collective. */
qs_status qs_lora_vector_prepare(qs_lora_vector *v, const qs_setting *on, qs_queue *queue,
                                 bool trained);

/** `device` may be NULL where nothing was prepared. */
void qs_lora_vector_free(qs_lora_vector *v, qs_device *device);

/** Bytes that qs_lora_vector_prepare takes on the device. */
size_t qs_lora_vector_bytes(const qs_setting *on, bool trained);

/** Bytes of what was read, on the host; 0: nothing was. */
size_t qs_lora_vector_loaded_bytes(const qs_setting *on);

#endif
