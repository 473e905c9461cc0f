/* The manual page, the completions and the help say what the option tables say, and the shells and
 * formatters that are here take them. */
#define _GNU_SOURCE
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/log.h"
#include "cli/cli_impl.h"
#include "cli/manual.h"
#include "config/config_keys.h"
#include "device/gpu_kinds.h"
#include "tests/scratch.h"

static char folder[SCRATCH_MAX], output[1 << 16];

static void make_folder(void)
{
    qs_log_init(0, 1, QS_LOG_QUIET, false);
    scratch_make(folder, NULL);
    cr_assert_eq(chdir(folder), 0);
}

static void remove_folder(void)
{
    cr_assert_eq(chdir("/"), 0);
    scratch_remove(folder);
}

TestSuite(manual, .init = make_folder, .fini = remove_folder, .timeout = 120);

static void write_file(const char *name, void (*content)(FILE *))
{
    FILE *out = fopen(name, "w");
    cr_assert_not_null(out);
    content(out);
    cr_assert_eq(fclose(out), 0);
}

/* Run a shell command, both streams into `output`. \return the exit code. */
static int shell(const char *command)
{
    char both[8192];
    snprintf(both, sizeof both, "{ %s ; } 2>&1", command);
    FILE *pipe = popen(both, "r");
    cr_assert_not_null(pipe);
    output[fread(output, 1, sizeof output - 1, pipe)] = '\0';
    return pclose(pipe);
}

static bool have(const char *program)
{
    char command[64];
    snprintf(command, sizeof command, "command -v %s", program);
    return shell(command) == 0;
}

static char *read_back(const char *name)
{
    static char text[1 << 18];
    FILE *file = fopen(name, "r");
    cr_assert_not_null(file, "%s", name);
    text[fread(text, 1, sizeof text - 1, file)] = '\0';
    cr_assert(feof(file), "%s is larger than the test has room for", name);
    fclose(file);
    return text;
}

/* ---- the page ---- */

/* "--dry-run" as roff has it. */
static void in_roff(const char *text, char *out)
{
    for (; *text != '\0'; text++) {
        if (*text == '-') {
            *out++ = '\\';
        }
        *out++ = *text;
    }
    *out = '\0';
}

/* Is `word` in [text, end), and neither the front nor the back part of a longer one? */
static bool holds_bold(const char *text, const char *end, const char *word)
{
    char roff[128], bold[160];
    in_roff(word, roff);
    snprintf(bold, sizeof bold, "\\fB%s\\fR", roff);
    const char *at = strstr(text, bold);
    return at != NULL && (end == NULL || at < end);
}

static void section_of(const char *page, const char *title, const char **begin, const char **end)
{
    *begin = strstr(page, title);
    cr_assert_not_null(*begin, "%s", title);
    *end = strstr(*begin + 1, "\n.S");
}

Test(manual, page_has_every_option_in_its_commands_section)
{
    write_file("qshard.1", qs_manual_page);
    const char *page = read_back("qshard.1"), *begin, *end;
    for (int i = 0; i < qs_cli_commands_count; i++) {
        const qs_cli_command *command = &qs_cli_commands[i];
        for (const struct argp_option *o = command->options; o->name != NULL; o++) {
            char title[64], name[64];
            snprintf(title, sizeof title, ".SS \"qshard %s ", command->name);
            section_of(page, o->group < QS_CLI_COMMON_GROUP ? title : ".SH \"OPTIONS OF ALL",
                       &begin, &end);
            snprintf(name, sizeof name, "--%s", o->name);
            cr_assert(holds_bold(begin, end, name), "%s %s", command->name, name);
        }
    }
}

Test(manual, page_has_every_key_and_exit_code)
{
    write_file("qshard.1", qs_manual_page);
    const char *page = read_back("qshard.1"), *begin, *end;
    section_of(page, ".SH CONFIGURATION", &begin, &end);
    for (int i = 0; i < qs_keys_count; i++) {
        cr_assert(holds_bold(begin, end, qs_keys[i].name), "%s", qs_keys[i].name);
    }
    for (int i = 0; i < qs_cli_exit_codes_count; i++) {
        char line[32];
        snprintf(line, sizeof line, "\n.B %d\n", qs_cli_exit_codes[i].code);
        cr_assert_not_null(strstr(page, line), "%s", line);
    }
}

/* What holds without any formatter: known requests only, each paragraph with a tag has one, no line
 * that a formatter would take for a request by mistake. */
Test(manual, page_is_made_of_known_requests)
{
    static const char *const known[] = {".\\\"", ".TH", ".SH", ".SS", ".TP", ".PP", ".B",
                                        ".BR",   ".RI", ".I",  ".br", ".nf", ".fi"};
    write_file("qshard.1", qs_manual_page);
    bool tagged = false;
    for (char *line = strtok(read_back("qshard.1"), "\n"); line; line = strtok(NULL, "\n")) {
        bool is_known = line[0] != '.' && line[0] != '\'';
        const size_t length = strcspn(line, " ");
        for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
            is_known = is_known || (strlen(known[i]) == length && !strncmp(line, known[i], length));
        }
        cr_assert(is_known, "%s", line);
        cr_assert(!tagged || line[0] != '.' || line[1] == 'B', "no tag before %s", line);
        tagged = strcmp(line, ".TP") == 0;
    }
}

Test(manual, formatters_have_nothing_to_say_of_the_page)
{
    write_file("qshard.1", qs_manual_page);
    if (have("groff")) {
        cr_assert_eq(shell("groff -man -Tutf8 -ww -z qshard.1"), 0);
        cr_assert_str_eq(output, "");
    }
    if (have("man")) {
        cr_assert_eq(shell("LC_ALL=C MANWIDTH=80 man --warnings -l qshard.1 > page.txt"), 0);
        cr_assert_str_eq(output, "");
    }
    if (have("mandoc")) { /* long lines are a matter of style, the date is left out */
        shell("mandoc -T lint -W warning qshard.1 | grep -v 'missing date'");
        cr_assert_str_eq(output, "");
    }
}

/* ---- the help ---- */

static bool says(const char *text, const char *word)
{
    return text != NULL && strstr(text, word) != NULL;
}

Test(manual, every_option_with_a_value_says_its_default)
{
    for (int i = 0; i < qs_cli_commands_count; i++) {
        for (const struct argp_option *o = qs_cli_commands[i].options; o->name != NULL; o++) {
            cr_assert(o->arg == NULL || says(o->doc, "default") || says(o->doc, "(needed)"),
                      "%s --%s: %s", qs_cli_commands[i].name, o->name, o->doc);
            cr_assert_not_null(o->doc);
        }
    }
}

static void print_help_of(const qs_cli_command *command, const char *name)
{
    cr_assert_not_null(freopen(name, "w", stdout));
    qs_cli_command_help(command);
    cr_assert_eq(fflush(stdout), 0);
}

Test(manual, help_has_every_option_of_its_command)
{
    for (int i = 0; i < qs_cli_commands_count; i++) {
        print_help_of(&qs_cli_commands[i], "help.txt");
        const char *text = read_back("help.txt");
        for (const struct argp_option *o = qs_cli_commands[i].options; o->name != NULL; o++) {
            char name[64];
            snprintf(name, sizeof name, "--%s", o->name);
            cr_assert(says(text, name), "%s: %s", qs_cli_commands[i].name, name);
        }
        for (int k = 0; qs_cli_commands[i].keys && k < qs_keys_count; k++) {
            cr_assert(says(text, qs_keys[k].name), "%s", qs_keys[k].name);
        }
    }
}

/* A letter typed wrong in the middle of any option of any command. */
Test(manual, an_unknown_option_suggests_the_nearest)
{
    for (int i = 0; i < qs_cli_commands_count; i++) {
        for (const struct argp_option *o = qs_cli_commands[i].options; o->name != NULL; o++) {
            char word[64], hint[96];
            char *argv[] = {"command", word, "value", NULL};
            qs_cli_args args;
            snprintf(word, sizeof word, "--%s", o->name);
            word[2 + strlen(o->name) / 2] = 'z';
            snprintf(hint, sizeof hint, "did you mean --%s?", o->name);
            const qs_status st = qs_cli_parse(&qs_cli_commands[i], 3, argv, &args);
            cr_assert_eq(qs_exit_code(st), 2);
            cr_assert(says(qs_error_text(), hint), "%s", qs_error_text());
            qs_error_clear();
        }
    }
}

/* ---- bash ---- */

/* What bash offers for the words; the last is the one that is being typed. In `output`, a line
 * each. */
static void complete(const char *words)
{
    char command[1024];
    snprintf(
        command, sizeof command,
        "bash -c 'source ./completion; COMP_WORDS=(%s); "
        "COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _qshard; printf \"%%s\\n\" \"${COMPREPLY[@]}\"'",
        words);
    cr_assert_eq(shell(command), 0, "%s", output);
}

static void offers(const char *words, const char *expected)
{
    complete(words);
    cr_assert_str_eq(output, expected, "%s:\n%s", words, output);
}

Test(manual, bash_completes_commands_options_values_keys_and_paths)
{
    write_file("completion", qs_manual_bash);
    cr_assert_eq(mkdir("runs", 0777), 0);
    write_file("run one.yaml", qs_manual_keys);
    if (!have("bash")) {
        return;
    }
    cr_assert_eq(shell("bash -n completion"), 0, "%s", output);
    offers("qshard tr", "train\n");
    offers("qshard e", "eval\nexport\n");
    offers("qshard --v", "--version\n");
    offers("qshard train --dr", "--dry-run\n");
    offers("qshard train --dump-", "--dump-grads\n--dump-order\n");
    offers("qshard eval --dump-", "--dump-logits\n");
    offers("qshard train --resume m", "must\n");
    offers("qshard train --resume = m", "must\n");
    offers("qshard quantize --device =", "auto\ncpu\ncuda\n");
    offers("qshard train --set train.st", "train.steps=\ntrain.stall_limit=\n");
    offers("qshard train --set train.recompute = s", "selective\n");
    offers("qshard train --set lora.rslora = \"\"", "true\nfalse\n");
    offers("qshard train --set shard.group = \"\"", "auto\nworld\nnode\n");
    offers("qshard plan --gpu H", "H100\nH200\n");
    offers("qshard plan --gpus \"\"", "\n");
    offers("qshard train ru", "run one.yaml\nruns\n");
    offers("qshard export runs -o ru", "run one.yaml\nruns\n");
    offers("qshard export runs --output = runs", "runs\n");
    offers("qshard train --set base = ru", "run one.yaml\nruns\n");
}

Test(manual, bash_offers_every_option_and_key)
{
    write_file("completion", qs_manual_bash);
    if (!have("bash")) {
        return;
    }
    for (int i = 0; i < qs_cli_commands_count; i++) {
        char words[64];
        snprintf(words, sizeof words, "qshard %s --", qs_cli_commands[i].name);
        complete(words);
        for (const struct argp_option *o = qs_cli_commands[i].options; o->name != NULL; o++) {
            char line[64];
            snprintf(line, sizeof line, "--%s\n", o->name);
            cr_assert(says(output, line), "%s%s", words, o->name);
        }
    }
    complete("qshard train --set \"\"");
    for (int k = 0; k < qs_keys_count; k++) {
        cr_assert(says(output, qs_keys[k].name), "%s", qs_keys[k].name);
    }
    complete("qshard plan --gpu \"\"");
    for (int k = 0; k < qs_gpu_kinds_count; k++) {
        cr_assert(says(output, qs_gpu_kinds[k].name), "%s", qs_gpu_kinds[k].name);
    }
}

/* ---- zsh ---- */

Test(manual, zsh_has_every_option_of_every_command)
{
    write_file("_qshard", qs_manual_zsh);
    const char *text = read_back("_qshard");
    for (int i = 0; i < qs_cli_commands_count; i++) {
        char title[64];
        snprintf(title, sizeof title, "\n        %s)\n", qs_cli_commands[i].name);
        const char *begin = strstr(text, title);
        cr_assert_not_null(begin, "%s", title);
        const char *end = strstr(begin, ";;");
        for (const struct argp_option *o = qs_cli_commands[i].options; o->name != NULL; o++) {
            char name[64];
            snprintf(name, sizeof name, "--%s%s[", o->name, o->arg != NULL ? "=" : "");
            const char *at = strstr(begin, name);
            cr_assert(at != NULL && at < end, "%s: %s", qs_cli_commands[i].name, name);
        }
    }
    if (have("zsh")) {
        cr_assert_eq(shell("zsh -n _qshard"), 0, "%s", output);
        cr_assert_str_eq(output, "");
    }
}

/* ---- docs/configuration.md ---- */

Test(manual, the_page_of_keys_is_the_table)
{
    const char *source = getenv("QSHARD_SOURCE_DIR");
    char path[1024];
    if (source == NULL) {
        cr_skip_test("QSHARD_SOURCE_DIR is not set");
    }
    write_file("keys.md", qs_manual_keys);
    char *table = strdup(read_back("keys.md"));
    snprintf(path, sizeof path, "%s/docs/configuration.md", source);
    const char *page = read_back(path);
    cr_assert_not_null(strstr(page, table),
                       "docs/configuration.md has not the table that qshard_manual keys writes");
    free(table);
}
