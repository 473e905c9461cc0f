/* Which cards a list of architectures has code for, by NVIDIA's rules: machine code runs on its own
 * and on later minor versions of the same major one; that of an "a" architecture on its own alone;
 * virtual code is compiled by the driver for any later card. */
#ifndef QS_DEVICE_CUDA_ARCHS_H
#define QS_DEVICE_CUDA_ARCHS_H

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

/** `list` is CMake's, with spaces: "80-real 90a-real 100-virtual"; no ending means both. */
static inline bool qs_cuda_archs_cover(const char *list, int major, int minor)
{
    const long card = 10L * major + minor;
    for (const char *word = list; *word != '\0';) {
        word += strspn(word, " ");
        char *end = NULL;
        const long arch = strtol(word, &end, 10);
        const size_t length = strcspn(word, " ");
        if (end == word) {
            word += length; /* "native", "all": nothing that can be said here */
            continue;
        }
        const bool only = *end == 'a';
        const char *ending = end + (*end == 'a' || *end == 'f' ? 1 : 0);
        const bool real = strncmp(ending, "-virtual", 8) != 0;
        const bool virtual_too = strncmp(ending, "-real", 5) != 0;
        const bool family = *end == 'f';
        if (card == arch || (real && !only && arch / 10 == card / 10 && card >= arch) ||
            (virtual_too && !only && !family && card >= arch)) {
            return true;
        }
        word += length;
    }
    return false;
}

#endif
