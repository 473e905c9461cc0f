/* One value: from text to the struct and back. The table's row decides what a text means, so YAML's
 * own guesses (no = false, 1e-4 = a string, 010 = 8) never come into play. */
#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "config/config_hints.h"
#include "config/config_keys.h"

/* In the order of qs_linear, whose bit numbers they are. */
static const char *const TARGETS[] = {"q_proj",    "k_proj",    "v_proj",
                                      "o_proj",    "gate_proj", "up_proj",
                                      "down_proj", "qkv_proj",  "gate_up_proj"};
enum { TARGET_COUNT = sizeof TARGETS / sizeof *TARGETS, ALL_TARGETS = (1 << TARGET_COUNT) - 1 };

/* Names for sets of them: PEFT's, two of the usual recipes, and the predecessor's "all", which
 * names six linears, so that of a model with one for q, k and v and one for gate and up it leaves
 * down_proj alone. */
static const struct {
    const char *name;
    uint32_t bits;
} TARGET_SETS[] = {
    {"all-linear", ALL_TARGETS},
    {"attention", 0x08f},
    {"mlp", 0x170},
    {"fsdp_qlora-all", 0x077},
};
enum { TARGET_SET_COUNT = sizeof TARGET_SETS / sizeof *TARGET_SETS };

static void *field(qs_config *cfg, const qs_key *key)
{
    return (char *)cfg + key->offset;
}

static const void *const_field(const qs_config *cfg, const qs_key *key)
{
    return (const char *)cfg + key->offset;
}

static bool is_integer(const qs_key *key)
{
    return key->type == QS_KEY_I64 || key->type == QS_KEY_BYTES;
}

/* Append to out[capacity], never past its end. */
static void __attribute__((format(printf, 3, 4)))
add(char *out, size_t capacity, const char *format, ...)
{
    size_t used = strlen(out);
    va_list args;
    va_start(args, format);
    vsnprintf(out + used, capacity - used, format, args);
    va_end(args);
}

/* ---- messages ---- */

static void format_bound(const qs_key *key, double bound, char *out, size_t capacity)
{
    snprintf(out, capacity, is_integer(key) ? "%.0f" : "%.7g", bound);
}

/* "[a, b]": those of the words whose bits are set. */
static void add_words(const char *const *words, int count, uint32_t bits, char *out,
                      size_t capacity)
{
    bool first = true;
    add(out, capacity, "[");
    for (int i = 0; i < count && words[i] != NULL; i++) {
        if (bits >> i & 1) {
            add(out, capacity, "%s%s", first ? "" : ", ", words[i]);
            first = false;
        }
    }
    add(out, capacity, "]");
}

void qs_key_allowed(const qs_key *key, char *out, size_t capacity)
{
    char low[32], high[32];
    out[0] = '\0';
    switch (key->type) {
    case QS_KEY_I64:
    case QS_KEY_F64:
    case QS_KEY_BYTES:
    case QS_KEY_PAIR:
        format_bound(key, key->low, low, sizeof low);
        format_bound(key, key->high, high, sizeof high);
        if (key->low == key->high) {
            add(out, capacity, "only %s", low);
        } else if (key->type == QS_KEY_PAIR) {
            add(out, capacity, "[a, b], each %s .. %s", low, high);
        } else if (key->above_low) {
            add(out, capacity, "above %s, at most %s", low, high);
        } else {
            add(out, capacity, "%s%s", key->zero ? key->zero : "", key->zero ? " | " : "");
            for (int i = 0; i < QS_KEY_NAMES_MAX && key->names[i]; i++) {
                add(out, capacity, "%s | ", key->names[i]);
            }
            add(out, capacity, "%s .. %s", key->zero ? "1" : low, high);
        }
        break;
    case QS_KEY_BOOL:
        add(out, capacity, "true | false");
        break;
    case QS_KEY_PATH:
        add(out, capacity, "a path of at most %d bytes", QS_PATH_MAX - 1);
        break;
    case QS_KEY_ENUM:
        for (int i = 0; i < QS_KEY_NAMES_MAX && key->names[i]; i++) {
            add(out, capacity, "%s%s", i ? " | " : "", key->names[i]);
        }
        break;
    case QS_KEY_TARGETS:
        for (int i = 0; i < TARGET_SET_COUNT; i++) {
            add(out, capacity, "%s | ", TARGET_SETS[i].name);
        }
        add_words(TARGETS, TARGET_COUNT, ALL_TARGETS, out, capacity);
        break;
    case QS_KEY_FLAGS:
        add(out, capacity, "any of ");
        add_words(key->names, QS_KEY_NAMES_MAX, UINT32_MAX, out, capacity);
        break;
    }
}

/* "run.yaml:7: train.steps: "ten" is not an integer; allowed: 0 .. 1000000000 (steps)" */
static qs_status refuse(const qs_key *key, const char *where, const char *text, const char *why)
{
    char allowed[256];
    qs_key_allowed(key, allowed, sizeof allowed);
    const char *unit = key->unit ? key->unit : "";
    if (key->type == QS_KEY_BYTES) {
        unit = "bytes; K, M, G or T behind a number are powers of 1024, as in 8G";
    }
    return QS_FAIL(QS_ERR_CONFIG_VALUE, "%s: %s: \"%.80s\" %s; allowed: %s%s%s%s", where, key->name,
                   text, why, allowed, unit[0] ? " (" : "", unit, unit[0] ? ")" : "");
}

/* ---- parsing ---- */

static bool in_range(const qs_key *key, double value)
{
    return value <= key->high && (key->above_low ? value > key->low : value >= key->low);
}

/* -?(0|[1-9][0-9]*), then what `end` points to. */
static bool scan_integer(const char *text, int64_t *value, const char **end)
{
    const char *digits = text + (*text == '-');
    if (!isdigit((unsigned char)digits[0]) ||
        (digits[0] == '0' && isdigit((unsigned char)digits[1]))) {
        return false;
    }
    errno = 0;
    char *stop;
    long long parsed = strtoll(text, &stop, 10);
    *value = parsed;
    *end = stop;
    return errno == 0;
}

/* Powers of 1024 that a suffix stands for; -1 for none of ours. */
static int suffix_power(const char *suffix)
{
    static const char letters[] = "KMGT";
    const char *at = *suffix ? strchr(letters, *suffix) : NULL;
    return at && !suffix[1] ? (int)(at - letters) + 1 : -1;
}

/* A word that stands for a number: key->zero for 0, the names for -1, -2, ... */
static bool find_word(const qs_key *key, const char *text, int64_t *value)
{
    *value = 0;
    if (key->zero && strcmp(text, key->zero) == 0) {
        return true;
    }
    for (int i = 0; i < QS_KEY_NAMES_MAX && key->names[i]; i++) {
        *value = -(i + 1);
        if (strcmp(text, key->names[i]) == 0) {
            return true;
        }
    }
    return false;
}

static qs_status set_integer(qs_config *cfg, const qs_key *key, const char *text, const char *where)
{
    int64_t value = 0, scale = 1;
    const char *end = text;
    if (find_word(key, text, &value)) {
        *(int64_t *)field(cfg, key) = value;
        return QS_OK;
    }
    if (!scan_integer(text, &value, &end)) {
        return refuse(key, where, text, "is not an integer in decimal digits");
    }
    if (key->type == QS_KEY_BYTES && *end && suffix_power(end) > 0) {
        scale = (int64_t)1 << (10 * suffix_power(end));
        end++;
    }
    if (*end) {
        return refuse(key, where, text, "is not an integer in decimal digits");
    }
    if (!in_range(key, (double)value * (double)scale)) {
        return refuse(key, where, text, "is out of range");
    }
    *(int64_t *)field(cfg, key) = value * scale;
    return QS_OK;
}

/* -?digits[.digits][e[+-]digits]: no hexadecimal, no nan, no inf, no spaces. */
static bool scan_number(const char *text, double *value)
{
    const char *p = text + (*text == '-');
    size_t whole = strspn(p, "0123456789");
    p += whole;
    size_t fraction = 0;
    if (*p == '.') {
        fraction = strspn(p + 1, "0123456789");
        p += 1 + fraction;
    }
    if (whole + fraction == 0) {
        return false;
    }
    if (*p == 'e' || *p == 'E') {
        p += 1 + (p[1] == '-' || p[1] == '+');
        if (!isdigit((unsigned char)*p)) {
            return false;
        }
        p += strspn(p, "0123456789");
    }
    *value = strtod(text, NULL) + 0.0; /* -0 becomes 0 */
    return *p == '\0' && isfinite(*value);
}

static qs_status set_number(const qs_key *key, const char *text, const char *where, double *out)
{
    double value = 0;
    if (!scan_number(text, &value)) {
        return refuse(key, where, text, "is not a number");
    }
    if (!in_range(key, value)) {
        return refuse(key, where, text, "is out of range");
    }
    *out = value;
    return QS_OK;
}

/* The three spellings that YAML 1.2 has, among them Python's. 1.1's other words (yes, no, on, off)
 * are refused: no reader of 1.2 takes them, and which one reads a file is not to matter. */
static bool is_word(const char *text, const char *const spellings[3])
{
    bool is = false;
    for (int i = 0; i < 3; i++) {
        is = is || strcmp(text, spellings[i]) == 0;
    }
    return is;
}

static qs_status set_bool(qs_config *cfg, const qs_key *key, const char *text, const char *where)
{
    static const char *const yes[] = {"true", "True", "TRUE"};
    static const char *const no[] = {"false", "False", "FALSE"};
    if (!is_word(text, yes) && !is_word(text, no)) {
        return refuse(key, where, text, "is neither true nor false");
    }
    *(bool *)field(cfg, key) = is_word(text, yes);
    return QS_OK;
}

/* Of a name that the key does not have. */
static const char *why_unknown(const qs_key *key, const char *text)
{
    for (int i = 0; i < qs_other_values_count; i++) {
        const qs_other_value *row = &qs_other_values[i];
        if (strcmp(row->key, key->name) == 0 && strcmp(row->theirs, text) == 0) {
            return row->says;
        }
    }
    return "is not a known name";
}

static qs_status set_name(qs_config *cfg, const qs_key *key, const char *text, const char *where)
{
    for (int i = 0; i < QS_KEY_NAMES_MAX && key->names[i]; i++) {
        if (strcmp(text, key->names[i]) == 0) {
            *(int *)field(cfg, key) = i;
            return QS_OK;
        }
    }
    return refuse(key, where, text, why_unknown(key, text));
}

/* Length of the UTF-8 sequence at `p` if a path may contain it, else 0: what YAML could not carry
 * through the resolved configuration (control characters, line separators, invalid bytes). */
static int path_letter(const unsigned char *p)
{
    if (p[0] < 0x80) {
        return p[0] >= 0x20 && p[0] != 0x7f;
    }
    int length = p[0] >= 0xf0 ? 4 : p[0] >= 0xe0 ? 3 : 2;
    if (p[0] < 0xc2 || p[0] > 0xf4) {
        return 0;
    }
    uint32_t code = p[0] & (0x7fu >> length);
    for (int i = 1; i < length; i++) {
        if ((p[i] & 0xc0) != 0x80) {
            return 0;
        }
        code = code << 6 | (p[i] & 0x3fu);
    }
    bool shortest = code >= (length == 2 ? 0x80u : length == 3 ? 0x800u : 0x10000u);
    bool allowed = (code >= 0xa0 && code <= 0xd7ff && code != 0x2028 && code != 0x2029) ||
                   (code >= 0xe000 && code <= 0xfffd && code != 0xfeff) ||
                   (code >= 0x10000 && code <= 0x10ffff);
    return shortest && allowed ? length : 0;
}

static qs_status set_path(qs_config *cfg, const qs_key *key, const char *text, bool plain,
                          const char *where)
{
    if (plain && (!*text || strcmp(text, "~") == 0 || strcmp(text, "null") == 0)) {
        return refuse(key, where, text, "is no path (write \"\" for none)");
    }
    for (const char *p = text; *p;) {
        int length = path_letter((const unsigned char *)p);
        if (length == 0) {
            return QS_FAIL(QS_ERR_CONFIG_VALUE,
                           "%s: %s: byte %d of the path is a control character or not UTF-8; "
                           "rename the file",
                           where, key->name, (int)(p - text));
        }
        p += length;
    }
    char *out = field(cfg, key);
    memset(out, 0, QS_PATH_MAX); /* equal structs stay equal byte by byte */
    memcpy(out, text, strlen(text));
    return QS_OK;
}

/* A list of words, each at most once, to a bit for each; the words end at `count` or at NULL. */
static qs_status read_words(const qs_key *key, const qs_value *value, const char *where,
                            const char *const *words, int count, const char *unknown,
                            uint32_t *bits)
{
    *bits = 0;
    for (int i = 0; i < value->count; i++) {
        int found = 0;
        while (found < count && words[found] != NULL &&
               strcmp(value->items[i].text, words[found]) != 0) {
            found++;
        }
        if (found == count || words[found] == NULL) {
            return refuse(key, where, value->items[i].text, unknown);
        }
        if (*bits >> found & 1) {
            return refuse(key, where, value->items[i].text, "is named twice");
        }
        *bits |= 1u << found;
    }
    return QS_OK;
}

static qs_status set_targets(qs_config *cfg, const qs_key *key, const qs_value *value,
                             const char *where)
{
    uint32_t bits = 0;
    if (value->list) {
        QS_TRY(read_words(key, value, where, TARGETS, TARGET_COUNT, "is not a linear of a layer",
                          &bits));
    } else {
        for (int i = 0; i < TARGET_SET_COUNT; i++) {
            if (strcmp(value->items[0].text, TARGET_SETS[i].name) == 0) {
                bits = TARGET_SETS[i].bits | QS_TARGETS_SET;
            }
        }
        if (bits == 0) {
            return refuse(key, where, value->items[0].text,
                          "is no set of linears; a list names them, as in [q_proj, v_proj]");
        }
    }
    if (bits == 0) {
        return refuse(key, where, "[]", "leaves nothing to train");
    }
    *(uint32_t *)field(cfg, key) = bits;
    return QS_OK;
}

static qs_status set_list(qs_config *cfg, const qs_key *key, const qs_value *value,
                          const char *where)
{
    if (key->type == QS_KEY_FLAGS) {
        return read_words(key, value, where, key->names, QS_KEY_NAMES_MAX, "is not a known name",
                          field(cfg, key));
    }
    if (value->count != 2) {
        return refuse(key, where, "[...]", "has not two numbers");
    }
    double *pair = field(cfg, key);
    for (int i = 0; i < 2; i++) {
        if (!value->items[i].plain) {
            return refuse(key, where, value->items[i].text, "is a quoted text, not a number");
        }
        QS_TRY(set_number(key, value->items[i].text, where, &pair[i]));
    }
    return QS_OK;
}

qs_status qs_key_set(qs_config *cfg, const qs_key *key, const qs_value *value, const char *where)
{
    const char *text = value->count ? value->items[0].text : "[]";
    bool plain = value->count && value->items[0].plain;
    if (key->type == QS_KEY_TARGETS) {
        return set_targets(cfg, key, value, where);
    }
    bool wants_list = key->type == QS_KEY_PAIR || key->type == QS_KEY_FLAGS;
    if (wants_list != value->list) {
        return refuse(key, where, text, wants_list ? "is not a list" : "is a list");
    }
    if (wants_list) {
        return set_list(cfg, key, value, where);
    }
    bool is_text = key->type == QS_KEY_PATH || key->type == QS_KEY_ENUM;
    if (!is_text && !plain) {
        return refuse(key, where, text, "is a quoted text; write it without quotes");
    }
    switch (key->type) {
    case QS_KEY_I64:
    case QS_KEY_BYTES:
        return set_integer(cfg, key, text, where);
    case QS_KEY_F64:
        return set_number(key, text, where, field(cfg, key));
    case QS_KEY_BOOL:
        return set_bool(cfg, key, text, where);
    case QS_KEY_PATH:
        return set_path(cfg, key, text, plain, where);
    default:
        return set_name(cfg, key, text, where);
    }
}

/* ---- formatting ---- */

/* The shortest decimal that reads back as `value`, with a point, so that YAML 1.1 readers take it
 * for a number too. */
static void format_number(double value, char *out, size_t capacity)
{
    char digits[40];
    for (int precision = 1; precision <= 17; precision++) {
        snprintf(digits, sizeof digits, "%.*g", precision, value);
        if (strtod(digits, NULL) == value) {
            break;
        }
    }
    size_t mantissa = strcspn(digits, "e");
    bool whole = memchr(digits, '.', mantissa) == NULL;
    snprintf(out, capacity, "%.*s%s%s", (int)mantissa, digits, whole ? ".0" : "",
             digits + mantissa);
}

static void format_path(const char *path, char *out, size_t capacity)
{
    size_t n = 0;
    out[n++] = '"';
    for (const char *p = path; *p && n + 4 < capacity; p++) {
        if (*p == '"' || *p == '\\') {
            out[n++] = '\\';
        }
        out[n++] = *p;
    }
    out[n++] = '"';
    out[n] = '\0';
}

static void format_targets(uint32_t bits, char *out, size_t capacity)
{
    for (int i = 0; i < TARGET_SET_COUNT; i++) {
        if (bits == (TARGET_SETS[i].bits | QS_TARGETS_SET)) {
            snprintf(out, capacity, "%s", TARGET_SETS[i].name);
            return;
        }
    }
    out[0] = '\0';
    add_words(TARGETS, TARGET_COUNT, bits, out, capacity);
}

void qs_key_format(const qs_config *cfg, const qs_key *key, char *out, size_t capacity)
{
    const void *at = const_field(cfg, key);
    char first[40], second[40];
    switch (key->type) {
    case QS_KEY_I64:
    case QS_KEY_BYTES:
        if (key->zero && *(const int64_t *)at == 0) {
            snprintf(out, capacity, "%s", key->zero);
        } else if (*(const int64_t *)at < 0) {
            snprintf(out, capacity, "%s", key->names[-1 - *(const int64_t *)at]);
        } else {
            snprintf(out, capacity, "%lld", (long long)*(const int64_t *)at);
        }
        break;
    case QS_KEY_F64:
        format_number(*(const double *)at, out, capacity);
        break;
    case QS_KEY_PAIR:
        format_number(((const double *)at)[0], first, sizeof first);
        format_number(((const double *)at)[1], second, sizeof second);
        snprintf(out, capacity, "[%s, %s]", first, second);
        break;
    case QS_KEY_BOOL:
        snprintf(out, capacity, "%s", *(const bool *)at ? "true" : "false");
        break;
    case QS_KEY_PATH:
        format_path(at, out, capacity);
        break;
    case QS_KEY_ENUM:
        snprintf(out, capacity, "%s", key->names[*(const int *)at]);
        break;
    case QS_KEY_TARGETS:
        format_targets(*(const uint32_t *)at, out, capacity);
        break;
    case QS_KEY_FLAGS:
        out[0] = '\0';
        add_words(key->names, QS_KEY_NAMES_MAX, *(const uint32_t *)at, out, capacity);
        break;
    }
}
