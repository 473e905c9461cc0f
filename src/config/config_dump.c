/* The table as text: the resolved configuration, and the list of keys for the help. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "config/config_keys.h"

/* "meaning; allowed (unit)". \return whether it was written. */
static bool explain(const qs_key *key, FILE *out)
{
    char allowed[256];
    qs_key_allowed(key, allowed, sizeof allowed);
    const bool shown = key->type != QS_KEY_PATH;
    return fprintf(out, "%s%s%s%s%s%s\n", key->meaning, shown ? "; " : "", shown ? allowed : "",
                   key->unit ? " (" : "", key->unit ? key->unit : "", key->unit ? ")" : "") >= 0;
}

/* Each call is looked at: a text in memory that cannot grow is cut off, and neither ferror nor
 * fclose tell. */
static bool write_keys(const qs_config *cfg, FILE *out)
{
    const char *section = "";
    size_t section_length = 0;
    bool written = fputs(QS_CONFIG_FIRST_LINE "\n", out) >= 0;
    for (int i = 0; i < qs_keys_count; i++) {
        const qs_key *key = &qs_keys[i];
        const char *dot = strchr(key->name, '.');
        size_t length = dot ? (size_t)(dot - key->name) : 0;
        if (length != section_length || strncmp(section, key->name, length) != 0) {
            section = key->name;
            section_length = length;
            if (length) {
                written = fprintf(out, "%.*s:\n", (int)length, section) >= 0 && written;
            }
        }
        char value[QS_KEY_TEXT_MAX];
        qs_key_format(cfg, key, value, sizeof value);
        written =
            fprintf(out, "%s%s: %s  # ", dot ? "  " : "", dot ? dot + 1 : key->name, value) >= 0 &&
            written;
        written = explain(key, out) && written;
    }
    return written;
}

char *qs_config_dump(const qs_config *cfg)
{
    char *text = NULL;
    size_t bytes = 0;
    FILE *out = open_memstream(&text, &bytes);
    if (!out) {
        return NULL;
    }
    const bool written = write_keys(cfg, out);
    if (fclose(out) != 0 || !written) {
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
        (void)explain(key, stdout);
    }
}
