/* LD_PRELOAD: a network that changes a byte, and a start during which a signal comes. Of every
 * message of QSHARD_FAULT_BYTES bytes the last one arrives with a bit flipped; in MPI_Init_thread
 * every rank gets signal QSHARD_FAULT_SIGNAL. */
#include <mpi.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

int MPI_Isend(const void *buffer, int count, MPI_Datatype type, int to, int tag, MPI_Comm comm,
              MPI_Request *request)
{
    const char *wanted = getenv("QSHARD_FAULT_BYTES");
    if (wanted != NULL && type == MPI_BYTE && count == atoi(wanted)) {
        char *changed = malloc((size_t)count); /* the process is short-lived: never freed */
        if (changed != NULL) {
            memcpy(changed, buffer, (size_t)count);
            changed[count - 1] ^= 0x40;
            buffer = changed;
        }
    }
    return PMPI_Isend(buffer, count, type, to, tag, comm, request);
}

int MPI_Init_thread(int *argc, char ***argv, int required, int *provided)
{
    const char *number = getenv("QSHARD_FAULT_SIGNAL");
    if (number != NULL) {
        raise(atoi(number));
    }
    return PMPI_Init_thread(argc, argv, required, provided);
}
