#include "train/session_plan.h"

#include "base/log.h"

/* ---- what auto stands for ---- */

/* What is final alone: a node's copy that the plan took back is not said to be there first. */
static void report(const qs_plan_choice *choice, const qs_session *s)
{
    char reasons[QS_PLAN_REASONS_MAX][QS_PLAN_REASON_BYTES];
    const int count = qs_plan_reasons(choice, reasons);
    qs_shard_group_report(&s->shard, &s->on.group, &s->on.config, s->comm);
    for (int i = 0; i < count; i++) {
        qs_log_info("%s", reasons[i]);
    }
}

qs_status qs_session_settle(qs_session *s, const qs_plan_job *job, qs_model_shape *shape)
{
    qs_plan_choice choice;
    QS_TRY(qs_plan_settle(&choice, &s->on, job, shape, s->comm));
    if (choice.widened) {
        qs_shard_group_widen(&s->shard, s->comm);
    }
    report(&choice, s);
    return QS_OK;
}

/* ---- does it fit? ---- */

static qs_status check_limit(const qs_memory_plan *plan, int64_t limit_bytes)
{
    const size_t needed = qs_memory_plan_needed(plan);
    return limit_bytes <= 0 || needed <= (size_t)limit_bytes
               ? QS_OK
               : QS_FAIL(QS_ERR_MEMORY,
                         "memory.device_limit is %lld bytes, a rank would need %zu: %s, or use "
                         "more ranks",
                         (long long)limit_bytes, needed, plan->settings);
}

static qs_status check_device(const qs_memory_plan *plan, const qs_device *device)
{
    const size_t needed = qs_memory_plan_needed(plan), held = plan->total_bytes[plan->space];
    size_t free_bytes = 0, total_bytes = 0;
    qs_device_memory(device, &free_bytes, &total_bytes);
    return total_bytes == 0 || needed <= free_bytes
               ? QS_OK
               : QS_FAIL(QS_ERR_MEMORY,
                         "%s: a rank would need %zu bytes of device memory and %zu for code and "
                         "NCCL, %zu of %zu are free: %s%s, or use more ranks",
                         qs_device_name(device), held, needed - held, free_bytes, total_bytes,
                         plan->settings,
                         plan->trained ? " or memory.offload: [activations, weights, embedding]"
                                       : ", set memory.offload: [weights, embedding]");
}

/* The kernel would end the run later, without a word. */
static qs_status check_host(const qs_memory_plan *plan, const qs_room *host)
{
    const size_t needed = plan->total_bytes[QS_MEM_HOST];
    char what[QS_ROOM_TEXT_MAX];
    if (needed <= host->bytes) {
        return QS_OK;
    }
    qs_room_describe(host, what, sizeof what);
    const char *remedy = qs_limit_remedy(&host->limit);
    return QS_FAIL(QS_ERR_MEMORY,
                   "memory of the host: a rank would need %zu bytes and has %zu, its part of %s: "
                   "%s%s%s, or use more hosts",
                   needed, host->bytes, what, remedy, remedy[0] != '\0' ? "; " : "",
                   plan->space == QS_MEM_HOST ? plan->settings
                                              : "take entries out of memory.offload");
}

static qs_status check(const qs_memory_plan *plan, const qs_session *s)
{
    QS_TRY(check_limit(plan, s->on.config.memory.device_limit));
    QS_TRY(check_device(plan, s->device));
    return check_host(plan, &s->host);
}

qs_status qs_session_require(const qs_session *s, const qs_memory_plan *plan, bool print)
{
    const qs_status fits = check(plan, s);
    const bool explains = fits != QS_OK && qs_log_says(QS_LOG_INFO);
    if (qs_comm_rank(s->comm) == 0 && (print || explains)) {
        qs_memory_plan_print(plan, false);
    }
    return qs_comm_agree(s->comm, fits);
}

qs_status qs_session_plan(qs_session *s, const qs_plan_job *job, qs_model_shape *shape,
                          qs_memory_plan *out)
{
    QS_TRY(qs_session_settle(s, job, shape));
    *out = qs_memory_plan_make(&s->on, job, shape);
    return qs_session_require(s, out, false);
}
