/* A library for LD_PRELOAD that makes one allocation fail.
 *
 *     QSHARD_FAULT_TEXT=N    the N-th text that is to grow in memory (open_memstream) cannot
 *     FAULT_RANK=R           only in the process with OMPI_COMM_WORLD_RANK = R */
#define _GNU_SOURCE /* RTLD_NEXT */
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int this_rank(void)
{
    const char *wanted = getenv("FAULT_RANK"), *rank = getenv("OMPI_COMM_WORLD_RANK");
    return wanted == NULL || strcmp(wanted, rank != NULL ? rank : "0") == 0;
}

FILE *open_memstream(char **text, size_t *bytes)
{
    static FILE *(*real)(char **, size_t *);
    static int calls;
    const char *target = getenv("QSHARD_FAULT_TEXT");
    if (target != NULL && this_rank() && ++calls == atoi(target)) {
        errno = ENOMEM;
        return NULL;
    }
    if (real == NULL) {
        real = (FILE * (*)(char **, size_t *)) dlsym(RTLD_NEXT, "open_memstream");
    }
    return real(text, bytes);
}
