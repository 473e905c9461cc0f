#include "backend/backend.h"

#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "backend/cards.h"
#include "backend/plugin.h"
#include "base/log.h"
#include "base/proc.h"

/* What was found, once a process: a plugin stays loaded, and cards do not come and go. */
static struct {
    const qs_plugin *plugin; /* NULL: none was loaded */
    int devices;
    char why[1024]; /* none can be used */
    char description[PATH_MAX + 320];
} found;

static void find(void)
{
    char path[PATH_MAX + 64] = "";
    found.plugin = qs_plugin_find(found.why, sizeof found.why, path, sizeof path);
    if (found.plugin != NULL) {
        snprintf(found.description, sizeof found.description, "%s: %s", path,
                 found.plugin->description());
        found.devices = found.plugin->probe(found.why, sizeof found.why);
    }
}

static void find_once(void)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    (void)pthread_once(&once, find);
}

const char *qs_backend_cuda_missing(void)
{
    find_once();
    return found.devices > 0 ? NULL : found.why;
}

const char *qs_backend_cuda_description(void)
{
    find_once();
    return found.description;
}

int qs_backend_cuda_devices(void)
{
    find_once();
    return found.devices;
}

/* ---- who has which card ---- */

/* This rank's card, and whether ranks would have to share one. */
typedef struct {
    int present, number; /* of GPUs that it sees; which of them is its own */
    int sharing;         /* ranks that have this card, itself included */
    int first, second;   /* the lowest two that would share one; -1: all have their own */
    qs_cards_seen where; /* what the first one sees */
} cards;

static void find_shared(cards *out, const qs_cards_seen *all, const int *chosen, int me, int nranks)
{
    for (int r = 0; r < nranks; r++) {
        out->sharing += qs_cards_share(all, chosen, me, r);
        for (int other = r + 1; other < nranks && out->first < 0; other++) {
            if (qs_cards_share(all, chosen, r, other)) {
                out->first = r;
                out->second = other;
                out->where = all[r];
            }
        }
    }
}

/* What this rank tells the others. */
static qs_status look_at_cards(qs_cards_seen *mine, const qs_comm *host)
{
    *mine = (qs_cards_seen){.local_rank = qs_comm_local_rank(host),
                            .local_nranks = qs_comm_local_nranks(host)};
    qs_host_name(mine->host);
    for (; mine->count < found.devices && mine->count < QS_CARDS_MAX; mine->count++) {
        QS_TRY(found.plugin->card_id(mine->count, mine->ids[mine->count]));
    }
    return QS_OK;
}

/* All ranks tell each other which cards they see, and choose. */
static qs_status choose_card(cards *out, qs_comm *host)
{
    const int nranks = qs_comm_nranks(host), me = qs_comm_rank(host);
    qs_status st = QS_OK;
    qs_cards_seen mine;
    *out = (cards){.first = -1, .second = -1};
    qs_cards_seen *all = calloc((size_t)nranks, sizeof *all);
    int *chosen = calloc((size_t)nranks, sizeof *chosen);
    if (all == NULL || chosen == NULL) {
        st = QS_FAIL(QS_ERR_MEMORY, "memory: the list of GPUs cannot be allocated");
    }
    st = st == QS_OK ? look_at_cards(&mine, host) : st;
    QS_GOTO(qs_comm_agree(host, st));
    QS_GOTO(qs_comm_all_gather_now(host, &mine, all, sizeof mine));
    qs_cards_choose(all, nranks, chosen);
    out->present = all[me].count;
    out->number = chosen[me];
    find_shared(out, all, chosen, me, nranks);
done:
    free(all);
    free(chosen);
    return st;
}

/* One line on why this rank cannot have a GPU; false if it can. Where ranks would share one, the
 * host is named on which they are: any rank may say it. */
static bool cannot_serve(const cards *c, bool allow_shared, char *why, size_t capacity)
{
    if (c->present == 0) {
        snprintf(why, capacity, "%s", found.why);
        return true;
    }
    if (c->first >= 0 && !allow_shared) {
        const qs_cards_seen *w = &c->where;
        snprintf(why, capacity,
                 "%d ranks on %s see %d GPU%s, and ranks %d and %d would share one: start as many "
                 "ranks as GPUs, or let the job see more (CUDA_VISIBLE_DEVICES, the scheduler's "
                 "--gpus-per-node); --allow-shared-device lets ranks share one, which is slow",
                 w->local_nranks, w->host, w->count, w->count == 1 ? "" : "s", c->first, c->second);
        return true;
    }
    return false;
}

/* NCCL takes two ranks with one host and one card for a mistake. Where that is wanted each rank is
 * a host of its own; a value that is set already is the user's. */
static void stand_apart(int local_rank)
{
    char host[QS_HOST_NAME_BYTES], id[sizeof host + 16];
    qs_host_name(host);
    snprintf(id, sizeof id, "%s-%d", host, local_rank);
    (void)setenv("NCCL_HOSTID", id, 0);
}

/* ---- open, close ---- */

qs_status qs_backend_open_gpu(qs_backend *out, int index)
{
    *out = (qs_backend){.device = qs_device_cpu(), .ops = qs_ops_cpu()};
    find_once();
    if (index >= found.devices) {
        return QS_FAIL(QS_ERR_ENVIRONMENT, "GPU %d: there are %d", index, found.devices);
    }
    QS_TRY(found.plugin->device_open(&out->device, index));
    out->ops = found.plugin->ops();
    out->plugin = found.plugin;
    return QS_OK;
}

qs_status qs_backend_open(qs_backend *out, qs_device_kind kind, qs_comm *host, bool allow_shared)
{
    char why[1024] = "";
    cards taken;
    *out = (qs_backend){.device = qs_device_cpu(), .ops = qs_ops_cpu()};
    if (kind == QS_DEVICE_CPU) {
        return QS_OK;
    }
    find_once();
    QS_TRY(choose_card(&taken, host));
    if (!cannot_serve(&taken, allow_shared, why, sizeof why)) {
        if (taken.sharing > 1) {
            stand_apart(qs_comm_local_rank(host));
        }
        return qs_backend_open_gpu(out, taken.number);
    }
    if (kind == QS_DEVICE_CUDA) {
        return QS_FAIL(QS_ERR_ENVIRONMENT,
                       "device: cuda: %s. device: cpu, or auto, computes without a GPU", why);
    }
    if (taken.first >= 0) { /* somebody means to use the GPUs, and waits for ever on the CPU */
        qs_log_warn("device: cpu, since %s", why);
    } else {
        qs_log_info("device: cpu, since %s", why);
    }
    return QS_OK;
}

/* What ranks compare. */
typedef struct {
    int32_t is_host;
    char host[QS_HOST_NAME_BYTES];
    char text[512]; /* the GPU's traits, or why there is none */
} place;

static place describe_place(const qs_device *device)
{
    place p = {.is_host = qs_device_is_host(device)};
    qs_host_name(p.host);
    snprintf(p.text, sizeof p.text, "%.*s", (int)sizeof p.text - 1,
             p.is_host ? found.why : qs_device_traits(device));
    return p;
}

/* Rank 0's place beside the first other one. */
static qs_status compare_places(const place *all, int nranks)
{
    for (int r = 1; r < nranks; r++) {
        if (all[r].is_host != all[0].is_host) {
            const int lacking = all[0].is_host ? 0 : r;
            return QS_FAIL(QS_ERR_DISAGREE,
                           "device: auto finds a GPU on some hosts only; rank %d on %s has none, "
                           "since %s; set device: cpu, or leave that host out (qshard doctor)",
                           lacking, all[lacking].host, all[lacking].text);
        }
    }
    for (int r = 1; r < nranks; r++) {
        if (strcmp(all[r].text, all[0].text) != 0 && !all[0].is_host) {
            qs_log_warn("GPUs or their libraries differ: rank 0 on %s has %s; rank %d on %s has "
                        "%s. The bits of the loss depend on which rank computes what: do not count "
                        "on the same ones from another number of ranks",
                        all[0].host, all[0].text, r, all[r].host, all[r].text);
            break;
        }
    }
    return QS_OK;
}

qs_status qs_backend_check_alike(const qs_backend *backend, qs_comm *host)
{
    const int nranks = qs_comm_nranks(host);
    const place mine = describe_place(backend->device);
    qs_status st = QS_OK;
    place *all = calloc((size_t)nranks, sizeof *all);
    if (all == NULL) {
        st = QS_FAIL(QS_ERR_MEMORY, "memory: the list of devices cannot be allocated");
    }
    QS_GOTO(qs_comm_agree(host, st));
    QS_GOTO(qs_comm_all_gather_now(host, &mine, all, sizeof mine));
    st = qs_comm_agree(host, compare_places(all, nranks));
done:
    free(all);
    return st;
}

void qs_backend_close(qs_backend *backend)
{
    qs_device_close(backend->device);
    *backend = (qs_backend){0};
}

qs_status qs_backend_comm(qs_comm **out, const qs_backend *backend, qs_comm *host)
{
    if (backend->plugin == NULL) {
        *out = host;
        return QS_OK;
    }
    if (qs_comm_nranks(host) == 1) {
        return qs_comm_self_create(out); /* nobody to talk to: one GPU needs no NCCL */
    }
    return backend->plugin->comm_create(out, host, backend->device);
}

void qs_backend_comm_destroy(qs_comm *comm, const qs_comm *host)
{
    if (comm != host) {
        qs_comm_destroy(comm);
    }
}
