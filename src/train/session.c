#include "train/session.h"

#include <stdio.h>
#include <string.h>

#include "base/cores.h"
#include "base/log.h"
#include "base/proc.h"
#include "store/input.h"
#include "train/products.h"

/* The CPU's operations take every model, a GPU's may not: said before anything is loaded. */
static qs_status check_model_taken(qs_session *s)
{
    char why[256] = "";
    const qs_ops_limits model = qs_setting_limits(&s->on, &(qs_model_shape){0});
    if (s->backend.ops->takes(&model, why, sizeof why)) {
        return QS_OK;
    }
    if (s->on.config.device == QS_DEVICE_CUDA) {
        return QS_FAIL(
            QS_ERR_CONFIG_PAIR,
            "%s: %s, so not with device: cuda; device: cpu, or auto, computes without a GPU",
            s->on.config.base, why);
    }
    qs_log_info("device: cpu, since %s: %s", s->on.config.base, why);
    qs_backend_close(&s->backend);
    return qs_backend_open(&s->backend, QS_DEVICE_CPU, s->comm, false);
}

/* What cpu.gemm says, on a CPU. */
static qs_status choose_products(qs_session *s)
{
    qs_gemm_kind *gemm = &s->on.config.cpu.gemm;
    if (qs_device_is_host(s->device)) {
        return qs_products_choose(s->comm, gemm, &s->on.ops);
    }
    if (*gemm != QS_GEMM_STRICT && *gemm != QS_GEMM_AUTO) {
        qs_log_warn("cpu.gemm: %s is for the CPU and has no effect with device: cuda",
                    qs_products_name(*gemm));
    }
    *gemm = QS_GEMM_STRICT;
    return QS_OK;
}

static qs_status open_device(qs_session *s)
{
    const qs_config *config = &s->on.config;
    QS_TRY(qs_comm_agree(s->comm, qs_backend_open(&s->backend, config->device, s->comm,
                                                  config->allow_shared_device)));
    QS_TRY(qs_comm_agree(s->comm, check_model_taken(s)));
    s->device = s->backend.device;
    s->on.ops = s->backend.ops;
    if (config->device != QS_DEVICE_CPU) {
        QS_TRY(qs_backend_check_alike(&s->backend, s->comm));
    }
    QS_TRY(choose_products(s));
    s->on.apart = !qs_device_is_host(s->device);
    s->on.config.device = s->on.apart ? QS_DEVICE_CUDA : QS_DEVICE_CPU;
    QS_TRY(qs_comm_threads(s->comm, (int)config->cpu.threads, &s->on.threads));
    return qs_comm_agree(s->comm, qs_queue_create_on(s->device, &s->queue, s->on.threads));
}

/* Scaling by length: which it is, since the run's length decides, not each sequence's. */
static void describe_rope(const qs_session *s)
{
    const qs_hf_config *model = &s->on.index->config;
    const long long length = s->on.config.train.seq_len,
                    original = model->rope_original_max_position;
    if (model->rope_type == QS_ROPE_LONGROPE) {
        qs_log_info("RoPE: longrope by the %s factors: train.seq_len %lld, original length %lld",
                    length > original ? "long" : "short", length, original);
    } else if (model->rope_type == QS_ROPE_DYNAMIC && length > model->max_position) {
        qs_log_info("RoPE: dynamic scaling to train.seq_len %lld, beyond %lld", length,
                    (long long)model->max_position);
    }
}

/* With --verbose: what the launcher has made of the request, by every rank. */
static void describe_place(const qs_session *s)
{
    char host[QS_HOST_NAME_BYTES];
    qs_host_name(host);
    qs_log_debug("on host %s: local rank %d of %d, %d cores%s, %d threads", host,
                 qs_comm_local_rank(s->comm), qs_comm_local_nranks(s->comm), qs_cores_available(),
                 qs_cores_bound() ? " (bound)" : "", s->on.threads);
}

/* What --map-by node and -m cyclic cost. */
static void warn_of_turns(const qs_session *s)
{
    if (qs_comm_in_turns(s->comm)) {
        qs_log_warn("ranks are dealt out to the hosts in turns: every rank sends its gradients to "
                    "other hosts, where each host would send one sum, and shard.group: N cuts "
                    "across hosts; start neighbours on one host: mpirun --map-by slot, srun -m "
                    "block");
    }
}

static void describe(const qs_session *s)
{
    const int nranks = qs_comm_nranks(s->comm);
    qs_log_info("%s: %d layers, hidden %lld, vocabulary %lld; %d rank%s (%s), kernels %s",
                s->on.config.base, s->on.index->config.n_layers,
                (long long)s->on.index->config.hidden, (long long)s->on.index->config.vocab, nranks,
                nranks > 1 ? "s" : "", qs_comm_name(s->comm), s->on.ops->name);
    describe_rope(s);
    if (qs_device_is_host(s->device)) {
        const int threads = qs_queue_threads(s->queue);
        qs_log_info("cpu: %d thread%s a rank", threads, threads > 1 ? "s" : "");
    } else {
        qs_log_info("%s: %s", qs_device_name(s->device), qs_device_description(s->device));
    }
}

qs_status qs_session_open(qs_session *s, const qs_config *config, qs_comm *comm)
{
    memset(s, 0, sizeof *s);
    s->on.config = *config;
    s->comm = comm;
    s->on.nranks = qs_comm_nranks(comm);
    s->on.per_host = qs_comm_per_host(comm);
    QS_TRY(qs_watchdog_start(&s->watchdog, config->train.stall_limit, comm));
    QS_TRY(qs_input_expect("base", config->base, QS_INPUT_BASE, comm));
    QS_TRY(qs_base_index_read(&s->on.index, config->base, comm));
    QS_TRY(open_device(s));
    describe(s);
    warn_of_turns(s);
    describe_place(s);
    const qs_fsdp_options options = qs_setting_group_options(&s->on);
    QS_TRY(qs_room_on_host(&s->host, s->on.threads, comm));
    s->on.room = qs_room_here(s->device, &s->host, config->memory.device_limit);
    const qs_group_links usual = qs_group_links_usual(
        qs_gpu_kind_of(qs_device_description(s->device)), s->on.nranks, qs_comm_local_nranks(comm));
    return qs_shard_group_make(&s->shard, &s->on.group, config, s->on.index, &options, s->on.room,
                               s->on.apart ? &usual : NULL, comm);
}

qs_status qs_session_load_adapter(qs_session *s, const char *path)
{
    return path == NULL || path[0] == '\0' ? QS_OK
                                           : qs_lora_vector_load(&s->lora, &s->on, path, s->comm);
}

/* ---- what is built for a shape ---- */

static qs_status connect_group(qs_session *s, const qs_setting_parts *parts)
{
    s->base_comm = s->device_comm;
    if (parts->group == 0) {
        return QS_OK;
    }
    s->base_comm = NULL;
    return qs_comm_agree_after(s->comm, s->shard.comm,
                               qs_backend_comm(&s->base_comm, &s->backend, s->shard.comm));
}

/* Gradients and LoRA's new weights take two levels where hosts have several ranks each. The group
 * that shares the base serves inside of a host if it is that. */
static qs_status connect_levels(qs_session *s, const qs_setting_parts *parts)
{
    const bool opens = parts->inside > 0;
    QS_TRY(qs_backend_levels_open(&s->levels, &s->backend, s->comm, s->device_comm,
                                  opens ? NULL : s->shard.comm, opens ? NULL : s->base_comm));
    if (parts->across > 0) {
        qs_log_info(
            "LoRA: sums and weights inside of each host first, then between %d hosts of %d ranks",
            parts->across, s->on.per_host);
    }
    return QS_OK;
}

/* With --verbose: what NCCL takes memory for, to be compared with the plan. */
static void describe_nccl(const qs_session *s)
{
    const qs_comm *comms[QS_SESSION_COMMS_MAX];
    int count = 0;
    for (int i = qs_session_comms(s, comms) - 1; i >= 0; i--) {
        count += strcmp(qs_comm_name(comms[i]), "nccl") == 0;
    }
    if (s->on.apart) {
        qs_log_debug("NCCL: %d communicator%s", count, count == 1 ? "" : "s");
    }
}

qs_status qs_session_connect(qs_session *s, const qs_model_shape *shape, bool trained)
{
    const qs_ops_limits limits = qs_setting_limits(&s->on, shape);
    const qs_setting_parts parts = qs_setting_parts_of(&s->on, trained);
    /* a rank that NCCL did not connect in time has nobody to agree with */
    QS_TRY(qs_comm_agree_after(s->comm, s->comm,
                               qs_backend_comm(&s->device_comm, &s->backend, s->comm)));
    QS_TRY(connect_group(s, &parts));
    if (trained) {
        QS_TRY(connect_levels(s, &parts));
    }
    describe_nccl(s);
    qs_status st = s->on.ops->open(s->queue, &limits);
    s->ops_open = st == QS_OK;
    if (st == QS_OK) {
        st = qs_lora_vector_prepare(&s->lora, &s->on, s->queue, trained);
    }
    return qs_comm_agree(s->comm, st);
}

qs_status qs_session_build(qs_session *s, const qs_model_shape *shape)
{
    const qs_fsdp_options options = qs_setting_fsdp_options(&s->on, shape);
    QS_TRY(qs_comm_agree_after(
        s->comm, s->base_comm,
        qs_fsdp_create(&s->fsdp, s->on.index, s->base_comm, s->queue, &options)));
    return qs_comm_agree(s->comm, qs_model_create(&s->model, s->on.index, s->fsdp, s->on.ops,
                                                  s->queue, &s->on.layout, s->lora.weights,
                                                  s->lora.magnitudes, shape));
}

void qs_session_close(qs_session *s)
{
    qs_model_destroy(s->model);
    qs_fsdp_destroy(s->fsdp);
    qs_lora_vector_free(&s->lora, s->device);
    qs_base_index_free(s->on.index);
    if (s->ops_open) {
        s->on.ops->close(s->queue);
    }
    qs_backend_levels_close(&s->levels);
    if (s->base_comm != s->device_comm && s->base_comm != NULL) {
        qs_backend_comm_destroy(s->base_comm, s->shard.comm);
    }
    qs_backend_comm_destroy(s->device_comm, s->comm);
    qs_shard_group_destroy(&s->shard, s->comm);
    qs_queue_destroy(s->queue);
    qs_backend_close(&s->backend);
    qs_watchdog_stop(&s->watchdog); /* last: what was started ahead may wait for a stopped peer */
    memset(s, 0, sizeof *s);
}

int qs_session_comms(const qs_session *s, const qs_comm *out[QS_SESSION_COMMS_MAX])
{
    const qs_comm *const comms[QS_SESSION_COMMS_MAX] = {
        s->comm,          s->device_comm,   s->shard.comm,           s->base_comm,
        s->levels.inside, s->levels.across, s->levels.levels.inside, s->levels.levels.across};
    int count = 0;
    for (int i = 0; i < QS_SESSION_COMMS_MAX; i++) {
        bool seen = comms[i] == NULL;
        for (int j = 0; j < count; j++) {
            seen = seen || out[j] == comms[i];
        }
        if (!seen) {
            out[count++] = comms[i];
        }
    }
    return count;
}

void qs_session_traffic(const qs_session *s, uint64_t *received, uint64_t *foreign)
{
    const qs_comm *comms[QS_SESSION_COMMS_MAX];
    *received = *foreign = 0;
    for (int i = qs_session_comms(s, comms) - 1; i >= 0; i--) {
        *received += qs_comm_received_bytes(comms[i]);
        *foreign += qs_comm_foreign_bytes(comms[i]);
    }
}
