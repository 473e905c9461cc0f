/* NVIDIA GPUs as devices. Part of the plugin; the program reaches this through backend/plugin.h. */
#ifndef QS_DEVICE_DEVICE_CUDA_H
#define QS_DEVICE_DEVICE_CUDA_H

#include "device/device_impl.h"

/** Cards that the build has code for (cmake/cuda.cmake); where it does not say, all that can be
 * used. */
#ifndef QSHARD_CUDA_ARCHITECTURES
#define QSHARD_CUDA_ARCHITECTURES "80-virtual"
#endif

/** Number of GPUs that can be used: seen by the process (CUDA_VISIBLE_DEVICES), with a driver for
 * this CUDA, of capability 8.0 or more, and with code for them in this plugin. 0 with one line in
 * `why`. No context is made. */
int qs_device_cuda_probe(char *why, size_t capacity);

enum { QS_CARD_ID_BYTES = 16 };

/** What tells GPU `index` of those that can be used from every other card there is (NVIDIA's UUID),
 * whatever number a process sees it under. No context is made. */
qs_status qs_device_cuda_card_id(int index, uint8_t id[QS_CARD_ID_BYTES]);

/** Open GPU `index` of those that can be used. */
qs_status qs_device_cuda_open(qs_device **out, int index);

#endif
