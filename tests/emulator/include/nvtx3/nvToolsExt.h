/* NVTX ranges go nowhere in the emulator. */
#ifndef QS_EMULATOR_NVTX_H
#define QS_EMULATOR_NVTX_H

static inline int nvtxRangePushA(const char *name)
{
    (void)name;
    return 0;
}

static inline int nvtxRangePop(void)
{
    return 0;
}

static inline void nvtxMarkA(const char *name)
{
    (void)name;
}

#endif
