/* Text files line by line, in memory that does not grow with them: a run's logs do for as long as
 * it goes on. */
#ifndef QS_STORE_LINES_H
#define QS_STORE_LINES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"

enum { QS_LINE_MAX = 1 << 20 }; /* bytes, newline included */

typedef struct {
    const char *text; /* [bytes], without the newline, which follows if the line is whole */
    size_t bytes;
    int64_t at, end; /* where it begins and the next one does, in the file */
    bool whole;      /* a newline ends it; else it has been cut off, or is above QS_LINE_MAX */
} qs_line;

typedef struct qs_lines qs_lines;

/** A plain file from its beginning, as long as it is now. */
qs_status qs_lines_open(qs_lines **out, const char *path);

/** The next line, whose text is borrowed until the next call; of one above QS_LINE_MAX its last
 * bytes. At the end `at` and `end` are the same. */
qs_status qs_lines_next(qs_lines *lines, qs_line *line);
void qs_lines_close(qs_lines *lines);

/** Does this line stay? Asked twice, with the same answer. */
typedef bool (*qs_line_stays)(const qs_line *line, void *ctx);

/** Put a file that holds only the lines that stay in the place of `path`, completely or not at all,
 * as qs_io_write_file does. */
qs_status qs_lines_filter(const char *path, qs_line_stays stays, void *ctx);

#endif
