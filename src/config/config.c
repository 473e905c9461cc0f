/* The order of a configuration: defaults, the file, --set, then the checks that concern more than
 * one key. */
#include "config/config.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "config/config_hints.h"
#include "config/config_keys.h"

enum { FILE_MAX = 1 << 20, NAME_MAX_SHOWN = 80 };

/* ---- --set ---- */

/* Written in quotes as in a file, which the shell has left. */
static bool is_quoted(const char *text, size_t length)
{
    return length >= 2 && (text[0] == '"' || text[0] == '\'') && text[length - 1] == text[0];
}

/* Copy text[0..length) without surrounding spaces and quotes as the next item. */
static qs_status add_item(qs_value *value, const char *text, size_t length, const char *where)
{
    while (length > 0 && *text == ' ') {
        text++, length--;
    }
    while (length > 0 && text[length - 1] == ' ') {
        length--;
    }
    if (length >= QS_PATH_MAX || value->count == QS_VALUE_ITEMS_MAX) {
        return QS_FAIL(QS_ERR_CONFIG_VALUE, "%s: the value is longer than %d bytes or %d items",
                       where, QS_PATH_MAX - 1, QS_VALUE_ITEMS_MAX);
    }
    const bool quoted = is_quoted(text, length);
    length -= quoted ? 2 : 0;
    memcpy(value->items[value->count].text, text + quoted, length);
    value->items[value->count].text[length] = '\0';
    value->items[value->count].plain = !quoted;
    value->count++;
    return QS_OK;
}

static qs_status split_list(qs_value *value, const char *text, const char *where)
{
    size_t length = strlen(text);
    if (text[length - 1] != ']') {
        return QS_FAIL(QS_ERR_CONFIG_VALUE, "%s: the list has no closing ]", where);
    }
    value->list = true;
    const char *p = text + 1, *end = text + length - 1;
    if (p + strspn(p, " ") == end) {
        return QS_OK;
    }
    for (;;) {
        const char *comma = memchr(p, ',', (size_t)(end - p));
        QS_TRY(add_item(value, p, (size_t)((comma ? comma : end) - p), where));
        if (!comma) {
            return QS_OK;
        }
        p = comma + 1;
    }
}

/* A value from the command line. A path is taken letter by letter, but for quotes around it, and
 * may be empty. */
static qs_status value_of_text(const qs_key *key, const char *text, qs_value *value,
                               const char *where)
{
    memset(value, 0, sizeof *value);
    if (key->type != QS_KEY_PATH) {
        return text[0] == '[' ? split_list(value, text, where)
                              : add_item(value, text, strlen(text), where);
    }
    if (strlen(text) >= QS_PATH_MAX) {
        return QS_FAIL(QS_ERR_CONFIG_VALUE, "%s: %s: a path of at most %d bytes is allowed", where,
                       key->name, QS_PATH_MAX - 1);
    }
    const size_t around = is_quoted(text, strlen(text)) ? 1 : 0, length = strlen(text) - 2 * around;
    memcpy(value->items[0].text, text + around, length);
    value->items[0].text[length] = '\0';
    value->count = 1;
    return QS_OK;
}

static qs_status apply_set(qs_config *cfg, const char *set, bool *seen)
{
    const char *equals = strchr(set, '=');
    char name[128];
    if (!equals || equals == set || (size_t)(equals - set) >= sizeof name) {
        return QS_FAIL(QS_ERR_USAGE, "--set \"%.80s\": expected key=value, as in train.steps=10",
                       set);
    }
    snprintf(name, sizeof name, "%.*s", (int)(equals - set), set);
    int index = qs_key_find(name);
    if (index < 0) {
        char hint[QS_KEY_HINT_MAX];
        qs_key_hint(name, false, hint, sizeof hint);
        return QS_FAIL(QS_ERR_CONFIG_KEY, "--set %.*s: unknown key; %s", NAME_MAX_SHOWN, name,
                       hint);
    }
    qs_value value;
    QS_TRY(value_of_text(&qs_keys[index], equals + 1, &value, "--set"));
    seen[index] = true;
    return qs_key_set(cfg, &qs_keys[index], &value, "--set");
}

/* ---- checks of pairs ---- */

static qs_status check_length(const qs_config *cfg, const char *path)
{
    if (cfg->train.steps == 0 && cfg->train.epochs == 0) {
        return QS_FAIL(QS_ERR_CONFIG_PAIR,
                       "%s: train.steps and train.epochs are both 0; give one of them", path);
    }
    if (cfg->train.steps > 0 && cfg->train.epochs > 0) {
        return QS_FAIL(QS_ERR_CONFIG_PAIR,
                       "%s: train.steps=%lld and train.epochs=%lld contradict each other; set one "
                       "of them to 0",
                       path, (long long)cfg->train.steps, (long long)cfg->train.epochs);
    }
    if (cfg->train.micro_batch > cfg->train.global_batch) {
        return QS_FAIL(QS_ERR_CONFIG_PAIR,
                       "%s: train.micro_batch=%lld is above train.global_batch=%lld; lower it",
                       path, (long long)cfg->train.micro_batch, (long long)cfg->train.global_batch);
    }
    return QS_OK;
}

static qs_status check_schedule(const qs_config *cfg, const char *path)
{
    double warmup = cfg->optim.warmup;
    if (warmup >= 1 && warmup != floor(warmup)) {
        return QS_FAIL(QS_ERR_CONFIG_PAIR,
                       "%s: optim.warmup=%g is neither a fraction below 1 nor a whole number of "
                       "steps",
                       path, warmup);
    }
    if (warmup >= 1 && cfg->train.steps > 0 && warmup >= (double)cfg->train.steps) {
        return QS_FAIL(QS_ERR_CONFIG_PAIR,
                       "%s: optim.warmup=%.0f steps leaves nothing of train.steps=%lld; lower it",
                       path, warmup, (long long)cfg->train.steps);
    }
    return QS_OK;
}

static qs_status check_saving(const qs_config *cfg, const char *path)
{
    int64_t every = cfg->train.keep_every, save = cfg->train.save_every;
    if (every > 0 && save == QS_EVERY_EPOCH) {
        return QS_FAIL(QS_ERR_CONFIG_PAIR,
                       "%s: train.keep_every=%lld counts steps, but train.save_every: epoch saves "
                       "where the data end; raise train.keep_last to keep more of them",
                       path, (long long)every);
    }
    if (every > 0 && (save == 0 || every % save != 0)) {
        return QS_FAIL(
            QS_ERR_CONFIG_PAIR,
            "%s: train.keep_every=%lld is no multiple of train.save_every=%lld, so there "
            "would be nothing to keep",
            path, (long long)every, (long long)save);
    }
    if (cfg->train.patience > 0 && cfg->train.eval_every == 0) {
        return QS_FAIL(QS_ERR_CONFIG_PAIR,
                       "%s: train.patience=%lld counts evaluations, but train.eval_every=0; give "
                       "both, or neither",
                       path, (long long)cfg->train.patience);
    }
    if (cfg->train.eval_every != 0 && !cfg->data_eval[0]) {
        char given[32];
        qs_key_format(cfg, &qs_keys[qs_key_find("train.eval_every")], given, sizeof given);
        return QS_FAIL(QS_ERR_CONFIG_PAIR,
                       "%s: train.eval_every=%s needs data.eval; give it or set eval_every to 0",
                       path, given);
    }
    if (cfg->train.eval_first && !cfg->data_eval[0]) {
        return QS_FAIL(QS_ERR_CONFIG_PAIR,
                       "%s: train.eval_first=true needs data.eval; give both, or neither", path);
    }
    return QS_OK;
}

static qs_status check_memory(const qs_config *cfg, const char *path)
{
    if ((cfg->memory.offload & QS_OFFLOAD_ACTIVATIONS) != 0 &&
        cfg->train.recompute != QS_RECOMPUTE_FULL) {
        return QS_FAIL(QS_ERR_CONFIG_PAIR,
                       "%s: memory.offload: [activations] moves the inputs of the layers, which is "
                       "all that train.recompute: full keeps; set it, or do not offload them",
                       path);
    }
    return QS_OK;
}

static qs_status check_pairs(const qs_config *cfg, const char *path)
{
    if (!cfg->base[0]) {
        return QS_FAIL(QS_ERR_CONFIG_VALUE,
                       "%s: base is missing; name the file made by qshard quantize", path);
    }
    QS_TRY(check_length(cfg, path));
    QS_TRY(check_schedule(cfg, path));
    QS_TRY(check_memory(cfg, path));
    return check_saving(cfg, path);
}

static qs_status check_paths(const qs_config *cfg, const char *path)
{
    const char *inputs[] = {cfg->base, cfg->data_train, cfg->data_eval, cfg->lora.init};
    const char *names[] = {"base", "data.train", "data.eval", "lora.init"};
    for (int i = 0; i < 4; i++) {
        if (cfg->output[0] && strcmp(cfg->output, inputs[i]) == 0) {
            return QS_FAIL(QS_ERR_CONFIG_PAIR, "%s: output and %s are both \"%s\"; change output",
                           path, names[i], cfg->output);
        }
    }
    return QS_OK;
}

static qs_status missing(const char *path, const char *key, const char *remedy)
{
    return QS_FAIL(QS_ERR_CONFIG_VALUE, "%s: %s is missing; %s", path, key, remedy);
}

qs_status qs_config_require(const qs_config *cfg, qs_config_need need, const char *path)
{
    if (need == QS_NEED_TRAIN && !cfg->data_train[0]) {
        return missing(path, "data.train", "name the token file made by qshard-prep");
    }
    if (need == QS_NEED_EVAL && !cfg->data_eval[0]) {
        return missing(path, "data.eval", "name the token file to evaluate on");
    }
    if (need == QS_NEED_TRAIN && !cfg->output[0]) {
        return missing(path, "output", "name the run directory, for example runs/demo");
    }
    return QS_OK;
}

/* ---- entry points ---- */

static qs_status set_preset(qs_config *cfg, const qs_key *key)
{
    qs_value value;
    QS_TRY(value_of_text(key, key->preset, &value, "default"));
    return qs_key_set(cfg, key, &value, "default");
}

void qs_config_defaults(qs_config *cfg)
{
    memset(cfg, 0, sizeof *cfg);
    for (int i = 0; i < qs_keys_count; i++) {
        if (set_preset(cfg, &qs_keys[i]) != QS_OK) {
            abort(); /* a row of our own table; test_config parses every one */
        }
    }
}

static qs_status check_size(size_t bytes, const char *path)
{
    return bytes <= FILE_MAX ? QS_OK
                             : QS_FAIL(QS_ERR_CONFIG_VALUE,
                                       "%s: %zu bytes are too many for a configuration; at most "
                                       "%d are read",
                                       path, bytes, FILE_MAX);
}

qs_status qs_config_parse(qs_config *cfg, const char *text, size_t bytes, const char *path,
                          const char *const *sets, int n_sets)
{
    bool *seen = calloc((size_t)qs_keys_count, sizeof *seen);
    if (!seen) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory", path);
    }
    qs_status st = QS_OK;
    qs_config_defaults(cfg);
    QS_GOTO(check_size(bytes, path));
    QS_GOTO(qs_config_read_yaml(cfg, text, bytes, path, seen));
    for (int i = 0; i < n_sets; i++) {
        QS_GOTO(apply_set(cfg, sets[i], seen));
    }
    /* With train.epochs given and train.steps not, steps becomes 0. */
    if (cfg->train.epochs > 0 && !seen[qs_key_find("train.steps")]) {
        cfg->train.steps = 0;
    }
    QS_GOTO(check_pairs(cfg, path));
    QS_GOTO(check_paths(cfg, path));
done:
    free(seen);
    return st;
}

/* A run directory most often, which holds what is wanted. */
static qs_status refuse_folder(const char *path)
{
    char inside[QS_PATH_MAX + 16];
    snprintf(inside, sizeof inside, "%.*s/config.yaml", QS_PATH_MAX, path);
    return access(inside, F_OK) == 0
               ? QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: is a folder; the configuration in it is %s",
                         path, inside)
               : QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: is a folder; name a YAML file", path);
}

/* The file, opened: a pipe must not make us wait. */
static qs_status open_file(const char *path, FILE **out)
{
    struct stat info;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    *out = fd >= 0 ? fdopen(fd, "r") : NULL;
    if (*out == NULL || fstat(fd, &info) != 0) {
        qs_status st = QS_FAIL(QS_ERR_INPUT_MISSING, "%s: %s", path, strerror(errno));
        if (*out == NULL && fd >= 0) {
            (void)close(fd);
        }
        return st;
    }
    if (S_ISDIR(info.st_mode)) {
        return refuse_folder(path);
    }
    return S_ISREG(info.st_mode) ? QS_OK
                                 : QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: is not a plain file", path);
}

/* One byte more than allowed is read, to tell. */
static qs_status read_text(FILE *file, const char *path, char *text, size_t *bytes)
{
    errno = 0;
    *bytes = fread(text, 1, FILE_MAX + 1, file);
    if (ferror(file)) {
        return QS_FAIL(QS_ERR_INPUT_MISSING, "%s: cannot be read: %s", path, strerror(errno));
    }
    QS_TRY(check_size(*bytes, path));
    text[*bytes] = '\0';
    return memchr(text, '\0', *bytes) == NULL
               ? QS_OK
               : QS_FAIL(QS_ERR_CONFIG_VALUE,
                         "%s: holds a NUL byte; it is no YAML file, or UTF-16 and to be saved as "
                         "UTF-8",
                         path);
}

qs_status qs_config_read(const char *path, char **text, size_t *bytes)
{
    qs_status st = QS_OK;
    FILE *file = NULL;
    *text = malloc(FILE_MAX + 2);
    if (*text == NULL) {
        QS_GOTO(QS_FAIL(QS_ERR_MEMORY, "%s: no memory", path));
    }
    QS_GOTO(open_file(path, &file));
    QS_GOTO(read_text(file, path, *text, bytes));
done:
    if (file != NULL) {
        fclose(file); /* read only */
    }
    if (st != QS_OK) {
        free(*text);
        *text = NULL;
    }
    return st;
}

qs_status qs_config_load(qs_config *cfg, const char *path, const char *const *sets, int n_sets)
{
    char *text = NULL;
    size_t bytes = 0;
    QS_TRY(qs_config_read(path, &text, &bytes));
    qs_status st = qs_config_parse(cfg, text, bytes, path, sets, n_sets);
    free(text);
    return st;
}
