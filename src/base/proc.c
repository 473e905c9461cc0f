#define _GNU_SOURCE /* fopen's "e" */
#include "base/proc.h"

#include <stdio.h>
#include <string.h>

void qs_proc_value(const char *path, const char *key, char *out, size_t capacity)
{
    char text[512];
    FILE *file = fopen(path, "re");
    out[0] = '\0';
    while (file && fgets(text, sizeof text, file)) {
        const char *colon = strchr(text, ':');
        if (colon && strncmp(text, key, strlen(key)) == 0) {
            colon += 1 + strspn(colon + 1, " \t");
            snprintf(out, capacity, "%.*s", (int)strcspn(colon, "\n"), colon);
            break;
        }
    }
    if (file) {
        fclose(file);
    }
}
