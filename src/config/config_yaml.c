/* From YAML events to keys. libyaml gives the syntax; what is allowed is decided here: one
 * document, a mapping of keys and of sections one level deep, scalars and flat lists as values.
 * Anchors, aliases, tags and duplicate keys are refused, so that a file says what a reader thinks
 * it says. */
#include <stdio.h>
#include <string.h>
#include <yaml.h>

#include "config/config_hints.h"
#include "config/config_keys.h"

typedef struct {
    yaml_parser_t parser;
    yaml_event_t event; /* the current one; owned */
    const char *path;
    qs_config *cfg;
    bool *seen;           /* per key */
    char where[160];      /* "run.yaml:7" */
    char sections[8][32]; /* already read */
    int n_sections;
} reader;

static qs_status syntax_error(reader *r)
{
    const yaml_parser_t *p = &r->parser;
    if (p->error == YAML_MEMORY_ERROR) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for the YAML parser", r->path);
    }
    const char *problem = p->problem != NULL ? p->problem : "unreadable";
    const char *remedy = ""; /* of the two usual ones */
    if (strstr(problem, "cannot start any token") != NULL) {
        remedy = "; indent with spaces, not with tabs, and quote what begins with @, ` or %";
    } else if (strstr(problem, "could not find expected ':'") != NULL) {
        remedy = "; a key is followed by a colon and a blank, here or in the line above";
    }
    return QS_FAIL(QS_ERR_CONFIG_VALUE, "%s:%zu: not valid YAML: %s%s", r->path,
                   p->problem_mark.line + 1, problem, remedy);
}

/* Step to the next event and refuse what no configuration needs. */
static qs_status next(reader *r)
{
    yaml_event_delete(&r->event);
    memset(&r->event, 0, sizeof r->event);
    if (!yaml_parser_parse(&r->parser, &r->event)) {
        return syntax_error(r);
    }
    const yaml_event_t *e = &r->event;
    snprintf(r->where, sizeof r->where, "%.120s:%zu", r->path, e->start_mark.line + 1);
    const char *what = NULL;
    if (e->type == YAML_ALIAS_EVENT || (e->type == YAML_SCALAR_EVENT && e->data.scalar.anchor) ||
        (e->type == YAML_SEQUENCE_START_EVENT && e->data.sequence_start.anchor) ||
        (e->type == YAML_MAPPING_START_EVENT && e->data.mapping_start.anchor)) {
        what = "an anchor or alias";
    } else if ((e->type == YAML_SCALAR_EVENT && e->data.scalar.tag) ||
               (e->type == YAML_SEQUENCE_START_EVENT && e->data.sequence_start.tag) ||
               (e->type == YAML_MAPPING_START_EVENT && e->data.mapping_start.tag)) {
        what = "a tag";
    }
    if (what) {
        return QS_FAIL(QS_ERR_CONFIG_VALUE, "%s: %s is not allowed here; write the value out",
                       r->where, what);
    }
    return QS_OK;
}

static qs_status expect(reader *r, yaml_event_type_t type, const char *what)
{
    if (r->event.type != type) {
        return QS_FAIL(QS_ERR_CONFIG_VALUE, "%s: expected %s", r->where, what);
    }
    return QS_OK;
}

static qs_status take_item(reader *r, const char *name, qs_value *value)
{
    const char *text = (const char *)r->event.data.scalar.value;
    size_t length = r->event.data.scalar.length;
    if (value->count == QS_VALUE_ITEMS_MAX) {
        return QS_FAIL(QS_ERR_CONFIG_VALUE, "%s: %s: more than %d items", r->where, name,
                       QS_VALUE_ITEMS_MAX);
    }
    if (length >= QS_PATH_MAX || memchr(text, '\0', length)) {
        return QS_FAIL(QS_ERR_CONFIG_VALUE,
                       "%s: %s: the value is longer than %d bytes or holds a NUL", r->where, name,
                       QS_PATH_MAX - 1);
    }
    memcpy(value->items[value->count].text, text, length + 1);
    value->items[value->count].plain = r->event.data.scalar.style == YAML_PLAIN_SCALAR_STYLE;
    value->count++;
    return QS_OK;
}

/* The current event starts the value of `name`; afterwards it is the value's last event. */
static qs_status read_value(reader *r, const char *name, qs_value *value)
{
    memset(value, 0, sizeof *value);
    if (r->event.type == YAML_SCALAR_EVENT) {
        return take_item(r, name, value);
    }
    if (r->event.type != YAML_SEQUENCE_START_EVENT) {
        return QS_FAIL(QS_ERR_CONFIG_VALUE, "%s: %s takes a value, not a mapping", r->where, name);
    }
    value->list = true;
    QS_TRY(next(r));
    while (r->event.type != YAML_SEQUENCE_END_EVENT) {
        if (r->event.type != YAML_SCALAR_EVENT) {
            return QS_FAIL(QS_ERR_CONFIG_VALUE, "%s: %s: a list of plain values is expected",
                           r->where, name);
        }
        QS_TRY(take_item(r, name, value));
        QS_TRY(next(r));
    }
    return QS_OK;
}

/* Behind the key stands its value, which may be a section's, or one that cannot be read. */
static qs_status unknown_key(reader *r, const char *name)
{
    char hint[QS_KEY_HINT_MAX], where[sizeof r->where];
    memcpy(where, r->where, sizeof where);
    const bool holds_keys = next(r) == QS_OK && r->event.type == YAML_MAPPING_START_EVENT;
    qs_error_clear(); /* the key is what is reported */
    qs_key_hint(name, holds_keys, hint, sizeof hint);
    return QS_FAIL(QS_ERR_CONFIG_KEY, "%s: unknown key \"%.80s\"; %s", where, name, hint);
}

static qs_status duplicate_key(const reader *r, const char *name)
{
    return QS_FAIL(QS_ERR_CONFIG_KEY, "%s: \"%.80s\" is given twice; keep one", r->where, name);
}

static qs_status read_key(reader *r, const char *name)
{
    int index = qs_key_find(name);
    if (index < 0) {
        return unknown_key(r, name);
    }
    if (r->seen[index]) {
        return duplicate_key(r, name);
    }
    r->seen[index] = true;
    char where[sizeof r->where]; /* of the key; a list may end lines below */
    memcpy(where, r->where, sizeof where);
    qs_value value;
    QS_TRY(next(r));
    QS_TRY(read_value(r, name, &value));
    return qs_key_set(r->cfg, &qs_keys[index], &value, where);
}

/* The name of the mapping key that is the current event, with "section." in front. */
static qs_status key_name(reader *r, const char *section, char *name, size_t capacity)
{
    if (r->event.type != YAML_SCALAR_EVENT) {
        return QS_FAIL(QS_ERR_CONFIG_VALUE, "%s: a key must be a plain name", r->where);
    }
    const char *text = (const char *)r->event.data.scalar.value;
    size_t length = r->event.data.scalar.length;
    if (length > 80 || memchr(text, '\0', length)) {
        return QS_FAIL(QS_ERR_CONFIG_KEY, "%s: \"%.40s...\" is no key%s", r->where, text,
                       memchr(text, ':', length) != NULL ? "; a colon is followed by a blank" : "");
    }
    snprintf(name, capacity, "%s%s%s", section, section[0] ? "." : "", text);
    return QS_OK;
}

static qs_status read_section(reader *r, const char *section)
{
    for (int i = 0; i < r->n_sections; i++) {
        if (strcmp(r->sections[i], section) == 0) {
            return duplicate_key(r, section);
        }
    }
    snprintf(r->sections[r->n_sections++], sizeof r->sections[0], "%.31s", section);
    QS_TRY(next(r));
    if (r->event.type != YAML_MAPPING_START_EVENT) {
        return QS_FAIL(QS_ERR_CONFIG_VALUE,
                       "%s: %s is a section; write %s: {key: value, ...}, with a blank behind each "
                       "colon, or its keys in the lines below, each indented",
                       r->where, section, section);
    }
    QS_TRY(next(r));
    while (r->event.type != YAML_MAPPING_END_EVENT) {
        char name[160];
        QS_TRY(key_name(r, section, name, sizeof name));
        QS_TRY(read_key(r, name));
        QS_TRY(next(r));
    }
    return QS_OK;
}

static qs_status read_document(reader *r)
{
    QS_TRY(next(r));
    QS_TRY(expect(r, YAML_STREAM_START_EVENT, "a stream"));
    QS_TRY(next(r));
    QS_TRY(expect(r, YAML_DOCUMENT_START_EVENT, "keys (the file is empty)"));
    QS_TRY(next(r));
    QS_TRY(expect(r, YAML_MAPPING_START_EVENT, "key: value lines, with a blank behind the colon"));
    QS_TRY(next(r));
    while (r->event.type != YAML_MAPPING_END_EVENT) {
        char name[160];
        QS_TRY(key_name(r, "", name, sizeof name));
        /* "train.steps: 1" at the top would be a second spelling of one key. */
        if (strchr(name, '.')) {
            return unknown_key(r, name);
        }
        QS_TRY(qs_key_is_section(name) ? read_section(r, name) : read_key(r, name));
        QS_TRY(next(r));
    }
    QS_TRY(next(r));
    QS_TRY(expect(r, YAML_DOCUMENT_END_EVENT, "the end of the document"));
    QS_TRY(next(r));
    return expect(r, YAML_STREAM_END_EVENT, "one document only");
}

qs_status qs_config_read_yaml(qs_config *cfg, const char *text, size_t bytes, const char *path,
                              bool *seen)
{
    reader r = {.path = path, .cfg = cfg, .seen = seen};
    if (!yaml_parser_initialize(&r.parser)) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for the YAML parser", path);
    }
    yaml_parser_set_input_string(&r.parser, (const unsigned char *)text, bytes);
    qs_status st = read_document(&r);
    yaml_event_delete(&r.event);
    yaml_parser_delete(&r.parser);
    return st;
}
