#include "device/gpu_kinds.h"

#include <ctype.h>
#include <stdio.h>
#include <string.h>

#define PCIE4 "PCIe 4.0 x16", 31.5
#define PCIE5 "PCIe 5.0 x16", 63.0

const qs_gpu_kind qs_gpu_kinds[] = {
    {"RTX3090", {"NVIDIA GeForce RTX 3090"}, 71.0, 936, 24, PCIE4},
    {"RTX4090", {"NVIDIA GeForce RTX 4090"}, 165.2, 1008, 24, PCIE4},
    {"RTX5090", {"NVIDIA GeForce RTX 5090"}, 209.5, 1792, 32, PCIE5},
    {"A6000", {"NVIDIA RTX A6000"}, 154.8, 768, 48, PCIE4},
    {"L40S", {"NVIDIA L40S"}, 362.0, 864, 45, PCIE4}, /* ECC is on and takes 3 of 48 */
    {"A100-40", {"NVIDIA A100-SXM4-40GB"}, 312.0, 1555, 40, "NVLink 3", 300},
    {"A100-80", {"NVIDIA A100-SXM4-80GB"}, 312.0, 2039, 80, "NVLink 3", 300},
    {"H100", {"NVIDIA H100 80GB HBM3"}, 989.4, 3350, 80, "NVLink 4", 450},
    {"H200", {"NVIDIA H200"}, 989.4, 4800, 140, "NVLink 4", 450},
    {"B200", {"NVIDIA B200"}, 2250.0, 7700, 179, "NVLink 5", 900},
};
const int qs_gpu_kinds_count = (int)(sizeof qs_gpu_kinds / sizeof *qs_gpu_kinds);

enum { NAME_MAX_BYTES = 64 };
static const double GIB = 1073741824.0;

/* ---- names ---- */

static void drop_front(char *name, const char *word)
{
    const size_t length = strlen(word);
    if (strncmp(name, word, length) == 0) {
        memmove(name, name + length, strlen(name + length) + 1);
    }
}

/* "NVIDIA A100 80GB" and "a100-80" are both "a10080". */
static void simplify(const char *name, char out[NAME_MAX_BYTES])
{
    size_t n = 0;
    for (const char *p = name; *p != '\0' && n < NAME_MAX_BYTES - 1; p++) {
        if (isalnum((unsigned char)*p)) {
            out[n++] = (char)tolower((unsigned char)*p);
        }
    }
    out[n] = '\0';
    drop_front(out, "nvidia");
    drop_front(out, "geforce");
    drop_front(out, "rtx");
    n = strlen(out);
    if (n > 2 && strcmp(out + n - 2, "gb") == 0) {
        out[n - 2] = '\0';
    }
}

const qs_gpu_kind *qs_gpu_kind_find(const char *name)
{
    char wanted[NAME_MAX_BYTES], known[NAME_MAX_BYTES];
    simplify(name, wanted);
    for (int i = 0; i < qs_gpu_kinds_count; i++) {
        simplify(qs_gpu_kinds[i].name, known);
        if (strcmp(wanted, known) == 0) {
            return &qs_gpu_kinds[i];
        }
    }
    return NULL;
}

const qs_gpu_kind *qs_gpu_kind_of(const char *description)
{
    const char *end = strstr(description, ", sm_");
    const size_t length = end != NULL ? (size_t)(end - description) : strlen(description);
    for (int i = 0; i < qs_gpu_kinds_count; i++) {
        for (int m = 0; m < QS_GPU_MODELS_MAX && qs_gpu_kinds[i].models[m] != NULL; m++) {
            const char *model = qs_gpu_kinds[i].models[m];
            if (strlen(model) == length && strncmp(description, model, length) == 0) {
                return &qs_gpu_kinds[i];
            }
        }
    }
    return NULL;
}

void qs_gpu_kind_names(char *out, size_t capacity)
{
    size_t used = 0;
    out[0] = '\0';
    for (int i = 0; i < qs_gpu_kinds_count && used < capacity; i++) {
        used += (size_t)snprintf(out + used, capacity - used, "%s%s", i > 0 ? ", " : "",
                                 qs_gpu_kinds[i].name);
    }
}

/* ---- memory ---- */

size_t qs_gpu_kind_free_bytes(const qs_gpu_kind *kind)
{
    const double usable = 0.97; /* 0.7 of 24 GiB: the driver's own and a context */
    return (size_t)(kind->memory_gib * usable * GIB);
}
