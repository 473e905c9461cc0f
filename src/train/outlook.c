#include "train/outlook.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "kernels/cuda/ops_cuda.h"
#include "store/input.h"
#include "train/products.h"
#include "train/room.h"
#include "train/sampler.h"
#include "weights/quantize.h"

enum { RANKS_MAX = 4096 };

/* ---- inputs ---- */

static qs_status open_index(qs_outlook_inputs *in, const qs_config *cfg, qs_comm *self)
{
    struct stat info;
    QS_TRY(qs_input_expect_here("base", cfg->base, QS_INPUT_BASE ", or name the model's folder"));
    const bool is_dir = stat(cfg->base, &info) == 0 && S_ISDIR(info.st_mode);
    return is_dir ? qs_base_index_expected(&in->index, cfg->base)
                  : qs_base_index_read(&in->index, cfg->base, self);
}

static bool exists(const char *path)
{
    return path[0] != '\0' && access(path, F_OK) == 0;
}

static qs_status open_data(qs_outlook_inputs *in, const qs_config *cfg, qs_comm *self)
{
    const int64_t vocab = in->index->config.vocab;
    in->assumed = !exists(cfg->data_train);
    if (in->assumed) { /* of its length nothing is known */
        QS_TRY(qs_data_assume(&in->train, cfg->train.seq_len));
    } else {
        QS_TRY(qs_data_open(&in->train, cfg->data_train, vocab, cfg->train.seq_len, self));
        QS_TRY(qs_sampler_check(cfg, in->train));
    }
    return exists(cfg->data_eval) ? qs_data_open(&in->eval, cfg->data_eval, vocab, 0, self) : QS_OK;
}

qs_status qs_outlook_open(qs_outlook_inputs *in, const qs_config *cfg)
{
    qs_status st = QS_OK;
    qs_comm *self = NULL;
    *in = (qs_outlook_inputs){0};
    QS_TRY(qs_comm_self_create(&self));
    QS_GOTO(open_index(in, cfg, self));
    QS_GOTO(open_data(in, cfg, self));
done:
    if (st != QS_OK) {
        qs_outlook_close(in);
    }
    qs_comm_destroy(self);
    return st;
}

void qs_outlook_close(qs_outlook_inputs *in)
{
    qs_data_close(in->train);
    qs_data_close(in->eval);
    qs_base_index_free(in->index);
    *in = (qs_outlook_inputs){0};
}

/* ---- one outlook ---- */

/* What a session there would find; nothing in it is owned. */
static qs_status setting_of(qs_setting *on, const qs_outlook_inputs *in, const qs_config *cfg,
                            const qs_outlook_place *place)
{
    char why[256] = "";
    *on = (qs_setting){.config = *cfg,
                       .nranks = place->nranks,
                       .threads = place->threads,
                       .apart = place->gpu != NULL,
                       .room = qs_outlook_allowed(cfg, place),
                       .ops = place->gpu != NULL ? qs_ops_cuda_sizes()
                                                 : qs_products_ops(cfg->cpu.gemm),
                       .index = in->index};
    QS_TRY(qs_lora_layout_make(&on->layout, &in->index->config, cfg));
    const qs_ops_limits limits = qs_setting_limits(on, &(qs_model_shape){0});
    if (!on->ops->takes(&limits, why, sizeof why)) {
        return QS_FAIL(QS_ERR_CONFIG_PAIR, "%s: %s, so not on a GPU", cfg->base, why);
    }
    const qs_fsdp_options options = qs_setting_group_options(on);
    const int per_node = qs_outlook_local_nranks(place);
    if (per_node > 1 && per_node < place->nranks && place->nranks % per_node == 0) {
        on->per_host = per_node;
    }
    const qs_group_links links = place->gpu == NULL
                                     ? (qs_group_links){0}
                                     : qs_group_links_usual(place->gpu, place->nranks, per_node);
    return qs_shard_group_assume(&on->group, cfg, in->index, &options, on->room, place->nranks,
                                 per_node, &links);
}

qs_status qs_outlook_make(qs_outlook *out, const qs_outlook_inputs *in, const qs_config *cfg,
                          const qs_outlook_place *place)
{
    qs_setting on;
    QS_TRY(setting_of(&on, in, cfg, place));
    const int64_t slots = qs_sampler_make(cfg, in->train).slots;
    const qs_plan_job job = qs_plan_training(in->train, in->eval, slots);
    qs_model_shape shape = qs_plan_shape(&on, &job);
    QS_TRY(qs_plan_settle(&out->choice, &on, &job, &shape, NULL));
    out->memory = qs_memory_plan_make(&on, &job, &shape);
    return qs_step_work_make(&out->work, &on, in->train, &shape, slots);
}

size_t qs_outlook_needed(const qs_outlook *outlook)
{
    return qs_memory_plan_needed(&outlook->memory);
}

int qs_outlook_local_nranks(const qs_outlook_place *place)
{
    return place->per_node < place->nranks ? place->per_node : place->nranks;
}

size_t qs_outlook_allowed(const qs_config *cfg, const qs_outlook_place *place)
{
    const size_t there = place->gpu != NULL
                             ? qs_gpu_kind_free_bytes(place->gpu)
                             : qs_room_assume(place->threads, qs_outlook_local_nranks(place)).bytes;
    return qs_room_within(there, cfg->memory.device_limit);
}

/* ---- remedies ---- */

/* Changes of the configuration, those that cost the least time first. */
typedef enum {
    DECODED_0,
    RESIDENT_0,
    PREFETCH_1,
    SELECTIVE,
    FULL,
    GROUP, /* fewer micro-batches a pass */
    MICRO_1,
    OFFLOAD_ACTIVATIONS,
    OFFLOAD_EMBEDDING,
    OFFLOAD_WEIGHTS,
    CHANGES
} change;

typedef struct {
    unsigned set;
    int64_t group; /* with GROUP */
} change_set;

static bool has(change_set changes, change c)
{
    return (changes.set & (1u << c)) != 0;
}

static qs_config changed(const qs_config *cfg, change_set changes)
{
    qs_config out = *cfg;
    out.memory.keep_decoded = has(changes, DECODED_0) ? 0 : out.memory.keep_decoded;
    out.shard.keep_resident = has(changes, RESIDENT_0) ? 0 : out.shard.keep_resident;
    out.shard.prefetch = has(changes, PREFETCH_1) ? 1 : out.shard.prefetch;
    if (has(changes, SELECTIVE) && out.train.recompute == QS_RECOMPUTE_NONE) {
        out.train.recompute = QS_RECOMPUTE_SELECTIVE;
    }
    if (has(changes, FULL)) {
        out.train.recompute = QS_RECOMPUTE_FULL;
    }
    out.train.gather_group = has(changes, GROUP) ? changes.group : out.train.gather_group;
    out.train.micro_batch = has(changes, MICRO_1) ? 1 : out.train.micro_batch;
    out.memory.offload |= has(changes, OFFLOAD_ACTIVATIONS) ? QS_OFFLOAD_ACTIVATIONS : 0;
    out.memory.offload |= has(changes, OFFLOAD_EMBEDDING) ? QS_OFFLOAD_EMBEDDING : 0;
    out.memory.offload |= has(changes, OFFLOAD_WEIGHTS) ? QS_OFFLOAD_WEIGHTS : 0;
    return out;
}

/* Offloaded activations are the layers' inputs: all that `full` keeps (config.c refuses others). */
static bool allowed_pair(const qs_config *cfg)
{
    return (cfg->memory.offload & QS_OFFLOAD_ACTIVATIONS) == 0 ||
           cfg->train.recompute == QS_RECOMPUTE_FULL;
}

static qs_status fits(bool *out, const qs_outlook_inputs *in, const qs_config *cfg,
                      const qs_outlook_place *place)
{
    qs_outlook outlook;
    QS_TRY(qs_outlook_make(&outlook, in, cfg, place));
    *out = qs_outlook_needed(&outlook) <= qs_outlook_allowed(cfg, place);
    return QS_OK;
}

/* Is *changes enough? With GROUP: with the largest group below the configured one that is, past
 * those that save no pass; `auto` has been settled already. */
static qs_status are_enough(bool *out, change_set *changes, const qs_outlook_inputs *in,
                            const qs_config *cfg, const qs_outlook_place *place)
{
    qs_config next = changed(cfg, *changes);
    const int64_t slots = qs_sampler_make(&next, in->train).slots;
    const int64_t per_rank = qs_shard_width(slots, place->nranks);
    *out = false;
    if (!allowed_pair(&next)) {
        return QS_OK;
    }
    if (!has(*changes, GROUP) || cfg->train.gather_group == 0) {
        changes->group = cfg->train.gather_group;
        next.train.gather_group = cfg->train.gather_group;
        return fits(out, in, &next, place);
    }
    changes->group = cfg->train.gather_group - 1;
    changes->group = changes->group < per_rank ? changes->group : per_rank;
    for (; changes->group > 1; changes->group--) {
        next.train.gather_group = changes->group;
        if (qs_plan_saves_pass(per_rank, changes->group)) {
            QS_TRY(fits(out, in, &next, place));
        }
        if (*out) {
            return QS_OK;
        }
    }
    changes->group = next.train.gather_group = 1;
    return fits(out, in, &next, place);
}

/* The fewest of the changes, in their order, that are enough; none: all together are not. */
static qs_status enough_changes(change_set *out, const qs_outlook_inputs *in, const qs_config *cfg,
                                const qs_outlook_place *place)
{
    const int count =
        place->gpu != NULL ? CHANGES : OFFLOAD_ACTIVATIONS; /* the CPU offloads none */
    bool enough = false;
    change_set taken = {0};
    *out = (change_set){0};
    for (int c = 0; c < count && !enough; c++) {
        taken.set |= 1u << c;
        QS_TRY(are_enough(&enough, &taken, in, cfg, place));
    }
    for (int c = 0; c < count && enough; c++) { /* those that turn out not to matter */
        change_set fewer = {.set = taken.set & ~(1u << c)};
        bool still = false;
        QS_TRY(are_enough(&still, &fewer, in, cfg, place));
        taken = still ? fewer : taken;
    }
    *out = enough ? taken : (change_set){0};
    return QS_OK;
}

static void __attribute__((format(printf, 3, 4)))
add_text(char *out, size_t capacity, const char *format, ...)
{
    const size_t used = strlen(out);
    va_list args;
    snprintf(out + used, capacity - used, "%s", used > 0 ? ", " : "");
    const size_t at = strlen(out);
    va_start(args, format);
    vsnprintf(out + at, capacity - at, format, args);
    va_end(args);
}

static void describe_changes(change_set changes, const qs_config *cfg, char *out, size_t capacity)
{
    static const char *const texts[] = {
        [DECODED_0] = "memory.keep_decoded: none", [RESIDENT_0] = "shard.keep_resident: none",
        [PREFETCH_1] = "shard.prefetch: 1",        [SELECTIVE] = "train.recompute: selective",
        [FULL] = "train.recompute: full",          [GROUP] = "train.gather_group: ",
        [MICRO_1] = "train.micro_batch: 1"};
    static const char *const moved[] = {"activations", "weights", "embedding"}; /* bit by bit */
    const qs_config to = changed(cfg, changes);
    out[0] = '\0';
    for (int c = 0; c <= MICRO_1; c++) {
        if (has(changes, (change)c) && c == GROUP) {
            add_text(out, capacity, "%s%lld", texts[c], (long long)changes.group);
        } else if (has(changes, (change)c)) {
            add_text(out, capacity, "%s", texts[c]);
        }
    }
    if (to.memory.offload != cfg->memory.offload) {
        char list[64] = "";
        for (int i = 0; i < 3; i++) {
            if ((to.memory.offload & (1u << i)) != 0) {
                add_text(list, sizeof list, "%s", moved[i]);
            }
        }
        add_text(out, capacity, "memory.offload: [%s]", list);
    }
}

/* The next number of ranks to look at: beyond one node whole nodes, and with shard.group: N the
 * multiples that it asks for. */
static int more_ranks(int nranks, const qs_config *cfg, const qs_outlook_place *place)
{
    const int step = cfg->shard.group > 0       ? (int)cfg->shard.group
                     : nranks < place->per_node ? 1
                                                : place->per_node;
    return (nranks / step + 1) * step;
}

/* The fewest ranks that are enough, 0 if none are: by doubling, then those below that. */
static qs_status enough_ranks(int *out, const qs_outlook_inputs *in, const qs_config *cfg,
                              const qs_outlook_place *place)
{
    qs_outlook_place larger = *place;
    bool enough = false;
    while (!enough && larger.nranks < RANKS_MAX) {
        larger.nranks *= 2;
        QS_TRY(fits(&enough, in, cfg, &larger));
    }
    const int most = larger.nranks;
    *out = enough ? most : 0;
    if (!enough) {
        return QS_OK;
    }
    enough = false;
    for (int n = more_ranks(most / 2, cfg, place); n < most && !enough;
         n = more_ranks(n, cfg, place)) {
        larger.nranks = n;
        QS_TRY(fits(&enough, in, cfg, &larger));
        *out = enough ? n : most;
    }
    return QS_OK;
}

qs_status qs_outlook_find_remedy(qs_outlook_remedy *out, const qs_outlook_inputs *in,
                                 const qs_config *cfg, const qs_outlook_place *place)
{
    change_set changes;
    *out = (qs_outlook_remedy){0};
    QS_TRY(enough_changes(&changes, in, cfg, place));
    describe_changes(changes, cfg, out->settings, sizeof out->settings);
    return enough_ranks(&out->nranks, in, cfg, place);
}
