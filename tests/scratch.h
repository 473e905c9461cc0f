/* A folder of a test's own, and its end. */
#ifndef QS_TESTS_SCRATCH_H
#define QS_TESTS_SCRATCH_H

#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SCRATCH_MAX = 64 };

/** In memory where that is possible: for thousands of fsyncs. */
static inline const char *scratch_in_memory(void)
{
    return access("/dev/shm", W_OK) == 0 ? "/dev/shm" : NULL;
}

/** Make a folder in `parent`; NULL: in TMPDIR, or in /tmp if that is not set or too long. */
static inline void scratch_make(char folder[SCRATCH_MAX], const char *parent)
{
    static const char name[] = "/qshard-XXXXXX"; /* mkdtemp's pattern */
    parent = parent != NULL ? parent : getenv("TMPDIR");
    if (parent == NULL || *parent == '\0' || strlen(parent) + sizeof name > SCRATCH_MAX) {
        parent = "/tmp";
    }
    (void)snprintf(folder, SCRATCH_MAX, "%s%s", parent, name);
    cr_assert_not_null(mkdtemp(folder), "%s", folder);
}

static inline void scratch_remove(const char *folder)
{
    char command[SCRATCH_MAX + 16];
    (void)snprintf(command, sizeof command, "rm -rf '%s'", folder);
    cr_assert_eq(system(command), 0);
}

#endif
