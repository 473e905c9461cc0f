/* The log: rank 0 speaks on stderr, the others are silent unless asked.
 *
 * On a terminal the progress line is redrawn in place; in a file every line stands alone, without
 * carriage returns and without colour. Results (tables, sample text) go to stdout by plain
 * printf, never through here. */
#ifndef QS_BASE_LOG_H
#define QS_BASE_LOG_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum { QS_LOG_QUIET, QS_LOG_WARN, QS_LOG_INFO, QS_LOG_DEBUG } qs_log_level;

/** Who logs. Before the call the process is rank 0 of 1 at level info. `all_ranks` lets every rank
 * speak, with `[rank r]` in front. */
void qs_log_init(int rank, int nranks, qs_log_level level, bool all_ranks);

void qs_log_warn(const char *format, ...) __attribute__((format(printf, 1, 2)));
void qs_log_info(const char *format, ...) __attribute__((format(printf, 1, 2)));
void qs_log_debug(const char *format, ...) __attribute__((format(printf, 1, 2)));

/** How a command ended: rank 0 says it with --quiet, too. */
void qs_log_end(const char *format, ...) __attribute__((format(printf, 1, 2)));

/** Does this process say what has `level`? For what is printed elsewhere and is no result. */
bool qs_log_says(qs_log_level level);

/** Make one line of `text`: control characters, which names out of foreign files may hold, become
 * spaces. */
void qs_flatten(char *text, size_t bytes);

/** Show progress: redrawn in place on a terminal with percentage and time left, a plain line per
 * call otherwise. `text` holds what is worth reading ("loss 2.31  lr 1.9e-4"). */
void qs_progress(const char *what, int64_t done, int64_t total, const char *text);

/** End the progress line, if there is one, so that the next output starts on a line of its own. */
void qs_progress_end(void);

#endif
