/* Completions of bash and zsh. */
#include <string.h>

#include "cli/cli_impl.h"
#include "cli/manual.h"
#include "config/config_keys.h"
#include "device/gpu_kinds.h"

/* ---- what can stand behind an option ---- */

typedef enum {
    NOTHING, /* the option takes no value, or one that nobody can guess */
    PATHS,
    WORDS, /* a list: "auto|must|never", kinds of GPU */
    KEYS,  /* KEY=VALUE of the configuration */
} value_kind;

static bool ends_in(const char *text, const char *end)
{
    const size_t length = strlen(text), wanted = strlen(end);
    return length >= wanted && strcmp(text + length - wanted, end) == 0;
}

static bool is_gpu(const struct argp_option *o)
{
    return strcmp(o->arg, "GPU") == 0;
}

static value_kind value_of(const struct argp_option *o)
{
    if (o->arg == NULL) {
        return NOTHING;
    }
    if (strcmp(o->arg, "KEY=VALUE") == 0) {
        return KEYS;
    }
    if (ends_in(o->arg, "FILE") || ends_in(o->arg, "DIR")) {
        return PATHS;
    }
    return strchr(o->arg, '|') != NULL || is_gpu(o) ? WORDS : NOTHING;
}

static void put_words(FILE *out, const struct argp_option *o)
{
    for (int i = 0; is_gpu(o) && i < qs_gpu_kinds_count; i++) {
        fprintf(out, "%s%s", i > 0 ? " " : "", qs_gpu_kinds[i].name);
    }
    for (const char *p = is_gpu(o) ? "" : o->arg; *p != '\0'; p++) {
        fputc(*p == '|' ? ' ' : *p, out);
    }
}

static void put_key_values(FILE *out, const qs_key *key)
{
    const char *gap = "";
    if (key->zero != NULL) {
        fputs(key->zero, out);
        gap = " ";
    }
    for (int i = 0; i < QS_KEY_NAMES_MAX && key->names[i] != NULL; i++, gap = " ") {
        fprintf(out, "%s%s", gap, key->names[i]);
    }
    fputs(key->type == QS_KEY_BOOL ? "true false" : "", out);
}

static bool has_values(const qs_key *key)
{
    return key->names[0] != NULL || key->zero != NULL || key->type == QS_KEY_BOOL;
}

static bool has_letter(const struct argp_option *o)
{
    return o->key < 128;
}

/* ---- bash ---- */

/* Bash takes "=" for a word of its own, so the word before a value is found one or two back. */
static const char BASH_HEAD[] =
    "# Completion of qshard in bash, made from the program's own tables.\n"
    "_qshard()\n"
    "{\n"
    "    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]} "
    "command=${COMP_WORDS[1]}\n"
    "    local words=\n"
    "    COMPREPLY=()\n"
    "    if [[ $cur == = ]]; then\n"
    "        cur=\n"
    "    elif [[ $prev == = ]]; then\n"
    "        prev=${COMP_WORDS[COMP_CWORD-2]}\n"
    "    fi\n";

static const char BASH_TAIL[] = "    if [[ $cur == -* ]]; then\n"
                                "        COMPREPLY=($(compgen -W \"$words\" -- \"$cur\"))\n"
                                "    else\n"
                                "        _qshard_paths \"$cur\"\n"
                                "    fi\n"
                                "}\n"
                                "_qshard_paths()\n"
                                "{\n"
                                "    local IFS=$'\\n'\n"
                                "    COMPREPLY=($(compgen -f -- \"$1\"))\n"
                                "    compopt -o filenames 2>/dev/null\n"
                                "}\n"
                                "complete -F _qshard qshard\n";

static void bash_commands(FILE *out)
{
    fputs("    if [[ $COMP_CWORD -eq 1 ]]; then\n        COMPREPLY=($(compgen -W \"", out);
    for (int i = 0; i < qs_cli_commands_count; i++) {
        fprintf(out, "%s ", qs_cli_commands[i].name);
    }
    fputs("--help --version\" -- \"$cur\"))\n        return\n    fi\n", out);
}

/* "train:--resume)" and what is offered there. */
static void bash_value(FILE *out, const qs_cli_command *command, const struct argp_option *o)
{
    const value_kind kind = value_of(o);
    fprintf(out, "        %s:--%s", command->name, o->name);
    if (has_letter(o)) {
        fprintf(out, "|%s:-%c", command->name, (char)o->key);
    }
    fputs(") ", out);
    if (kind == PATHS) {
        fputs("_qshard_paths \"$cur\"; ", out);
    } else if (kind == KEYS) {
        fputs("COMPREPLY=($(compgen -S = -W \"$keys\" -- \"$cur\")); "
              "compopt -o nospace 2>/dev/null; ",
              out);
    } else if (kind == WORDS) {
        fputs("COMPREPLY=($(compgen -W \"", out);
        put_words(out, o);
        fputs("\" -- \"$cur\")); ", out);
    }
    fputs("return ;;\n", out);
}

static void put_key_names(FILE *out)
{
    for (int i = 0; i < qs_keys_count; i++) {
        fprintf(out, "%s%s", i > 0 ? " " : "", qs_keys[i].name);
    }
}

static void bash_keys(FILE *out)
{
    fputs("    local keys=\"", out);
    put_key_names(out);
    fputs("\"\n", out);
}

static void bash_key_values(FILE *out)
{
    for (int i = 0; i < qs_keys_count; i++) {
        if (has_values(&qs_keys[i])) {
            fprintf(out, "        *:%s) COMPREPLY=($(compgen -W \"", qs_keys[i].name);
            put_key_values(out, &qs_keys[i]);
            fputs("\" -- \"$cur\")); return ;;\n", out);
        } else if (qs_keys[i].type != QS_KEY_PATH) {
            fprintf(out, "        *:%s) return ;;\n", qs_keys[i].name);
        }
    }
}

static void bash_options(FILE *out, const qs_cli_command *command)
{
    fprintf(out, "        %s) words=\"", command->name);
    for (const struct argp_option *o = command->options; o->name != NULL; o++) {
        fprintf(out, "%s--%s", o == command->options ? "" : " ", o->name);
    }
    fputs("\" ;;\n", out);
}

void qs_manual_bash(FILE *out)
{
    fputs(BASH_HEAD, out);
    bash_keys(out);
    bash_commands(out);
    fputs("    case $command:$prev in\n", out);
    for (int i = 0; i < qs_cli_commands_count; i++) {
        for (const struct argp_option *o = qs_cli_commands[i].options; o->name != NULL; o++) {
            if (o->arg != NULL) {
                bash_value(out, &qs_cli_commands[i], o);
            }
        }
    }
    bash_key_values(out);
    fputs("    esac\n    case $command in\n", out);
    for (int i = 0; i < qs_cli_commands_count; i++) {
        bash_options(out, &qs_cli_commands[i]);
    }
    fputs("    esac\n", out);
    fputs(BASH_TAIL, out);
}

/* ---- zsh ---- */

/* Text within single quotes of a specification: quotes, brackets and colons have a meaning. */
static void zsh_text(FILE *out, const char *text)
{
    for (const char *p = text; *p != '\0'; p++) {
        if (*p == '\'') {
            fputs("'\\''", out);
        } else {
            fputs(strchr("[]:\\", *p) != NULL ? "\\" : "", out);
            fputc(*p, out);
        }
    }
}

static void zsh_action(FILE *out, const struct argp_option *o)
{
    switch (value_of(o)) {
    case PATHS:
        fputs("_files", out);
        break;
    case KEYS:
        fputs("_qshard_keys", out);
        break;
    case WORDS:
        fputc('(', out);
        put_words(out, o);
        fputc(')', out);
        break;
    case NOTHING:
        break;
    }
}

/* One specification: "--resume=[what it does]:auto|must|never:(auto must never)". */
static void zsh_option(FILE *out, const struct argp_option *o, bool letter)
{
    fputs(" \\\n                ", out);
    if (letter) {
        fprintf(out, "'-%c[", (char)o->key);
    } else {
        const bool again = value_of(o) == KEYS || strcmp(o->name, "link") == 0;
        fprintf(out, "'%s--%s%s[", again ? "*" : "", o->name, o->arg != NULL ? "=" : "");
    }
    zsh_text(out, o->doc);
    fputc(']', out);
    if (o->arg != NULL) {
        fputc(':', out);
        zsh_text(out, o->arg);
        fputc(':', out);
        zsh_action(out, o);
    }
    fputc('\'', out);
}

static void zsh_command(FILE *out, const qs_cli_command *command)
{
    fprintf(out, "        %s)\n            _arguments", command->name);
    for (const struct argp_option *o = command->options; o->name != NULL; o++) {
        zsh_option(out, o, false);
        if (has_letter(o)) {
            zsh_option(out, o, true);
        }
    }
    if (command->n_words != 0) {
        fputs(" \\\n                '*:path:_files'", out);
    }
    fputs(" ;;\n", out);
}

static void zsh_keys(FILE *out)
{
    fputs("_qshard_keys()\n{\n    local -a keys=(", out);
    put_key_names(out);
    fputs(")\n    compadd -S = -a keys\n}\n", out);
}

void qs_manual_zsh(FILE *out)
{
    fputs("#compdef qshard\n# Completion of qshard in zsh, made from the program's own tables.\n",
          out);
    zsh_keys(out);
    fputs("_qshard()\n{\n    local -a commands=(\n", out);
    for (int i = 0; i < qs_cli_commands_count; i++) {
        fprintf(out, "        '%s:", qs_cli_commands[i].name);
        zsh_text(out, qs_cli_commands[i].summary);
        fputs("'\n", out);
    }
    fputs("    )\n"
          "    if (( CURRENT == 2 )); then\n"
          "        _describe command commands\n"
          "        return\n"
          "    fi\n"
          "    local command=$words[2]\n"
          "    shift words\n"
          "    (( CURRENT-- ))\n"
          "    case $command in\n",
          out);
    for (int i = 0; i < qs_cli_commands_count; i++) {
        zsh_command(out, &qs_cli_commands[i]);
    }
    fputs("    esac\n}\n_qshard \"$@\"\n", out);
}
