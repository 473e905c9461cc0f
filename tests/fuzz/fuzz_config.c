/* Fuzz target of the configuration: the input up to a form feed is the file, each line after it a
 * --set. What is accepted must come back from its own dump byte by byte; what is refused must say
 * why in one line. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "config/config.h"

enum { SETS_MAX = 16 };

static void require(int condition)
{
    if (!condition) {
        abort();
    }
}

static void check_dump(const qs_config *accepted)
{
    static qs_config again;
    char *text = qs_config_dump(accepted);
    require(text != NULL);
    require(qs_config_parse(&again, text, strlen(text), "dump", NULL, 0) == QS_OK);
    require(memcmp(&again, accepted, sizeof again) == 0);
    free(text);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    static qs_config cfg;
    const char *sets[SETS_MAX];
    int n_sets = 0;
    char *text = malloc(bytes + 1);
    if (text == NULL) {
        return 0;
    }
    if (bytes > 0) {
        memcpy(text, data, bytes);
    }
    text[bytes] = '\0';
    char *end = memchr(text, '\f', bytes);
    size_t file_bytes = end != NULL ? (size_t)(end - text) : bytes;
    char *rest = NULL;
    for (char *line = end != NULL ? strtok_r(end + 1, "\n", &rest) : NULL;
         line != NULL && n_sets < SETS_MAX; line = strtok_r(NULL, "\n", &rest)) {
        sets[n_sets++] = line;
    }
    if (qs_config_parse(&cfg, text, file_bytes, "fuzz", sets, n_sets) == QS_OK) {
        check_dump(&cfg);
    } else {
        require(qs_error_text()[0] != '\0');
    }
    qs_error_clear();
    free(text);
    return 0;
}
