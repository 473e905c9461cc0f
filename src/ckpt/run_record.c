#include "ckpt/run_record.h"

#include <float.h>
#include <jansson.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#include "qshard_version.h"
#include "store/io.h"
#include "store/json.h"

enum { BYTES_MAX = 1 << 20, PATH_ROOM = QS_PATH_MAX + 64 };

/* ---- read and write ---- */

static qs_status check_format(const json_t *all, qs_status foreign, const char *path)
{
    const char *format = NULL;
    int64_t version = 0;
    QS_TRY(qs_json_text(all, "format", &format, path));
    if (strcmp(format, "qshard-run") != 0) {
        return QS_FAIL(
            foreign, "%s: format: \"%.40s\" is not \"qshard-run\"; it is not a run of ours%s", path,
            format, foreign == QS_ERR_OUTPUT_TAKEN ? "; choose another output" : "");
    }
    QS_TRY(qs_json_i64(all, "format_version", 0, INT32_MAX, &version, path));
    return version == 1
               ? QS_OK
               : QS_FAIL(QS_ERR_INPUT_UNKNOWN, "%s: format_version=%d; this program reads 1", path,
                         (int)version);
}

static qs_status parse(qs_run_record *out, qs_status foreign, const char *path)
{
    const char *run_id = NULL;
    if (!json_is_object(out->all)) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: is not a JSON object", path);
    }
    QS_TRY(check_format(out->all, foreign, path));
    QS_TRY(qs_json_text(out->all, "run_id", &run_id, path));
    if (strlen(run_id) >= sizeof out->run_id) {
        return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: run_id is longer than 39 letters", path);
    }
    snprintf(out->run_id, sizeof out->run_id, "%s", run_id);
    const json_t *finished = json_object_get(out->all, "finished");
    out->finished = json_is_true(finished);
    return json_is_boolean(finished)
               ? QS_OK
               : QS_FAIL(QS_ERR_INPUT_VALUE, "%s: finished is neither true nor false", path);
}

qs_status qs_run_record_read(qs_run_record *out, const char *dir, qs_status foreign)
{
    char path[PATH_ROOM];
    void *text = NULL;
    size_t bytes = 0;
    qs_status st = QS_OK;
    *out = (qs_run_record){.finished = false};
    snprintf(path, sizeof path, "%s/run.json", dir);
    QS_GOTO(qs_io_read_file(path, BYTES_MAX, &text, &bytes));
    QS_GOTO(qs_json_parse(&out->all, text, bytes, path));
    QS_GOTO(parse(out, foreign, path));
done:
    free(text);
    if (st != QS_OK) {
        qs_run_record_free(out);
    }
    return st;
}

void qs_run_record_free(qs_run_record *r)
{
    json_decref(r->all);
    *r = (qs_run_record){.finished = false};
}

qs_status qs_run_record_write(const qs_run_record *r, const char *dir)
{
    char path[PATH_ROOM];
    snprintf(path, sizeof path, "%s/run.json", dir);
    char *text = json_dumps(r->all, JSON_INDENT(2) | JSON_SORT_KEYS);
    if (text == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory", path);
    }
    const qs_status st = qs_io_write_file(path, text, strlen(text));
    free(text);
    return st;
}

static qs_status no_memory(const char *dir)
{
    return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for run.json", dir);
}

/* ---- start and end ---- */

static void now_text(char out[24])
{
    const time_t now = time(NULL);
    struct tm utc;
    gmtime_r(&now, &utc);
    strftime(out, 24, "%Y%m%dT%H%M%SZ", &utc);
}

/* Time for humans, random digits so that two runs never share an id. */
static void make_new(qs_run_record *out)
{
    char created[24];
    uint32_t random = 0;
    now_text(created);
    if (getrandom(&random, sizeof random, 0) != (ssize_t)sizeof random) {
        random = (uint32_t)getpid();
    }
    snprintf(out->run_id, sizeof out->run_id, "%s-%08x", created, random);
    out->all = json_pack("{s:s, s:i, s:s, s:s, s:i}", "format", "qshard-run", "format_version", 1,
                         "run_id", out->run_id, "created", created, "starts", 0);
}

static bool is_listed(const json_t *list, const char *host)
{
    bool found = false;
    for (size_t i = 0; i < json_array_size(list) && !found; i++) {
        found = strcmp(json_string_value(json_array_get(list, i)), host) == 0;
    }
    return found;
}

/* Each once, in the order of its first rank: a launcher may deal ranks out to hosts in turn. */
static json_t *list_hosts(const char (*hosts)[QS_HOST_NAME_BYTES], int nranks)
{
    json_t *list = json_array();
    for (int r = 0; r < nranks; r++) {
        if (!is_listed(list, hosts[r])) {
            (void)json_array_append_new(list, json_string(hosts[r])); /* unless it is no UTF-8 */
        }
    }
    return list;
}

qs_status qs_run_record_start(qs_run_record *r, const char *dir,
                              const char (*hosts)[QS_HOST_NAME_BYTES], int nranks)
{
    if (r->all == NULL) {
        make_new(r);
    }
    const json_int_t starts = json_integer_value(json_object_get(r->all, "starts")) + 1;
    int failed = json_object_set_new(r->all, "hosts", list_hosts(hosts, nranks)) != 0;
    failed |= json_object_set_new(r->all, "nranks", json_integer(nranks)) != 0;
    failed |= json_object_set_new(r->all, "starts", json_integer(starts)) != 0;
    failed |= json_object_set_new(r->all, "version", json_string(QSHARD_VERSION)) != 0;
    failed |= json_object_set_new(r->all, "build", json_string(QSHARD_COMMIT)) != 0;
    failed |= json_object_set_new(r->all, "finished", json_false()) != 0;
    (void)json_object_del(r->all, "ended"); /* of a run that goes on longer; else it is not there */
    r->finished = false;
    return failed ? no_memory(dir) : QS_OK;
}

qs_status qs_run_record_finish(const char *dir)
{
    qs_run_record r;
    char now[24];
    now_text(now);
    QS_TRY(qs_run_record_read(&r, dir, QS_ERR_OUTPUT_TAKEN));
    qs_status st = QS_OK;
    if (json_object_set_new(r.all, "finished", json_true()) != 0 ||
        json_object_set_new(r.all, "ended", json_string(now)) != 0) {
        st = no_memory(dir);
    }
    st = st == QS_OK ? qs_run_record_write(&r, dir) : st;
    qs_run_record_free(&r);
    return st;
}

/* ---- the best checkpoint ---- */

qs_status qs_run_record_best(const qs_run_record *r, const char *dir, qs_ckpt_eval *best)
{
    char path[PATH_ROOM];
    const json_t *object = json_object_get(r->all, "best");
    *best = (qs_ckpt_eval){.step = -1, .loss = NAN};
    if (object == NULL) {
        return QS_OK;
    }
    snprintf(path, sizeof path, "%s/run.json: best", dir);
    if (!json_is_object(object)) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: is not a JSON object", path);
    }
    QS_TRY(qs_json_i64(object, "step", 0, INT64_MAX, &best->step, path));
    return qs_json_f64(object, "eval_loss", -DBL_MAX, DBL_MAX, &best->loss, path);
}

static bool says_so(const qs_run_record *r, const char *dir, const qs_ckpt_eval *best)
{
    qs_ckpt_eval noted;
    if (qs_run_record_best(r, dir, &noted) != QS_OK) {
        qs_error_clear(); /* what cannot be read is written anew */
        return false;
    }
    return noted.step == best->step && (best->step < 0 || noted.loss == best->loss);
}

static qs_status set_best(const qs_run_record *r, const char *dir, const qs_ckpt_eval *best)
{
    (void)json_object_del(r->all, "best");
    if (best->step < 0) {
        return QS_OK;
    }
    json_t *object =
        json_pack("{s:I, s:f}", "step", (json_int_t)best->step, "eval_loss", best->loss);
    return json_object_set_new(r->all, "best", object) == 0 ? QS_OK : no_memory(dir);
}

qs_status qs_run_record_note_best(const char *dir, const qs_ckpt_eval *best)
{
    qs_run_record r;
    qs_status st = QS_OK;
    QS_TRY(qs_run_record_read(&r, dir, QS_ERR_OUTPUT_TAKEN));
    if (!says_so(&r, dir, best)) {
        QS_GOTO(set_best(&r, dir, best));
        st = qs_run_record_write(&r, dir);
    }
done:
    qs_run_record_free(&r);
    return st;
}
