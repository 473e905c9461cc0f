/* Run while building: `qshard_manual man|bash|zsh|keys` writes one of the files of manual.h. */
#include <string.h>

#include "cli/manual.h"

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*write)(FILE *out);
    } files[] = {{"man", qs_manual_page},
                 {"bash", qs_manual_bash},
                 {"zsh", qs_manual_zsh},
                 {"keys", qs_manual_keys}};
    for (size_t i = 0; argc == 2 && i < sizeof files / sizeof *files; i++) {
        if (strcmp(argv[1], files[i].name) == 0) {
            files[i].write(stdout);
            return fflush(stdout) == 0 ? 0 : 1;
        }
    }
    fprintf(stderr, "usage: qshard_manual man|bash|zsh|keys\n");
    return 2;
}
