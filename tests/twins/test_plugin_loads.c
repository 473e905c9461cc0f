/* libqshard_cuda.so as the program loads it, with or without a driver: every symbol is found, the
 * plugin is of this build, and it says in one line why it cannot be used, or how many GPUs there
 * are. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "backend/plugin.h"

static void path_of(const char *file, char *out, size_t capacity)
{
    const char *folder = getenv("QSHARD_BINARY_DIR");
    snprintf(out, capacity, "%s/%s", folder != NULL ? folder : ".", file);
}

static const qs_plugin *load(char *why, size_t capacity)
{
    char path[1024];
    path_of("libqshard_cuda.so", path, sizeof path);
    if (access(path, F_OK) != 0) {
        cr_skip_test("no libqshard_cuda.so: built without nvcc");
    }
    return qs_plugin_load(path, why, capacity);
}

Test(plugin_loads, every_symbol_is_found_and_the_table_is_full)
{
    char why[1024] = "";
    const qs_plugin *plugin = load(why, sizeof why);
    cr_assert_not_null(plugin, "%s", why);
    cr_assert_str_eq(plugin->name, "cuda");
    cr_assert(strstr(plugin->description(), "cuBLASLt") != NULL, "%s", plugin->description());
    /* Tables hold nothing but pointers behind their first members: none may be missing. */
    const qs_ops *ops = plugin->ops();
    const char *first = (const char *)&ops->scratch_bytes, *end = (const char *)(ops + 1);
    for (const char *at = first; at < end; at += sizeof(void *)) {
        void *function = NULL;
        memcpy(&function, at, sizeof function);
        cr_assert_not_null(function, "entry %d of the table", (int)((at - first) / 8));
    }
    cr_assert(plugin->device_open && plugin->comm_create && plugin->gemm);
}

Test(plugin_loads, the_probe_counts_devices_or_says_why_there_are_none)
{
    char why[1024] = "";
    const qs_plugin *plugin = load(why, sizeof why);
    cr_assert_not_null(plugin, "%s", why);
    const int devices = plugin->probe(why, sizeof why);
    if (devices == 0) {
        cr_assert_gt(strlen(why), 20, "'%s'", why);
        cr_assert_null(strchr(why, '\n'));
        qs_device *device = NULL;
        cr_assert_eq(plugin->device_open(&device, 0), QS_ERR_ENVIRONMENT);
        cr_assert_null(device);
        if (access("/proc/driver/nvidia", F_OK) != 0) {
            cr_assert(strstr(why, "driver") != NULL, "without a driver it says so: %s", why);
        }
    }
}

Test(plugin_loads, what_is_no_plugin_is_refused_with_its_name)
{
    char path[1024], why[1024] = "";
    path_of("no_such_plugin.so", path, sizeof path);
    cr_assert_null(qs_plugin_load(path, why, sizeof why));
    cr_assert(strstr(why, "no_such_plugin.so") != NULL, "%s", why);
    cr_assert_null(qs_plugin_load("libm.so.6", why, sizeof why));
    cr_assert(strstr(why, "not a plugin") != NULL, "%s", why);
}

Test(plugin_loads, the_environment_names_another_file)
{
    char path[64] = "", why[1024] = "";
    setenv("QSHARD_PLUGIN", "/nowhere/plugin.so", 1);
    cr_assert_null(qs_plugin_find(why, sizeof why, path, sizeof path));
    cr_assert_str_eq(path, "/nowhere/plugin.so");
    cr_assert(strstr(why, "/nowhere/plugin.so cannot be loaded") != NULL, "%s", why);
}
