/* What a benchmark says: facts about the place, then tables, on stdout and as one JSON document.
 * Both are made from the same rows. On ranks other than 0 nothing is printed or written. */
#ifndef QS_BENCH_REPORT_H
#define QS_BENCH_REPORT_H

#include <jansson.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"

typedef struct {
    const char *name, *unit; /* unit "": none. JSON: the name alone */
    int width;
    int digits; /* behind the point; QS_BENCH_TEXT, QS_BENCH_SCIENTIFIC */
} qs_bench_column;

enum { QS_BENCH_TEXT = -1, QS_BENCH_SCIENTIFIC = -2 };

/** Text or a number, as the column says. NaN is what is not known: "-", null. */
typedef struct {
    const char *text;
    double number;
} qs_bench_cell;

#define QS_BENCH_T(x) ((qs_bench_cell){.text = (x)})
#define QS_BENCH_N(x) ((qs_bench_cell){.number = (double)(x)})

typedef struct qs_bench_report qs_bench_report;

/** "format" of the file. */
#define QS_BENCH_FORMAT "qshard-bench"

/** Begin. `speaks`: this is rank 0. */
qs_status qs_bench_report_open(qs_bench_report **out, const char *name, bool speaks);

/** A fact of a section ("host", "settings", "bounds"); in print "# section: key value, ..." once
 * the section changes or a table starts. A number that is not finite is not known: "-", null. */
void qs_bench_report_text(qs_bench_report *r, const char *section, const char *key,
                          const char *value);
void qs_bench_report_number(qs_bench_report *r, const char *section, const char *key, double value);

/** What is in the JSON document alone; `value` (NULL: nothing) is the report's from now on. */
void qs_bench_report_json(qs_bench_report *r, const char *key, json_t *value);

/** The measurements that the next row's times are made of: `values` [count] times `scale`, in their
 * order. The row has them as "samples", and their quartiles as "p25" and "p75", in `unit`; in the
 * JSON document alone. */
void qs_bench_report_samples(qs_bench_report *r, const double *values, int64_t count, double scale,
                             const char *unit);

/** Lines of comment, in print alone. */
void qs_bench_report_note(qs_bench_report *r, const char *text);

/** Start a table called `name`. `columns` is borrowed until the next one starts or the end. */
void qs_bench_report_table(qs_bench_report *r, const char *name, const qs_bench_column *columns,
                           int count);
void qs_bench_report_row(qs_bench_report *r, const qs_bench_cell *cells);

/** The JSON document goes to `path`, unless NULL. */
qs_status qs_bench_report_write(qs_bench_report *r, const char *path);

/** After an error: if a table was begun, the document goes to `path` as it is, with the recorded
 * error as its "error". What comes of that does not change the record. */
void qs_bench_report_fail(qs_bench_report *r, qs_status status, const char *path);

void qs_bench_report_close(qs_bench_report *r);

#endif
