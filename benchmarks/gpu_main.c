#include "gpu_main.h"

#include <stdlib.h>
#include <string.h>

typedef struct {
    const char *plugin, *csv;
} paths;

static bool read_options(int argc, char **argv, gpu_main *g, paths *p)
{
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--small") == 0) {
            g->small = true;
        } else if (strcmp(argv[i], "--csv") == 0 && i + 1 < argc) {
            p->csv = argv[++i];
        } else if (strcmp(argv[i], "--tokens") == 0 && i + 1 < argc &&
                   g->n_tokens < GPU_MAIN_TOKENS_MAX) {
            const int64_t tokens = strtoll(argv[++i], NULL, 10);
            if (tokens < 1) {
                return false;
            }
            g->tokens[g->n_tokens++] = tokens;
        } else if (p->plugin == NULL && argv[i][0] != '-') {
            p->plugin = argv[i];
        } else {
            return false;
        }
    }
    return p->plugin != NULL;
}

static qs_status open_all(gpu_main *g, const paths *p, const char *heading)
{
    char why[1024] = "";
    g->plugin = qs_plugin_load(p->plugin, why, sizeof why);
    if (g->plugin == NULL || g->plugin->probe(why, sizeof why) < 1) {
        return QS_FAIL(QS_ERR_ENVIRONMENT, "%s", why);
    }
    QS_TRY(g->plugin->device_open(&g->device, 0));
    if (p->csv != NULL) {
        g->csv = fopen(p->csv, "w");
        if (g->csv == NULL) {
            return QS_FAIL(QS_ERR_IO, "%s: cannot be written", p->csv);
        }
        (void)fprintf(g->csv, "%s\n", heading);
    }
    printf("# %s\n", qs_device_description(g->device));
    return QS_OK;
}

int gpu_main_run(int argc, char **argv, const char *heading, qs_status (*run)(const gpu_main *g))
{
    gpu_main g = {0};
    paths p = {0};
    if (!read_options(argc, argv, &g, &p)) {
        (void)fprintf(stderr, "usage: %s PLUGIN [--small] [--csv FILE] [--tokens T]...\n", argv[0]);
        return 2;
    }
    qs_status status = open_all(&g, &p, heading);
    status = status == QS_OK ? run(&g) : status;
    qs_error_print(status);
    qs_device_close(g.device);
    if (g.csv != NULL && fclose(g.csv) != 0) {
        (void)fprintf(stderr, "%s: could not be written\n", p.csv);
        return 4;
    }
    return qs_exit_code(status);
}
