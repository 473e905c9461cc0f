/* What every communicator must do, written once: run by threads as ranks in test_comm.c and by MPI
 * ranks in comm.c. */
#ifndef QS_TESTS_COMM_CHECKS_H
#define QS_TESTS_COMM_CHECKS_H

#include "comm/comm.h"

/** One property; all ranks call it. \return NULL, or what is wrong (borrowed until the thread's
 * next check). */
typedef const char *(*comm_check)(qs_comm *comm);

typedef struct {
    const char *name;
    comm_check run;
} comm_check_entry;

/** Ends with a NULL name. */
extern const comm_check_entry comm_checks[];

/** The check called `name`, NULL if there is none. */
comm_check comm_check_find(const char *name);

#endif
