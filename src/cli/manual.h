/* The manual page and the shells' completions, made from the tables that parse the command line and
 * print --help, so that they cannot say anything else. Written at build time by manual_main.c. */
#ifndef QS_CLI_MANUAL_H
#define QS_CLI_MANUAL_H

#include <stdio.h>

/** qshard(1): every command with its options, every key of the configuration; roff, man macros. */
void qs_manual_page(FILE *out);

/** Completion of commands, options, values from a list, configuration keys and paths. */
void qs_manual_bash(FILE *out);
void qs_manual_zsh(FILE *out);

/** The configuration keys as a table of docs/configuration.md. */
void qs_manual_keys(FILE *out);

#endif
