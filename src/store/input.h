/* Input files that are not there: the message names the setting and what makes such a file, which a
 * reader of files does not know. What is wrong inside of a file, its reader says. */
#ifndef QS_STORE_INPUT_H
#define QS_STORE_INPUT_H

#include "comm/comm.h"

/** Ends of the message. */
#define QS_INPUT_BASE "qshard quantize makes it"
#define QS_INPUT_DATA "qshard-prep makes it"
#define QS_INPUT_PROMPTS "qshard-prep --prompts makes it"

/** Whether this process can open the file or directory `path`, which `key` ("data.train") names;
 * `remedy`: what to do where it is not there. Not collective. \return QS_ERR_INPUT_MISSING. */
qs_status qs_input_expect_here(const char *key, const char *path, const char *remedy);

/** The same of a file that one rank has to see (qs_seen_find): an error where none does.
 * Collective. */
qs_status qs_input_expect(const char *key, const char *path, const char *remedy, qs_comm *comm);

#endif
