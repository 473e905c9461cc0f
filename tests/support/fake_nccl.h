/* A libnccl that moves nothing, a device, and a host communicator whose other ranks do as this one
 * does: which calls src/comm/comm_nccl.c makes, in which order, and what becomes of failures. */
#ifndef QS_TESTS_FAKE_NCCL_H
#define QS_TESTS_FAKE_NCCL_H

#include <nccl.h>
#include <stdatomic.h>
#include <stdbool.h>

#include "comm/comm_impl.h"
#include "device/device_impl.h"

struct ncclComm {
    ncclResult_t state;
    int polls_left; /* until the last call is done; -1: never */
};

typedef struct {
    char calls[4096]; /* what was called, one word each */
    int depth;        /* of groups */
    int version;
    const char *failing; /* the call that fails ... */
    ncclResult_t code;   /* ... with this */
    int polls;           /* that each call takes to be done; -1: it never is */
    ncclResult_t async;  /* what it is found to be then */
    const char *detail;  /* of ncclGetLastError; NULL: "socket closed" */
    struct ncclComm comm;
} fake_nccl;

/** Per thread: a rank. */
extern _Thread_local fake_nccl fake;

/** Forget the calls. */
void fake_forget(void);

/* Aborts come in threads of their own: what they say must not be thread-local. */
extern atomic_int fake_aborts;
extern volatile bool fake_abort_hangs;
extern int fake_aborts_awaited; /* none returns before as many have been called */

extern void *fake_stream; /* of the queue in use */

typedef struct {
    qs_queue base;
    int native; /* its address is the handle */
} fake_queue;

extern qs_device fake_device;
fake_queue fake_queue_make(void);
extern bool fake_stuck; /* what is on a queue never ends: waits ask the device's watches */
void *fake_native(const qs_queue *queue);

extern int fake_moves; /* of the host's messages */
qs_comm fake_host(int rank, int nranks);

#endif
