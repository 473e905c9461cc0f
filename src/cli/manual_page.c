/* qshard.1 */
#include <string.h>

#include "cli/cli_impl.h"
#include "cli/manual.h"
#include "config/config_keys.h"
#include "qshard_version.h"

/* ---- roff ---- */

/* Text as it is: hyphens are the option's, backslashes and dots no requests. */
static void put(FILE *out, const char *text)
{
    for (const char *p = text; *p != '\0'; p++) {
        switch (*p) {
        case '\\':
            fputs("\\e", out);
            break;
        case '-':
            fputs("\\-", out);
            break;
        case '\n':
            fputs("\n", out);
            break;
        default:
            fputc(*p, out);
        }
    }
}

/* A line of text; one that begins like a request is kept from being one. */
static void put_line(FILE *out, const char *text)
{
    if (text[0] == '.' || text[0] == '\'') {
        fputs("\\&", out);
    }
    put(out, text);
    fputc('\n', out);
}

static void put_bold(FILE *out, const char *text)
{
    fputs("\\fB", out);
    put(out, text);
    fputs("\\fR", out);
}

static void put_italic(FILE *out, const char *text)
{
    fputs("\\fI", out);
    put(out, text);
    fputs("\\fR", out);
}

/* ---- parts ---- */

static void put_option(FILE *out, const struct argp_option *o)
{
    char name[80];
    fputs(".TP\n", out);
    if (o->key < 128) { /* a letter as well */
        snprintf(name, sizeof name, "-%c", (char)o->key);
        put_bold(out, name);
        if (o->arg != NULL) {
            fputc(' ', out);
            put_italic(out, o->arg);
        }
        fputs(", ", out);
    }
    snprintf(name, sizeof name, "--%s", o->name);
    put_bold(out, name);
    if (o->arg != NULL) {
        fputc('=', out);
        put_italic(out, o->arg);
    }
    fputc('\n', out);
    put_line(out, o->doc);
}

static void put_command(FILE *out, const qs_cli_command *command)
{
    char title[128];
    snprintf(title, sizeof title, "qshard %s %s", command->name, command->usage);
    fputs(".SS \"", out);
    put(out, title);
    fputs("\"\n", out);
    put_line(out, command->summary);
    for (const struct argp_option *o = command->options; o->name != NULL; o++) {
        if (o->group < QS_CLI_COMMON_GROUP) {
            put_option(out, o);
        }
    }
}

static void put_key(FILE *out, const qs_key *key)
{
    char allowed[256];
    fputs(".TP\n", out);
    put_bold(out, key->name);
    fputs(": ", out);
    put_italic(out, key->preset[0] != '\0' ? key->preset : "\"\"");
    fputc('\n', out);
    put_line(out, key->meaning);
    qs_key_allowed(key, allowed, sizeof allowed);
    fputs(".br\nAllowed: ", out);
    put(out, allowed);
    if (key->unit != NULL && key->unit[0] != '\0') {
        fputs(" (", out);
        put(out, key->unit);
        fputc(')', out);
    }
    fputc('\n', out);
}

static void put_exit_codes(FILE *out)
{
    for (int i = 0; i < qs_cli_exit_codes_count; i++) {
        fprintf(out, ".TP\n.B %d\n", qs_cli_exit_codes[i].code);
        put_line(out, qs_cli_exit_codes[i].meaning);
    }
}

/* ---- the whole ---- */

static const char HEAD[] =
    ".SH NAME\n"
    "qshard \\- QLoRA fine\\-tuning, sharded over MPI ranks\n"
    ".SH SYNOPSIS\n"
    ".B qshard\n"
    ".I COMMAND\n"
    ".RI [ OPTION ...]\n"
    ".I ARGUMENT\n"
    ".br\n"
    ".B mpirun \\-np\n"
    ".I N\n"
    ".B qshard train\n"
    ".I RUN.yaml\n"
    ".SH DESCRIPTION\n"
    "Fine\\-tunes large language models with LoRA on a frozen base in 4 bits (NF4), of which each "
    "of N\n"
    "MPI ranks holds 1/N. A base is made once by\n"
    ".BR \"qshard quantize\" ,\n"
    "token files by\n"
    ".BR qshard\\-prep ;\n"
    "a run is described by a YAML file.\n"
    ".BR quantize ,\n"
    ".BR train ,\n"
    ".B eval\n"
    "and\n"
    ".B sample\n"
    "run on any number of ranks, with the same result, and\n"
    ".B bench\n"
    "measures those it is started on; the other commands work alone.\n"
    ".SH COMMANDS\n";

static const char TAIL[] =
    ".SH ENVIRONMENT\n"
    ".TP\n"
    ".B OMP_NUM_THREADS\n"
    "Threads of a rank, unless the configuration says it; default: its share of the cores that it "
    "was\n"
    "given.\n"
    ".TP\n"
    ".B QSHARD_PLUGIN\n"
    "The plugin for GPUs; default: libqshard_cuda.so beside the program, else in ../lib and\n"
    "then ../lib/qshard from there.\n"
    ".SH EXAMPLES\n"
    ".nf\n"
    "qshard plan run.yaml \\-\\-gpu H100 \\-\\-gpus 4\n"
    "mpirun \\-\\-bind\\-to none \\-np 4 qshard train run.yaml \\-\\-set train.steps=200\n"
    "qshard export runs/demo \\-o adapter\n"
    ".fi\n"
    ".SH SEE ALSO\n"
    ".BR mpirun (1);\n"
    "qshard\\-prep \\-\\-help\n";

void qs_manual_page(FILE *out)
{
    fputs(".\\\" Made from the program's own tables.\n", out);
    fprintf(out, ".TH QSHARD 1 \"\" \"qshard %s\" \"User Commands\"\n", QSHARD_VERSION);
    fputs(HEAD, out);
    for (int i = 0; i < qs_cli_commands_count; i++) {
        put_command(out, &qs_cli_commands[i]);
    }
    fputs(".SH \"OPTIONS OF ALL COMMANDS\"\n", out);
    for (const struct argp_option *o = qs_cli_plain_options; o->name != NULL; o++) {
        put_option(out, o);
    }
    fputs(".PP\n.B qshard \\-\\-version\nshows version and build.\n", out);
    fputs(".SH CONFIGURATION\nKeys of the YAML file, with their defaults. Any of them can be given "
          "as\n.BR \\-\\-set .\n",
          out);
    for (int i = 0; i < qs_keys_count; i++) {
        put_key(out, &qs_keys[i]);
    }
    fputs(".SH \"EXIT STATUS\"\n", out);
    put_exit_codes(out);
    fputs(TAIL, out);
}

/* ---- docs/configuration.md ---- */

/* A cell of a table: bars would end it. */
static void put_cell(FILE *out, const char *text)
{
    for (const char *p = text; *p != '\0'; p++) {
        fputs(*p == '|' ? "\\" : "", out);
        fputc(*p, out);
    }
}

void qs_manual_keys(FILE *out)
{
    fputs("| key | default | allowed | unit | may change when a run is resumed | meaning |\n"
          "|---|---|---|---|---|---|\n",
          out);
    for (int i = 0; i < qs_keys_count; i++) {
        const qs_key *key = &qs_keys[i];
        char allowed[256];
        qs_key_allowed(key, allowed, sizeof allowed);
        fprintf(out, "| `%s` | `%s` | ", key->name, key->preset[0] != '\0' ? key->preset : "\"\"");
        put_cell(out, allowed);
        fprintf(out, " | %s | %s | ", key->unit != NULL ? key->unit : "",
                key->neutral ? "yes" : "no");
        put_cell(out, key->meaning);
        fputs(" |\n", out);
    }
}
