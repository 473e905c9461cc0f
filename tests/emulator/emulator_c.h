/* The emulator's calls for C. */
#ifndef QS_EMULATOR_C_H
#define QS_EMULATOR_C_H

#include "cuda_runtime_api.h"

#ifdef __cplusplus
extern "C" {
#endif
#pragma GCC visibility push(hidden)

/** Queue a function on a stream, as if it were a kernel; `release`, if any, is called afterwards.
 */
void qs_emulator_push(cudaStream_t stream, void (*run)(void *), void (*release)(void *),
                      void *data);

/** Queue the arrival of data from elsewhere: it happens when somebody waits for the stream, or when
 * other work on the stream may use the data. */
void qs_emulator_push_arrival(cudaStream_t stream, void (*run)(void *), void *data);

/** Run all that was given to the stream, but put its last arrivals off. */
void qs_emulator_advance(cudaStream_t stream);

/** Run all that was given to the stream, and what that waits for. */
void qs_emulator_force(cudaStream_t stream);

/** Call a function now, with device memory accessible. */
void qs_emulator_access(void (*run)(void *), void *data);

#pragma GCC visibility pop
#ifdef __cplusplus
}
#endif

#endif
