#include "backend/plugin.h"

#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char FILE_NAME[] = "libqshard_cuda.so";

const qs_plugin *qs_plugin_load(const char *path, char *why, size_t capacity)
{
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        const char *text = dlerror();
        snprintf(why, capacity, "%s cannot be loaded: %s", path, text ? text : "no reason given");
        return NULL;
    }
    qs_plugin_getter get = NULL;
    void *symbol = dlsym(library, QS_PLUGIN_SYMBOL);
    memcpy(&get, &symbol, sizeof get); /* ISO C has no conversion from object to function */
    const qs_plugin *plugin = get != NULL ? get() : NULL;
    if (plugin == NULL) {
        snprintf(why, capacity, "%s is not a plugin of qshard (it has no %s)", path,
                 QS_PLUGIN_SYMBOL);
    } else if (strcmp(plugin->abi, QS_PLUGIN_ABI) != 0) {
        snprintf(why, capacity,
                 "%s belongs to another build of qshard (it is %s, this program needs %s): build "
                 "and install both together",
                 path, plugin->abi, QS_PLUGIN_ABI);
        plugin = NULL;
    }
    if (plugin == NULL) {
        dlclose(library);
    }
    return plugin;
}

/* The folder of the running program, without the slash; "." if nobody knows. */
static void program_folder(char *out, size_t capacity)
{
    ssize_t length = readlink("/proc/self/exe", out, capacity - 1);
    out[length > 0 ? length : 0] = '\0';
    char *slash = strrchr(out, '/');
    if (slash != NULL) {
        *slash = '\0';
    } else {
        snprintf(out, capacity, ".");
    }
}

const qs_plugin *qs_plugin_find(char *why, size_t capacity, char *path, size_t path_capacity)
{
    static const char *const places[] = {"", "/../lib", "/../lib/qshard"};
    char folder[PATH_MAX], file[PATH_MAX + 64];
    const char *named = getenv("QSHARD_PLUGIN");
    if (named != NULL && *named != '\0') {
        snprintf(file, sizeof file, "%s", named);
    } else {
        program_folder(folder, sizeof folder);
        size_t i = 0;
        for (; i < sizeof places / sizeof *places; i++) {
            snprintf(file, sizeof file, "%s%s/%s", folder, places[i], FILE_NAME);
            if (access(file, F_OK) == 0) {
                break;
            }
        }
        if (i == sizeof places / sizeof *places) {
            snprintf(why, capacity,
                     "%s is not installed beside the program: build it with nvcc in PATH "
                     "(cmake --preset cuda), or name it in QSHARD_PLUGIN",
                     FILE_NAME);
            return NULL;
        }
    }
    if (path != NULL) {
        snprintf(path, path_capacity, "%s", file);
    }
    return qs_plugin_load(file, why, capacity);
}
