#include "train/gathers.h"

#include "base/log.h"

enum { CPU_TOKENS = 128 }; /* enough for products at their speed, and over in no time */

/* What all ranks have measured. */
typedef struct {
    double gather_s; /* the better of two gathers, each by the rank that it takes longest */
    double token_s;  /* the fastest compute of all ranks */
    double received; /* bytes of a gather, on the rank that receives most */
} measured;

/* A rank that has a copy of the base to itself, as the only one of its host, has measured nothing.
 */
static qs_status agree_on_times(measured *out, const qs_probe *probe, const qs_session *s)
{
    const int64_t token_ps = (int64_t)(1e12 * probe->token_s);
    int64_t most[4] = {(int64_t)(1e12 * probe->gather_s[0]), (int64_t)(1e12 * probe->gather_s[1]),
                       token_ps > 0 ? -token_ps : INT64_MIN,
                       (int64_t)probe->gather_bytes * (s->on.group.nranks - 1)};
    QS_TRY(qs_comm_max_i64(s->comm, most, 4));
    const int64_t better = most[0] > 0 && most[0] < most[1] ? most[0] : most[1];
    *out = (measured){.gather_s = 1e-12 * (double)better,
                      .token_s = most[2] < 0 && most[2] > INT64_MIN ? -1e-12 * (double)most[2] : 0,
                      .received = (double)most[3]};
    return QS_OK;
}

qs_status qs_gathers_report(const qs_session *s, const qs_model_shape *shape, double tokens)
{
    const int peers = s->on.group.most - 1;
    qs_probe probe;
    measured all;
    const int64_t most = s->on.apart ? shape->max_tokens : CPU_TOKENS;
    const int64_t probed = shape->max_tokens < most ? shape->max_tokens : most;
    if (peers == 0) {
        return QS_OK;
    }
    QS_TRY(qs_model_probe(s->model, probed, s->on.config.train.seq_len, &probe));
    QS_TRY(agree_on_times(&all, &probe, s));
    if (all.gather_s <= 0 || all.token_s <= 0) {
        return QS_OK;
    }
    int64_t apart = qs_comm_host(s->shard.comm) != 0; /* the group spans hosts */
    QS_TRY(qs_comm_max_i64(s->comm, &apart, 1));
    const double needed = all.gather_s / all.token_s;
    qs_log_info(
        "gathers: a layer's takes %.3g ms (%.3g MB from %d rank%s: %.3g MB/s), its forward "
        "%.3g ms a token; gathers hide behind T* = %.0f tokens, a pass takes %.0f of a rank",
        1e3 * all.gather_s, 1e-6 * all.received, peers, peers > 1 ? "s" : "",
        1e-6 * all.received / all.gather_s, 1e3 * all.token_s, needed, tokens);
    if (tokens < needed) {
        qs_log_warn("a pass takes fewer tokens of a rank (%.0f) than hide a gather (T* = %.0f): "
                    "steps will wait for gathers; raise train.gather_group, train.micro_batch or "
                    "shard.keep_resident (auto: as many layers as fit), or set shard.group: %s",
                    tokens, needed, apart ? "node" : "1 (the whole base on every rank)");
    }
    return QS_OK;
}
