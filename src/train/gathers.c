#include "train/gathers.h"

#include "base/log.h"

enum { CPU_TOKENS = 128 }; /* enough for products at their speed, and over in no time */

/* The better of two gathers, each by the rank that it takes longest, and the fastest compute of all
 * ranks. */
static qs_status agree_on_times(const qs_probe *probe, double *gather_s, double *token_s,
                                qs_comm *comm)
{
    int64_t ps[3] = {(int64_t)(1e12 * probe->gather_s[0]), (int64_t)(1e12 * probe->gather_s[1]),
                     -(int64_t)(1e12 * probe->token_s)};
    QS_TRY(qs_comm_max_i64(comm, ps, 3));
    const int64_t better = ps[0] > 0 && ps[0] < ps[1] ? ps[0] : ps[1];
    *gather_s = 1e-12 * (double)better;
    *token_s = -1e-12 * (double)ps[2];
    return QS_OK;
}

qs_status qs_gathers_report(const qs_session *s, const qs_model_shape *shape, double tokens)
{
    qs_probe probe;
    double gather_s = 0, token_s = 0;
    const int64_t most = s->on.apart ? shape->max_tokens : CPU_TOKENS;
    const int64_t probed = shape->max_tokens < most ? shape->max_tokens : most;
    if (s->on.group.most == 1) {
        return QS_OK;
    }
    QS_TRY(qs_model_probe(s->model, probed, s->on.config.train.seq_len, &probe));
    QS_TRY(agree_on_times(&probe, &gather_s, &token_s, s->comm));
    if (gather_s <= 0 || token_s <= 0) {
        return QS_OK;
    }
    int64_t apart = qs_comm_host(s->shard.comm) != 0; /* the group spans hosts */
    QS_TRY(qs_comm_max_i64(s->comm, &apart, 1));
    const double needed = gather_s / token_s;
    const double received = (double)probe.gather_bytes * (s->on.group.nranks - 1);
    qs_log_info(
        "gathers: a layer's takes %.3g ms (%.3g MB from %d rank%s: %.3g MB/s), its forward "
        "%.3g ms a token; gathers hide behind T* = %.0f tokens, a pass takes %.0f of a rank",
        1e3 * gather_s, 1e-6 * received, s->on.group.nranks - 1, s->on.group.nranks > 2 ? "s" : "",
        1e-6 * received / gather_s, 1e3 * token_s, needed, tokens);
    if (tokens < needed) {
        qs_log_warn("a pass takes fewer tokens of a rank (%.0f) than hide a gather (T* = %.0f): "
                    "steps will wait for gathers; raise train.gather_group, train.micro_batch or "
                    "shard.keep_resident (auto: as many layers as fit), or set shard.group: %s",
                    tokens, needed, apart ? "node" : "1 (the whole base on every rank)");
    }
    return QS_OK;
}
