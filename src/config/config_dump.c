/* The table as text: the resolved configuration, and the list of keys for the help. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "config/config_keys.h"

/* "meaning; allowed (unit)" */
static void explain(const qs_key *key, FILE *out)
{
    char allowed[256];
    qs_key_allowed(key, allowed, sizeof allowed);
    fprintf(out, "%s", key->meaning);
    if (key->type != QS_KEY_PATH) {
        fprintf(out, "; %s", allowed);
    }
    if (key->unit) {
        fprintf(out, " (%s)", key->unit);
    }
    fputc('\n', out);
}

static void write_keys(const qs_config *cfg, FILE *out)
{
    const char *section = "";
    size_t section_length = 0;
    fputs(QS_CONFIG_FIRST_LINE "\n", out);
    for (int i = 0; i < qs_keys_count; i++) {
        const qs_key *key = &qs_keys[i];
        const char *dot = strchr(key->name, '.');
        size_t length = dot ? (size_t)(dot - key->name) : 0;
        if (length != section_length || strncmp(section, key->name, length) != 0) {
            section = key->name;
            section_length = length;
            if (length) {
                fprintf(out, "%.*s:\n", (int)length, section);
            }
        }
        char value[QS_KEY_TEXT_MAX];
        qs_key_format(cfg, key, value, sizeof value);
        fprintf(out, "%s%s: %s  # ", dot ? "  " : "", dot ? dot + 1 : key->name, value);
        explain(key, out);
    }
}

char *qs_config_dump(const qs_config *cfg)
{
    char *text = NULL;
    size_t bytes = 0;
    FILE *out = open_memstream(&text, &bytes);
    if (!out) {
        return NULL;
    }
    write_keys(cfg, out);
    if (fclose(out) != 0) {
        free(text);
        return NULL;
    }
    return text;
}

void qs_config_print_keys(void)
{
    printf("%-22s %-14s %s\n", "key", "default", "meaning; allowed (unit)");
    for (int i = 0; i < qs_keys_count; i++) {
        const qs_key *key = &qs_keys[i];
        printf("%-22s %-14s ", key->name, key->preset[0] ? key->preset : "\"\"");
        explain(key, stdout);
    }
}
