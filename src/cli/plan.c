/* qshard plan: what a run would hold and how long its steps would take, on GPUs that need not be
 * here. */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "base/cores.h"
#include "cli/cli_impl.h"
#include "hf/hf_text_part.h"
#include "train/outlook.h"
#include "train/room.h"
#include "train/sampler.h"

#define GIB 1073741824.0
enum { USUAL_PER_NODE = 8, LAUNCH_TOKENS = 1000 };
static const double OFFER_BELOW = 0.98; /* of a step's time: what is worth a line */

/* A plan that is being printed. */
typedef struct {
    const char *path; /* of the configuration */
    qs_config config;
    qs_outlook_inputs inputs;
    int nranks, per_node;
    double link_gbps[QS_CLI_LINKS_MAX]; /* 0: what is usual */
} plan;

/* ---- what is asked ---- */

static qs_status unknown_gpu(const char *name)
{
    char known[256];
    qs_gpu_kind_names(known, sizeof known);
    return QS_FAIL(QS_ERR_USAGE, "--gpu: \"%.40s\" is not known; known are %s", name, known);
}

static qs_status understand(plan *p, const qs_cli_args *args)
{
    p->path = args->words[0];
    p->nranks = args->gpus > 0 ? (int)args->gpus : 1;
    p->per_node = args->per_node > 0 ? (int)args->per_node : USUAL_PER_NODE;
    for (int i = 0; i < QS_CLI_LINKS_MAX; i++) {
        p->link_gbps[i] = args->link_gbps[i];
    }
    QS_TRY(qs_config_load(&p->config, p->path, args->sets, args->n_sets));
    return qs_outlook_open(&p->inputs, &p->config);
}

static int local_nranks(const plan *p)
{
    return qs_outlook_local_nranks(
        &(qs_outlook_place){.nranks = p->nranks, .per_node = p->per_node});
}

static qs_outlook_place place_of(const plan *p, const qs_gpu_kind *gpu)
{
    int threads = (int)p->config.cpu.threads;
    if (threads == 0) {
        threads = qs_cores_available() / local_nranks(p);
    }
    return (qs_outlook_place){.gpu = gpu,
                              .nranks = p->nranks,
                              .per_node = p->per_node,
                              .threads = threads > 1 ? threads : 1};
}

static qs_links links_of(const plan *p, const qs_gpu_kind *gpu)
{
    qs_links links = qs_links_usual(gpu, p->per_node);
    links.in_node_gbps = p->link_gbps[0] > 0 ? p->link_gbps[0] : links.in_node_gbps;
    links.between_gbps = p->link_gbps[1] > 0 ? p->link_gbps[1] : links.between_gbps;
    return links;
}

/* ---- what is printed ---- */

static void print_inputs(const plan *p)
{
    const qs_hf_config *model = &p->inputs.index->config;
    const qs_data *data = p->inputs.train;
    char name[QS_HF_NAME_BYTES];
    qs_hf_config_name(model, name);
    printf("%s: %s, %d layers, hidden %" PRId64 ", vocabulary %" PRId64 "\n", p->config.base, name,
           model->n_layers, model->hidden, model->vocab);
    if (p->inputs.assumed) {
        printf("%s is not there: sequences of %" PRId64 " tokens, all with loss, are assumed\n",
               p->config.data_train[0] != '\0' ? p->config.data_train : "data.train",
               data->seq_len);
    } else {
        printf("%s: %.0f tokens a sequence, %.0f with loss\n", data->path,
               (double)data->n_tokens / (double)data->n_sequences,
               (double)data->n_targets / (double)data->n_sequences);
    }
    printf("global_batch %" PRId64 ", micro_batch %" PRId64 ", recompute %s; %d rank%s\n\n",
           p->config.train.global_batch, p->config.train.micro_batch,
           p->config.train.recompute == QS_RECOMPUTE_FULL        ? "full"
           : p->config.train.recompute == QS_RECOMPUTE_SELECTIVE ? "selective"
                                                                 : "none",
           p->nranks, p->nranks == 1 ? "" : "s");
}

/* Two digits at least: slow networks have tenths. */
static void print_rate(double gbps, const char *where)
{
    printf(gbps < 10 ? " %.2g GB/s %s" : " %.0f GB/s %s", gbps, where);
}

/* "16 x H100 (NVLink 4), 8 a node: 360 GB/s inside, 20 GB/s between nodes" */
static void print_place(const plan *p, const qs_gpu_kind *gpu, const qs_links *links, int group)
{
    printf("%d x %s (%s)", p->nranks, gpu->name, gpu->link);
    if (p->nranks > 1) {
        printf(", %d a node:", local_nranks(p));
        print_rate(links->in_node_gbps, "inside");
    }
    if (p->nranks > p->per_node) {
        printf(",");
        print_rate(links->between_gbps, "between nodes");
    }
    if (group < p->nranks) {
        printf("; %d rank%s share%s a copy of the base", group, group == 1 ? "" : "s",
               group == 1 ? "s" : "");
    }
    printf("\n");
}

/* Launches are not in the forecast (docs/planning.md). */
static void print_short_batches(const plan *p, const qs_step_work *work)
{
    const double tokens = work->all_tokens / (double)p->config.train.global_batch *
                          (double)p->config.train.micro_batch;
    if (tokens < LAUNCH_TOKENS) {
        printf("a micro-batch has %.0f tokens: below about %d a GPU waits for the host's launches, "
               "and a step takes longer than the forecast\n",
               tokens, LAUNCH_TOKENS);
    }
}

static void describe_kept(const char *name, const qs_plan_kept *kept, const char *how, char *out,
                          size_t capacity)
{
    snprintf(out, capacity, "%s: auto, %" PRId64 " of %" PRId64 " layers stay %s", name,
             kept->layers, kept->of, how);
}

/* What makes steps shorter where it can: memory that is left, and a little exactness. */
typedef enum { KEEP_RESIDENT, KEEP_DECODED, RESIDUAL_BF16, OFFERS } offer;

/* Change the configuration; was it left open there? */
static bool take_offer(offer what, qs_config *config)
{
    if (what == RESIDUAL_BF16) {
        const bool open = config->train.residual_fp32;
        config->train.residual_fp32 = false;
        return open;
    }
    int64_t *const kept =
        what == KEEP_RESIDENT ? &config->shard.keep_resident : &config->memory.keep_decoded;
    const bool open = *kept == 0;
    *kept = QS_KEEP_AUTO;
    return open;
}

static void describe_offer(offer what, const qs_plan_choice *choice, char *out, size_t capacity)
{
    switch (what) {
    case KEEP_RESIDENT:
        describe_kept("shard.keep_resident", &choice->resident, "whole", out, capacity);
        break;
    case KEEP_DECODED:
        describe_kept("memory.keep_decoded", &choice->decoded, "decoded", out, capacity);
        break;
    default:
        snprintf(out, capacity, "train.residual_fp32: false, losses further from fp32's");
    }
}

/* What a step would be with each, if that is shorter. */
static qs_status print_offers(const plan *p, const qs_outlook_place *place, double step_s)
{
    const qs_links links = links_of(p, place->gpu);
    for (int what = 0; what < OFFERS; what++) {
        qs_outlook more;
        char text[96];
        qs_config config = p->config;
        if (!take_offer((offer)what, &config)) {
            continue;
        }
        QS_TRY(qs_outlook_make(&more, &p->inputs, &config, place));
        const double then_s = qs_forecast_make(&more.work, place->gpu, &links).step_s;
        if (then_s < OFFER_BELOW * step_s) {
            describe_offer((offer)what, &more.choice, text, sizeof text);
            printf("with %s: %.1f ms, %.1f GiB\n", text, 1e3 * then_s,
                   (double)qs_outlook_needed(&more) / GIB);
        }
    }
    return QS_OK;
}

/* Of how many steps the run is made nobody knows before its data are there, unless it says so. */
static void print_whole_run(const plan *p, double step_s)
{
    if (p->inputs.assumed && p->config.train.steps == 0) {
        return;
    }
    const int64_t steps = qs_sampler_make(&p->config, p->inputs.train).steps;
    const double seconds = (double)steps * step_s;
    const double unit_s = seconds >= 3600 ? 3600 : seconds >= 60 ? 60 : 1;
    printf("the run's %" PRId64 " steps take %.1f %s, without evaluations and checkpoints\n", steps,
           seconds / unit_s,
           unit_s > 60  ? "hours"
           : unit_s > 1 ? "minutes"
                        : "seconds");
}

static qs_status print_step(const plan *p, const qs_outlook_place *place, const qs_step_work *work)
{
    const qs_gpu_kind *gpu = place->gpu;
    const qs_links links = links_of(p, gpu);
    const qs_forecast f = qs_forecast_make(work, gpu, &links);
    print_place(p, gpu, &links, work->group);
    printf("%-28s %12s\n", "forecast of a step", "ms");
    printf(
        "  %-26s %12.1f   products %.1f (%.4g TFLOP with attention), attention %.1f, memory %.1f\n",
        "compute", 1e3 * f.compute_s, 1e3 * f.product_s, qs_step_flops(work) / 1e12,
        1e3 * f.attention_s, 1e3 * f.memory_s);
    printf("  %-26s %12.1f   %.4g GB received; %.1f ms of it behind compute\n", "gather",
           1e3 * f.gather_waited_s, qs_step_gather_bytes(work) / 1e9,
           1e3 * (f.gather_s - f.gather_waited_s));
    printf("  %-26s %12.1f   %.4g GB received\n", "reduce", 1e3 * f.reduce_s,
           work->reduce_bytes / 1e9);
    printf("  %-26s %12.1f   %.0f tokens/s, %.0f a GPU\n", "step", 1e3 * f.step_s,
           work->all_tokens / f.step_s, work->all_tokens / f.step_s / p->nranks);
    print_whole_run(p, f.step_s);
    print_short_batches(p, work);
    return print_offers(p, place, f.step_s);
}

/* What `auto` stands for where memory decided it, each with the reason. */
static void print_reasons(const qs_plan_choice *choice)
{
    char reasons[QS_PLAN_REASONS_MAX][QS_PLAN_REASON_BYTES];
    const int count = qs_plan_reasons(choice, reasons);
    for (int i = 0; i < count; i++) {
        printf("%s%s", reasons[i], i < count - 1 ? "\n" : "\n\n");
    }
}

static qs_status print_kinds_row(const plan *p, const qs_gpu_kind *gpu, bool *any)
{
    qs_outlook outlook;
    const qs_links links = links_of(p, gpu);
    const qs_outlook_place place = place_of(p, gpu);
    QS_TRY(qs_outlook_make(&outlook, &p->inputs, &p->config, &place));
    const qs_forecast f = qs_forecast_make(&outlook.work, gpu, &links);
    const size_t needed = qs_outlook_needed(&outlook);
    const size_t allowed = qs_outlook_allowed(&p->config, &place);
    printf("%-10s %10.1f %10.1f %12" PRId64 " %6s", gpu->name, (double)needed / GIB,
           (double)allowed / GIB, outlook.choice.group, needed <= allowed ? "yes" : "no");
    if (needed <= allowed) {
        printf(" %12.1f %12.0f", 1e3 * f.step_s, outlook.work.all_tokens / f.step_s);
        *any = true;
    }
    printf("\n");
    return QS_OK;
}

/* ---- does it fit? ---- */

/* Who allows what a rank may have, what gives more of it, and what would have more. */
typedef struct {
    char name[QS_ROOM_TEXT_MAX];
    const char *remedy, *larger;
} grant;

static void find_grant(const plan *p, const qs_outlook_place *place, size_t allowed, grant *out)
{
    out->remedy = "";
    out->larger = "a larger memory.device_limit";
    snprintf(out->name, sizeof out->name, "memory.device_limit");
    if (place->gpu != NULL) {
        if (allowed == qs_gpu_kind_free_bytes(place->gpu)) {
            snprintf(out->name, sizeof out->name, "%s", place->gpu->name);
            out->larger = "larger GPUs";
        }
        return;
    }
    const qs_room room = qs_room_assume(place->threads, local_nranks(p));
    if (p->config.memory.device_limit == 0 || (size_t)p->config.memory.device_limit > room.bytes) {
        qs_room_describe(&room, out->name, sizeof out->name);
        out->remedy = qs_limit_remedy(&room.limit);
        out->larger = "hosts with more memory";
    }
}

static qs_status does_not_fit(const plan *p, const qs_outlook_place *place, const grant *who,
                              size_t needed, size_t allowed)
{
    qs_outlook_remedy remedy;
    char text[384] = "";
    QS_TRY(qs_outlook_find_remedy(&remedy, &p->inputs, &p->config, place));
    if (remedy.settings[0] != '\0') {
        snprintf(text, sizeof text, "it fits with %s%s", remedy.settings,
                 remedy.nranks > 0 ? ", or " : "");
    }
    if (remedy.nranks > 0) {
        const size_t used = strlen(text);
        snprintf(text + used, sizeof text - used, "%son %d ranks", used > 0 ? "" : "it fits ",
                 remedy.nranks);
    }
    if (text[0] == '\0') {
        snprintf(text, sizeof text,
                 "no setting and no number of ranks makes it fit: lower train.seq_len or "
                 "lora.rank, or take %s",
                 who->larger);
    }
    return QS_FAIL(QS_ERR_MEMORY, "%s: a rank needs %.1f GiB and has %.1f (%s%s%s): %s", p->path,
                   (double)needed / GIB, (double)allowed / GIB, who->name,
                   who->remedy[0] != '\0' ? "; " : "", who->remedy, text);
}

static qs_status judge(const plan *p, const qs_outlook *outlook, const qs_outlook_place *place)
{
    const size_t needed = qs_outlook_needed(outlook);
    const size_t allowed = qs_outlook_allowed(&p->config, place);
    grant who;
    find_grant(p, place, allowed, &who);
    if (needed > allowed) {
        return does_not_fit(p, place, &who, needed, allowed);
    }
    printf("fits: a rank needs %.1f GiB%s and has %.1f (%s)\n\n", (double)needed / GIB,
           place->gpu == NULL ? ""
           : p->nranks > 1    ? " with code and NCCL"
                              : " with code",
           (double)allowed / GIB, who.name);
    return QS_OK;
}

/* ---- the three answers: one kind, all kinds, the CPU ---- */

static qs_status plan_on(const plan *p, const qs_gpu_kind *gpu)
{
    qs_outlook outlook;
    const qs_outlook_place place = place_of(p, gpu);
    QS_TRY(qs_outlook_make(&outlook, &p->inputs, &p->config, &place));
    print_reasons(&outlook.choice);
    qs_memory_plan_print(&outlook.memory, false);
    QS_TRY(judge(p, &outlook, &place));
    if (gpu != NULL) {
        return print_step(p, &place, &outlook.work);
    }
    printf("no forecast of the time: it is made for GPUs; --gpu names one\n");
    return QS_OK;
}

static const qs_gpu_kind *largest_kind(void)
{
    const qs_gpu_kind *largest = &qs_gpu_kinds[0];
    for (int i = 1; i < qs_gpu_kinds_count; i++) {
        largest = qs_gpu_kinds[i].memory_gib > largest->memory_gib ? &qs_gpu_kinds[i] : largest;
    }
    return largest;
}

/* The table is that of the largest card; what a rank holds on others, `auto` may make less. */
static qs_status plan_on_all(const plan *p)
{
    qs_outlook outlook;
    bool any = false;
    const qs_outlook_place best = place_of(p, largest_kind());
    QS_TRY(qs_outlook_make(&outlook, &p->inputs, &p->config, &best));
    print_reasons(&outlook.choice);
    qs_memory_plan_print(&outlook.memory, false);
    printf("\n%-10s %10s %10s %12s %6s %12s %12s\n", "GPU", "needed GiB", "has GiB", "gather_group",
           "fits", "step ms", "tokens/s");
    for (int i = 0; i < qs_gpu_kinds_count; i++) {
        QS_TRY(print_kinds_row(p, &qs_gpu_kinds[i], &any));
    }
    print_short_batches(p, &outlook.work);
    return any ? QS_OK : judge(p, &outlook, &best);
}

qs_status qs_cli_plan(const qs_cli_args *args, qs_comm *comm)
{
    (void)comm;
    plan p = {0};
    const qs_gpu_kind *gpu = args->gpu != NULL ? qs_gpu_kind_find(args->gpu) : NULL;
    if (args->gpu != NULL && gpu == NULL) {
        return unknown_gpu(args->gpu);
    }
    QS_TRY(understand(&p, args));
    print_inputs(&p);
    const bool one = gpu != NULL || p.config.device == QS_DEVICE_CPU;
    const qs_status st = one ? plan_on(&p, gpu) : plan_on_all(&p);
    qs_outlook_close(&p.inputs);
    return st;
}
