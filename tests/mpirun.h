/* Run a program of tests/cases under mpirun and keep what it prints. */
#ifndef QS_TESTS_MPIRUN_H
#define QS_TESTS_MPIRUN_H

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>

typedef struct {
    int code;           /* exit code; 124 or 137 when it had to be ended */
    char output[32768]; /* stdout and stderr of all ranks, as they came */
} mpirun_result;

/* The program `case_<name>` of this build. */
static inline const char *case_path(const char *name)
{
    static char path[4096];
    const char *build = getenv("QSHARD_BINARY_DIR");
    snprintf(path, sizeof path, "%s/tests/case_%s", build != NULL ? build : ".", name);
    return path;
}

/* What ctest sets, for a test started by hand. */
static inline void mpirun_environment(void)
{
    setenv("OMPI_ALLOW_RUN_AS_ROOT", "1", 0);
    setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1", 0);
    setenv("OMPI_MCA_rmaps_base_oversubscribe", "1", 0);
    setenv("OMPI_MCA_hwloc_base_binding_policy", "none", 0);
    setenv("OMPI_MCA_mpi_yield_when_idle", "1", 0);
}

/* Run a shell command, at most `seconds`. */
static inline void shell(mpirun_result *result, int seconds, const char *format, ...)
    __attribute__((format(printf, 3, 4)));
static inline void shell(mpirun_result *result, int seconds, const char *format, ...)
{
    char command[8192];
    int head = snprintf(command, sizeof command, "timeout -k 2 %d ", seconds);
    va_list args;
    va_start(args, format);
    vsnprintf(command + head, sizeof command - (size_t)head - 8, format, args);
    va_end(args);
    strcat(command, " 2>&1");
    mpirun_environment();
    result->code = -1;
    size_t end = 0;
    FILE *pipe = popen(command, "r");
    if (pipe != NULL) {
        end = fread(result->output, 1, sizeof result->output - 1, pipe);
        while (fgetc(pipe) != EOF) { /* the rest, so that the program can end */
        }
        int status = pclose(pipe);
        result->code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    }
    result->output[end] = '\0';
}

/* How often `needle` is in the output. */
static inline int count_in(const mpirun_result *result, const char *needle)
{
    int count = 0;
    for (const char *at = result->output; (at = strstr(at, needle)) != NULL; at++) {
        count++;
    }
    return count;
}

#endif
