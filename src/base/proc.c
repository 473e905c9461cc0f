#define _GNU_SOURCE /* fopen's "e", gethostname */
#include "base/proc.h"

#include <stdio.h>
#include <string.h>
#include <unistd.h>

void qs_host_name(char out[QS_HOST_NAME_BYTES])
{
    memset(out, 0, QS_HOST_NAME_BYTES);
    if (gethostname(out, QS_HOST_NAME_BYTES) != 0 || out[0] == '\0') {
        snprintf(out, QS_HOST_NAME_BYTES, "(unknown)");
    }
}

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

/* FNV-1a. */
uint64_t qs_proc_file_number(const char *path)
{
    const uint64_t basis = UINT64_C(0xcbf29ce484222325);
    uint64_t hash = basis;
    FILE *file = fopen(path, "re");
    if (file != NULL) {
        for (int c = fgetc(file); c != EOF; c = fgetc(file)) {
            hash = (hash ^ (uint64_t)c) * UINT64_C(0x100000001b3);
        }
        fclose(file);
    }
    return hash != basis ? hash : 0;
}

uint64_t qs_proc_host_number(void)
{
    return qs_proc_file_number("/proc/sys/kernel/random/boot_id");
}
