/* What the programs that measure a GPU's operations share: their command line, the plugin and its
 * first device, and a CSV file.
 *
 *     PROGRAM PLUGIN [--small] [--csv FILE] [--tokens T]... */
#ifndef QS_BENCHMARKS_GPU_MAIN_H
#define QS_BENCHMARKS_GPU_MAIN_H

#include <stdio.h>

#include "bench/kernels/measure.h"

enum { GPU_MAIN_TOKENS_MAX = 8 };

typedef struct {
    const qs_plugin *plugin;
    qs_device *device;
    FILE *csv;                           /* NULL: none */
    int64_t tokens[GPU_MAIN_TOKENS_MAX]; /* as asked for, */
    int n_tokens;                        /* 0: nothing was */
    bool small;                          /* tiny shapes, to try the program itself */
} gpu_main;

/** The program: reads the command line, opens what `g` names, and runs `run`, whose CSV file begins
 * with the line `heading`. What is opened goes when it returns. \return the exit code: 2 for a
 * wrong command line, else as qshard's. */
int gpu_main_run(int argc, char **argv, const char *heading, qs_status (*run)(const gpu_main *g));

#endif
