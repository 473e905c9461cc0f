/* LD_PRELOAD: a network that changes a byte. Of every message of QSHARD_FAULT_BYTES bytes the last
 * one arrives with a bit flipped. */
#include <mpi.h>
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
