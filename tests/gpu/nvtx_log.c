/* What NVTX loads where NVTX_INJECTION64_PATH names it, in the place of a profiler: it writes the
 * program's ranges to the file QSHARD_NVTX_LOG, "+name" as one begins and "-" as the latest ends.
 * Stage features of tests/gpu.sh compiles it with the toolkit's headers. */
#include <nvtx3/nvToolsExt.h>
#include <stdio.h>
#include <stdlib.h>

static void write_line(char kind, const char *name)
{
    const char *path = getenv("QSHARD_NVTX_LOG");
    FILE *file = path != NULL ? fopen(path, "a") : NULL;
    if (file != NULL) {
        fprintf(file, "%c%s\n", kind, name);
        fclose(file);
    }
}

static int NVTX_API push(const char *name)
{
    write_line('+', name);
    return 0;
}

static int NVTX_API pop(void)
{
    write_line('-', "");
    return 0;
}

/* Every library that was compiled with NVTX calls it with functions of its own. */
NVTX_DYNAMIC_EXPORT int NVTX_API InitializeInjectionNvtx2(NvtxGetExportTableFunc_t get_table)
{
    const NvtxExportTableCallbacks *callbacks = get_table(NVTX_ETID_CALLBACKS);
    NvtxFunctionTable table = NULL;
    unsigned int size = 0;
    if (callbacks == NULL ||
        !callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE, &table, &size) ||
        size <= NVTX_CBID_CORE_RangePop) {
        return 0;
    }
    *table[NVTX_CBID_CORE_RangePushA] = (NvtxFunctionPointer)push;
    *table[NVTX_CBID_CORE_RangePop] = (NvtxFunctionPointer)pop;
    return 1;
}
