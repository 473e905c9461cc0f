#include "train/gathers.h"

#include "base/log.h"

enum { CPU_TOKENS = 128 }; /* enough for products at their speed, and over in no time */

double qs_gathers_hidden_from(const qs_probe *probe)
{
    return probe->token_s > 0 ? probe->gather_s / probe->token_s : 0;
}

/* The slowest gather and the fastest compute of all ranks. */
static qs_status agree_on_times(qs_probe *probe, qs_comm *comm)
{
    int64_t ps[2] = {(int64_t)(1e12 * probe->gather_s), -(int64_t)(1e12 * probe->token_s)};
    QS_TRY(qs_comm_max_i64(comm, ps, 2));
    probe->gather_s = 1e-12 * (double)ps[0];
    probe->token_s = -1e-12 * (double)ps[1];
    return QS_OK;
}

qs_status qs_gathers_report(const qs_session *s, const qs_model_shape *shape, double tokens)
{
    qs_probe probe;
    const int64_t most = s->apart ? shape->max_tokens : CPU_TOKENS;
    const int64_t probed = shape->max_tokens < most ? shape->max_tokens : most;
    if (s->shard.most == 1) {
        return QS_OK;
    }
    QS_TRY(qs_model_probe(s->model, probed, s->config.train.seq_len, &probe));
    QS_TRY(agree_on_times(&probe, s->comm));
    const double needed = qs_gathers_hidden_from(&probe);
    if (needed <= 0) {
        return QS_OK;
    }
    const double received = (double)probe.gather_bytes * (s->shard.nranks - 1);
    qs_log_info(
        "gathers: a layer's takes %.3g ms (%.3g MB from %d ranks: %.3g MB/s), its forward "
        "%.3g ms a token; gathers hide behind T* = %.0f tokens, a pass takes %.0f of a rank",
        1e3 * probe.gather_s, 1e-6 * received, s->shard.nranks - 1,
        1e-6 * received / probe.gather_s, 1e3 * probe.token_s, needed, tokens);
    if (tokens < needed) {
        qs_log_warn("a pass takes fewer tokens of a rank (%.0f) than hide a gather (T* = %.0f): "
                    "steps will wait for gathers; raise train.gather_group, train.micro_batch or "
                    "shard.keep_resident, or set shard.group: node",
                    tokens, needed);
    }
    return QS_OK;
}
