/* NVTX ranges are only written down: with QSHARD_NVTX_LOG=FILE a line each, as tests/gpu/nvtx_log.c
 * does where NVTX is real. */
#ifndef QS_EMULATOR_NVTX_H
#define QS_EMULATOR_NVTX_H

#include <stdio.h>
#include <stdlib.h>

static inline int emulator_nvtx_line(char kind, const char *name)
{
    const char *path = getenv("QSHARD_NVTX_LOG");
    FILE *file = path != NULL ? fopen(path, "a") : NULL;
    if (file != NULL) {
        fprintf(file, "%c%s\n", kind, name);
        fclose(file);
    }
    return 0;
}

static inline int nvtxRangePushA(const char *name)
{
    return emulator_nvtx_line('+', name);
}

static inline int nvtxRangePop(void)
{
    return emulator_nvtx_line('-', "");
}

#endif
