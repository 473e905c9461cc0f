#define _GNU_SOURCE /* memmem */
#include "train/metrics.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "config/config.h"
#include "store/io.h"
#include "store/lines.h"

enum { LINE_MAX_BYTES = 1024, PATH_ROOM = QS_PATH_MAX + 32, WAITING_MAX_BYTES = 1 << 20 };

/* A file of lines, and those that are still to be written. */
typedef struct {
    char path[PATH_ROOM];
    int fd;
    char *waiting;
    size_t bytes, room; /* of what waits: so many in so much */
    bool dropped;       /* what would be more than WAITING_MAX_BYTES */
} line_log;

struct qs_metrics {
    char dir[QS_PATH_MAX];
    char summary_path[PATH_ROOM];
    line_log steps, ranks;            /* metrics.jsonl, ranks.jsonl */
    double last_loss, last_eval_loss; /* NAN: none */
    int64_t last_eval_step;           /* -1: none */
    qs_ckpt_eval *evals;              /* [n_evals], room for evals_room */
    int64_t n_evals, evals_room, eval_targets;
};

/* A number for JSON and CSV: 17 digits; what is not finite has no JSON, so it is null. */
typedef struct {
    char text[32];
} number;

static number exactly(double value)
{
    number n = {"null"};
    if (isfinite(value)) {
        snprintf(n.text, sizeof n.text, "%.17g", value);
    }
    return n;
}

/* The step a line belongs to; -1 if the line is not whole (cut off by a kill). */
static int64_t step_of(const qs_line *line)
{
    static const char key[] = "{\"step\":";
    if (!line->whole || line->bytes < sizeof key || memcmp(line->text, key, sizeof key - 1) != 0 ||
        line->text[line->bytes - 1] != '}') {
        return -1;
    }
    return strtoll(line->text + sizeof key - 1, NULL, 10);
}

/* qs_line_stays: the whole lines of steps up to *ctx. */
static bool stays(const qs_line *line, void *ctx)
{
    const int64_t *step = ctx, of = step_of(line);
    return of >= 0 && of <= *step;
}

/* The value behind `key` in a line of ours; false if it is not there or null. */
static bool value_of(const char *line, size_t bytes, const char *key, double *value)
{
    char *end = NULL;
    const char *at = memmem(line, bytes, key, strlen(key));
    if (at == NULL) {
        return false;
    }
    const double read = strtod(at + strlen(key), &end);
    if (end == at + strlen(key)) {
        return false;
    }
    *value = read;
    return true;
}

/* Losses over other data do not compare: those before are forgotten. */
static qs_status remember_eval(qs_metrics *m, int64_t step, double loss, int64_t targets)
{
    m->last_eval_loss = loss;
    m->last_eval_step = step;
    if (targets != m->eval_targets) {
        m->n_evals = 0;
        m->eval_targets = targets;
    }
    if (m->n_evals == m->evals_room) {
        const int64_t room = m->evals_room > 0 ? 2 * m->evals_room : 64;
        qs_ckpt_eval *grown = realloc(m->evals, (size_t)room * sizeof *grown);
        if (grown == NULL) {
            return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for the evaluations", m->steps.path);
        }
        m->evals = grown;
        m->evals_room = room;
    }
    m->evals[m->n_evals++] = (qs_ckpt_eval){.step = step, .loss = loss};
    return QS_OK;
}

static qs_status remember(qs_metrics *m, const qs_line *line)
{
    double loss = NAN, targets = 0;
    (void)value_of(line->text, line->bytes, "\"loss\": ", &m->last_loss);
    if (memmem(line->text, line->bytes, "\"eval_loss\": ", 13) == NULL) {
        return QS_OK;
    }
    (void)value_of(line->text, line->bytes, "\"eval_loss\": ", &loss); /* null: was not finite */
    (void)value_of(line->text, line->bytes, "\"eval_tokens\": ", &targets);
    return remember_eval(m, step_of(line), loss, (int64_t)targets);
}

/* What there is to keep of a log: so many bytes, behind which nothing is kept from `end` on. */
typedef struct {
    int64_t bytes, kept, end;
} extent;

static qs_status look_through(qs_metrics *m, const char *path, int64_t step, extent *found)
{
    qs_status st = QS_OK;
    qs_lines *lines = NULL;
    qs_line line;
    *found = (extent){0};
    QS_TRY(qs_lines_open(&lines, path));
    for (;;) {
        QS_GOTO(qs_lines_next(lines, &line));
        if (line.end == line.at) {
            break;
        }
        found->bytes = line.end;
        if (stays(&line, &step)) {
            QS_GOTO(remember(m, &line));
            found->kept += line.end - line.at;
            found->end = line.end;
        }
    }
done:
    qs_lines_close(lines);
    return st;
}

/* Keep the whole lines of steps up to `step`. What a run leaves stands in the order of steps, so
 * that what goes is the file's end; one with other lines in between, by whatever hand, is written
 * anew, too. */
static qs_status trim(qs_metrics *m, const char *path, int64_t step, bool anew)
{
    extent found;
    struct stat info;
    if (lstat(path, &info) != 0) {
        return QS_OK;
    }
    QS_TRY(look_through(m, path, step, &found));
    if (found.kept == found.bytes && !anew) {
        return QS_OK;
    }
    return found.kept == found.end && !anew ? qs_io_cut(path, found.kept)
                                            : qs_lines_filter(path, stays, &step);
}

static qs_status log_open(qs_metrics *m, line_log *log, int64_t step, bool anew)
{
    QS_TRY(trim(m, log->path, step, anew));
    return qs_io_open_append(log->path, &log->fd);
}

static void log_close(line_log *log)
{
    if (log->fd >= 0) {
        close(log->fd);
    }
    free(log->waiting);
}

static qs_status log_add(line_log *log, const char *line, size_t bytes)
{
    if (bytes > WAITING_MAX_BYTES - log->bytes) {
        log->dropped = true;
        return QS_OK;
    }
    if (bytes > log->room - log->bytes) {
        const size_t room = 2 * (log->bytes + bytes);
        char *grown = realloc(log->waiting, room);
        if (grown == NULL) {
            return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for a line", log->path);
        }
        log->waiting = grown;
        log->room = room;
    }
    memcpy(log->waiting + log->bytes, line, bytes);
    log->bytes += bytes;
    return QS_OK;
}

/* All that wait, as far as there is room: the rest is tried again with the next one. */
static qs_status log_write(line_log *log)
{
    qs_status st = QS_OK;
    size_t done = 0;
    while (done < log->bytes && st == QS_OK) {
        const char *line = log->waiting + done;
        const size_t bytes =
            (size_t)((const char *)memchr(line, '\n', log->bytes - done) - line) + 1;
        st = qs_io_append(log->fd, line, bytes, log->path);
        done += st == QS_OK ? bytes : 0;
    }
    log->bytes -= done;
    if (done > 0 && log->bytes > 0) {
        memmove(log->waiting, log->waiting + done, log->bytes);
    }
    QS_TRY(st);
    return !log->dropped
               ? QS_OK
               : QS_FAIL(QS_ERR_IO_FULL,
                         "%s: lines are lost: the disk was full for too many of them", log->path);
}

/* A run that was finished and goes on has none until it is finished again. Gone before the first
 * new line can be there, whatever happens to the host. */
static qs_status remove_summary(const qs_metrics *m)
{
    struct stat info;
    if (lstat(m->summary_path, &info) != 0) {
        return QS_OK;
    }
    QS_TRY(qs_io_remove(m->summary_path));
    return qs_io_fsync_dir(m->dir);
}

qs_status qs_metrics_open(qs_metrics **out, const char *run_dir, int64_t step, bool anew, int rank)
{
    qs_status st = QS_OK;
    *out = NULL;
    if (rank != 0) {
        return QS_OK;
    }
    qs_metrics *m = calloc(1, sizeof *m);
    if (m == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "no memory for the metrics files");
    }
    m->steps.fd = m->ranks.fd = -1;
    m->last_loss = m->last_eval_loss = NAN;
    m->last_eval_step = -1;
    snprintf(m->dir, sizeof m->dir, "%s", run_dir);
    snprintf(m->steps.path, sizeof m->steps.path, "%s/metrics.jsonl", run_dir);
    snprintf(m->ranks.path, sizeof m->ranks.path, "%s/ranks.jsonl", run_dir);
    snprintf(m->summary_path, sizeof m->summary_path, "%s/summary.csv", run_dir);
    QS_GOTO(log_open(m, &m->steps, step, anew));
    QS_GOTO(log_open(m, &m->ranks, step, anew));
    QS_GOTO(remove_summary(m)); /* last: a start that is refused leaves it */
    *out = m;
done:
    if (st != QS_OK) {
        qs_metrics_close(m);
    }
    return st;
}

void qs_metrics_close(qs_metrics *m)
{
    if (m == NULL) {
        return;
    }
    log_close(&m->steps);
    log_close(&m->ranks);
    free(m->evals);
    free(m);
}

qs_status qs_metrics_sync(qs_metrics *metrics)
{
    if (metrics == NULL) {
        return QS_OK;
    }
    line_log *const logs[] = {&metrics->steps, &metrics->ranks};
    for (int i = 0; i < 2; i++) {
        QS_TRY(log_write(logs[i]));
        QS_TRY(qs_io_fsync(logs[i]->fd, logs[i]->path));
    }
    return QS_OK;
}

static number seconds_or_null(double seconds)
{
    number out = {"null"};
    if (seconds >= 0) {
        snprintf(out.text, sizeof out.text, "%.6f", seconds);
    }
    return out;
}

qs_status qs_metrics_step(qs_metrics *metrics, const qs_step_metrics *m)
{
    char line[LINE_MAX_BYTES];
    if (metrics == NULL) {
        return QS_OK;
    }
    metrics->last_loss = m->loss;
    const double rate = m->step_time_s > 0 ? (double)m->all_tokens / m->step_time_s : 0;
    const int n = snprintf(line, sizeof line,
                           "{\"step\": %" PRId64 ", \"tokens\": %" PRId64 ", \"targets\": %" PRId64
                           ", \"all_tokens\": %" PRId64
                           ", \"loss\": %s, \"lr\": %s, \"grad_norm\": %s, \"step_time_s\": %.6f, "
                           "\"tokens_per_s\": %.1f, \"peak_bytes\": %" PRIu64 ", \"gather_s\": %s, "
                           "\"wait_s\": %.6f, \"compute_s\": %.6f, \"reduce_s\": %.6f, "
                           "\"optimizer_s\": %.6f, \"lora_s\": %.6f}\n",
                           m->step, m->tokens, m->tokens, m->all_tokens, exactly(m->loss).text,
                           exactly(m->lr).text, exactly(m->grad_norm).text, m->step_time_s, rate,
                           m->peak_bytes, seconds_or_null(m->gather_s).text, m->parts[QS_STEP_WAIT],
                           m->parts[QS_STEP_COMPUTE], m->parts[QS_STEP_REDUCE],
                           m->parts[QS_STEP_OPTIMIZER], m->parts[QS_STEP_LORA]);
    QS_TRY(log_add(&metrics->steps, line, (size_t)n));
    return log_write(&metrics->steps);
}

qs_status qs_metrics_eval(qs_metrics *metrics, int64_t step, double loss, int64_t targets)
{
    char line[LINE_MAX_BYTES];
    if (metrics == NULL) {
        return QS_OK;
    }
    const int n =
        snprintf(line, sizeof line,
                 "{\"step\": %" PRId64 ", \"eval_loss\": %s, \"eval_tokens\": %" PRId64 "}\n", step,
                 exactly(loss).text, targets);
    QS_TRY(remember_eval(metrics, step, loss, targets));
    QS_TRY(log_add(&metrics->steps, line, (size_t)n));
    return log_write(&metrics->steps);
}

static qs_status add_rank(qs_metrics *metrics, int64_t step, int rank, const qs_rank_metrics *m)
{
    char line[LINE_MAX_BYTES];
    const int n = snprintf(
        line, sizeof line,
        "{\"step\": %" PRId64 ", \"rank\": %d, \"tokens\": %" PRId64 ", \"targets\": %" PRId64
        ", \"flops\": %.17g, \"read_bytes\": %" PRIu64 ", \"data_bytes\": %" PRIu64
        ", \"gathered_bytes\": %" PRIu64 ", \"received_bytes\": %" PRIu64
        ", \"foreign_bytes\": %" PRIu64 ", \"base_bytes\": %" PRIu64 ", \"peak_bytes\": %" PRIu64
        ", \"rss_bytes\": %" PRIu64 ", \"gather_group\": %" PRId64 ", \"shard_group\": %" PRId64
        ", \"keep_resident\": %" PRId64 ", \"keep_decoded\": %" PRId64
        ", \"step_s\": %.6f, \"wait_s\": %.6f, \"compute_s\": %.6f, \"reduce_s\": %.6f, "
        "\"optimizer_s\": %.6f, \"lora_s\": %.6f}\n",
        step, rank, m->tokens, m->targets, m->flops, m->read_bytes, m->data_bytes,
        m->gathered_bytes, m->received_bytes, m->foreign_bytes, m->base_bytes, m->peak_bytes,
        m->rss_bytes, m->gather_group, m->shard_group, m->keep_resident, m->keep_decoded,
        m->parts[QS_STEP_TOTAL], m->parts[QS_STEP_WAIT], m->parts[QS_STEP_COMPUTE],
        m->parts[QS_STEP_REDUCE], m->parts[QS_STEP_OPTIMIZER], m->parts[QS_STEP_LORA]);
    return log_add(&metrics->ranks, line, (size_t)n);
}

qs_status qs_metrics_ranks(qs_metrics *metrics, int64_t step, const qs_rank_metrics *mine,
                           qs_comm *comm)
{
    qs_status st = QS_OK;
    const int nranks = qs_comm_nranks(comm);
    qs_rank_metrics *all = calloc((size_t)nranks, sizeof *all);
    if (all == NULL) {
        st = QS_FAIL(QS_ERR_MEMORY, "no memory for the metrics of %d ranks", nranks);
    }
    QS_GOTO(qs_comm_agree(comm, st));
    QS_GOTO(qs_comm_all_gather_now(comm, mine, all, sizeof *mine));
    for (int r = 0; metrics != NULL && r < nranks && st == QS_OK; r++) {
        st = add_rank(metrics, step, r, &all[r]);
    }
    st = metrics != NULL && st == QS_OK ? log_write(&metrics->ranks) : st;
    st = qs_comm_agree(comm, st);
done:
    free(all);
    return st;
}

int64_t qs_metrics_last_eval(const qs_metrics *metrics)
{
    return metrics != NULL ? metrics->last_eval_step : -1;
}

qs_ckpt_evals qs_metrics_evals(const qs_metrics *metrics)
{
    return metrics != NULL ? (qs_ckpt_evals){.list = metrics->evals, .count = metrics->n_evals}
                           : (qs_ckpt_evals){.count = 0};
}

qs_status qs_metrics_summary(qs_metrics *metrics, int64_t steps, double seconds, int nranks,
                             uint64_t peak_bytes, const qs_ckpt_eval *best)
{
    char text[LINE_MAX_BYTES], best_step[24] = "null";
    if (metrics == NULL) {
        return QS_OK;
    }
    if (best->step >= 0) {
        snprintf(best_step, sizeof best_step, "%" PRId64, best->step);
    }
    const int n = snprintf(text, sizeof text,
                           "ranks,steps,final_loss,eval_loss,seconds,peak_bytes,best_eval_loss,"
                           "best_eval_step\n"
                           "%d,%" PRId64 ",%s,%s,%.3f,%" PRIu64 ",%s,%s\n",
                           nranks, steps, exactly(metrics->last_loss).text,
                           exactly(metrics->last_eval_loss).text, seconds, peak_bytes,
                           exactly(best->loss).text, best_step);
    return qs_io_write_file(metrics->summary_path, text, (size_t)n);
}
