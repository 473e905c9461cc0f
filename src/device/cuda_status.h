/* CUDA's errors as ours, for everything of the plugin that calls the runtime. C and C++.
 *
 * Vendor headers stay in few files: include cuda_runtime_api.h before. */
#ifndef QS_DEVICE_CUDA_STATUS_H
#define QS_DEVICE_CUDA_STATUS_H

#ifdef __cplusplus
extern "C" {
#endif
#include "base/status.h"
#ifdef __cplusplus
}
#endif

/** QS_OK, or QS_ERR_MEMORY or QS_ERR_DEVICE with CUDA's text; an expression for QS_TRY. */
#define QS_CUDA(call) qs_cuda_status((call), #call, __FILE__, __LINE__)

/** The same of a call that waits for work: its own name says nothing. */
#define QS_CUDA_WORK(call) qs_cuda_work_status((call), __FILE__, __LINE__)

/** Is it an error that an earlier kernel left behind, which every later call then returns? */
static inline bool qs_cuda_is_of_earlier_work(cudaError_t error)
{
    return error == cudaErrorIllegalAddress || error == cudaErrorLaunchFailure ||
           error == cudaErrorLaunchTimeout || error == cudaErrorECCUncorrectable ||
           error == cudaErrorMisalignedAddress || error == cudaErrorIllegalInstruction ||
           error == cudaErrorHardwareStackError;
}

/** CUDA also keeps an error for cudaGetLastError, where the next launch would find it: taken away.
 * That of work which ran earlier comes up in a call that is not the one to blame. */
static inline qs_status qs_cuda_work_status(cudaError_t error, const char *file, int line)
{
    if (error == cudaSuccess) {
        return QS_OK;
    }
    (void)cudaGetLastError();
    return qs_error_set(QS_ERR_DEVICE, file, line,
                        "the GPU failed while it worked: %s (%s); `dmesg` may say more (Xid), and "
                        "CUDA_LAUNCH_BLOCKING=1 finds the operation",
                        cudaGetErrorString(error), cudaGetErrorName(error));
}

static inline qs_status qs_cuda_status(cudaError_t error, const char *call, const char *file,
                                       int line)
{
    if (error == cudaSuccess) {
        return QS_OK;
    }
    if (qs_cuda_is_of_earlier_work(error)) {
        return qs_cuda_work_status(error, file, line);
    }
    (void)cudaGetLastError();
    return qs_error_set(error == cudaErrorMemoryAllocation ? QS_ERR_MEMORY : QS_ERR_DEVICE, file,
                        line, "%s: %s (%s)", call, cudaGetErrorString(error),
                        cudaGetErrorName(error));
}

#endif
