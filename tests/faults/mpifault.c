/* LD_PRELOAD: a network that changes a byte, and signals that come at a known time. Of every
 * message of QSHARD_FAULT_BYTES bytes the last one arrives with a bit flipped; in MPI_Init_thread
 * every rank gets signal QSHARD_FAULT_SIGNAL; in its all-gather number QSHARD_FAULT_PASS of two
 * words a rank, which are the agreements on what passes read, the last rank gets signal
 * QSHARD_FAULT_PASS_SIGNAL (USR1), and by the program's own clock QSHARD_FAULT_LATE seconds have
 * passed. */
#define _GNU_SOURCE /* dladdr */
#include <dlfcn.h>
#include <mpi.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static atomic_long late_s; /* read by every thread of the program */

/* MPI and the libraries keep their time. */
static int calls_from_program(void *caller)
{
    Dl_info of, program;
    return dladdr(caller, &of) != 0 && dladdr((void *)getauxval(AT_ENTRY), &program) != 0 &&
           of.dli_fbase == program.dli_fbase;
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    const int error = (int)syscall(SYS_clock_gettime, clock, now);
    if (late_s > 0 && calls_from_program(__builtin_return_address(0))) {
        now->tv_sec += late_s;
    }
    return error;
}

int MPI_Allgather(const void *from, int from_count, MPI_Datatype from_type, void *to, int to_count,
                  MPI_Datatype to_type, MPI_Comm comm)
{
    static int passes;
    const char *wanted = getenv("QSHARD_FAULT_PASS"), *late = getenv("QSHARD_FAULT_LATE");
    const char *number = getenv("QSHARD_FAULT_PASS_SIGNAL");
    int rank = 0, nranks = 0;
    PMPI_Comm_rank(MPI_COMM_WORLD, &rank);
    PMPI_Comm_size(MPI_COMM_WORLD, &nranks);
    if (wanted != NULL && to_type == MPI_BYTE && to_count == 2 * (int)sizeof(long) &&
        rank == nranks - 1 && ++passes == atoi(wanted)) {
        late_s = late != NULL ? atol(late) : 0;
        raise(number != NULL ? atoi(number) : SIGUSR1);
    }
    return PMPI_Allgather(from, from_count, from_type, to, to_count, to_type, comm);
}

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
