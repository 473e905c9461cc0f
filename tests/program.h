/* The program, started by a test through a shell. */
#ifndef QS_TESTS_PROGRAM_H
#define QS_TESTS_PROGRAM_H

#include <criterion/criterion.h>
#include <libgen.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PROGRAM_FOLDER_MAX = 1024, PROGRAM_OUTPUT_MAX = 1 << 16 };

/** Where the build has put it: QSHARD_BINARY_DIR, or the folder above the test's own. */
static inline void program_find(char folder[PROGRAM_FOLDER_MAX])
{
    char self[900] = "";
    const char *dir = getenv("QSHARD_BINARY_DIR");
    if (dir != NULL) {
        snprintf(folder, PROGRAM_FOLDER_MAX, "%s", dir);
        return;
    }
    cr_assert_gt(readlink("/proc/self/exe", self, sizeof self - 1), 0);
    snprintf(folder, PROGRAM_FOLDER_MAX, "%s/..", dirname(self));
}

/** `PREFIX qshard ARGUMENTS`, both streams into `output`. \return the exit code, -1: a signal. */
static inline int program_run(char output[PROGRAM_OUTPUT_MAX], const char *folder,
                              const char *prefix, const char *arguments)
{
    char command[8192];
    snprintf(command, sizeof command, "{ %s timeout -k 2 60 %s/qshard %s ; } 2>&1", prefix, folder,
             arguments);
    FILE *pipe = popen(command, "r");
    cr_assert_not_null(pipe);
    size_t bytes = fread(output, 1, PROGRAM_OUTPUT_MAX - 1, pipe);
    output[bytes] = '\0';
    int status = pclose(pipe);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

static inline int program_error_lines(const char *output)
{
    int count = 0;
    for (const char *p = output; (p = strstr(p, "error[")) != NULL; p++) {
        count += p == output || p[-1] == '\n';
    }
    return count;
}

#endif
