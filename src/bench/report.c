#include "bench/report.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench/kernels/measure.h"
#include "qshard_version.h"
#include "store/io.h"

struct qs_bench_report {
    bool speaks;
    json_t *root;
    char section[32];     /* whose facts the current line holds; "": there is no line */
    json_t *rows, *units; /* borrowed; of the current table */
    json_t *samples;      /* of the next row, or NULL */
    double quartile[2];   /* ditto */
    const qs_bench_column *columns;
    int n_columns;
};

qs_status qs_bench_report_open(qs_bench_report **out, const char *name, bool speaks)
{
    qs_bench_report *r = calloc(1, sizeof *r);
    *out = r;
    if (r == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "memory: a report cannot be allocated");
    }
    r->speaks = speaks;
    r->root =
        json_pack("{s:s, s:i, s:s, s:s, s:s, s:{}}", "format", QS_BENCH_FORMAT, "format_version", 1,
                  "version", QSHARD_VERSION, "commit", QSHARD_COMMIT, "bench", name, "tables");
    if (r->root == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "memory: a report cannot be allocated");
    }
    if (speaks) {
        printf("# qshard bench %s  %s (%s)\n", name, QSHARD_VERSION, QSHARD_COMMIT);
    }
    return QS_OK;
}

static void end_line(qs_bench_report *r)
{
    if (r->speaks && r->section[0] != '\0') {
        printf("\n");
        (void)fflush(stdout);
    }
    r->section[0] = '\0';
}

/* The object of a section, in print the begin of its line or a comma. */
static json_t *section_of(qs_bench_report *r, const char *section)
{
    json_t *object = json_object_get(r->root, section);
    if (object == NULL) {
        json_object_set_new(r->root, section, json_object());
        object = json_object_get(r->root, section);
    }
    if (strcmp(r->section, section) != 0) {
        end_line(r);
        snprintf(r->section, sizeof r->section, "%s", section);
        if (r->speaks) {
            printf("# %s:", section);
        }
    } else if (r->speaks) {
        printf(",");
    }
    return object;
}

void qs_bench_report_text(qs_bench_report *r, const char *section, const char *key,
                          const char *value)
{
    json_object_set_new(section_of(r, section), key, json_string(value));
    if (r->speaks) {
        printf(" %s %s", key, value);
    }
}

static json_t *number_of(double value)
{
    return !isfinite(value)                              ? json_null()
           : value == floor(value) && fabs(value) < 9e15 ? json_integer((json_int_t)value)
                                                         : json_real(value);
}

void qs_bench_report_number(qs_bench_report *r, const char *section, const char *key, double value)
{
    json_object_set_new(section_of(r, section), key, number_of(value));
    if (r->speaks && isfinite(value)) {
        printf(" %s %.6g", key, value);
    } else if (r->speaks) {
        printf(" %s -", key);
    }
}

void qs_bench_report_json(qs_bench_report *r, const char *key, json_t *value)
{
    if (value != NULL) {
        json_object_set_new(r->root, key, value);
    }
}

void qs_bench_report_note(qs_bench_report *r, const char *text)
{
    end_line(r);
    if (r->speaks) {
        printf("# %s\n", text);
    }
}

/* ---- tables ---- */

static void print_heading(const qs_bench_report *r, bool units)
{
    for (int i = 0; i < r->n_columns; i++) {
        const qs_bench_column *c = &r->columns[i];
        const char *word = units ? c->unit : c->name;
        const int width = i == 0 ? c->width - 2 : c->width; /* behind "# " */
        printf(c->digits == QS_BENCH_TEXT ? "%s%-*s" : "%s%*s", i == 0 ? "# " : " ", width, word);
    }
    printf("\n");
}

void qs_bench_report_table(qs_bench_report *r, const char *name, const qs_bench_column *columns,
                           int count)
{
    end_line(r);
    r->columns = columns;
    r->n_columns = count;
    json_t *units = json_object(), *table = json_object();
    for (int i = 0; i < count; i++) {
        json_object_set_new(units, columns[i].name, json_string(columns[i].unit));
    }
    r->rows = json_array();
    r->units = units;
    json_object_set_new(table, "units", units);
    json_object_set_new(table, "rows", r->rows);
    json_object_set_new(json_object_get(r->root, "tables"), name, table);
    if (r->speaks) {
        print_heading(r, false);
        print_heading(r, true);
        (void)fflush(stdout);
    }
}

static void print_cell(const qs_bench_column *c, const qs_bench_cell *cell)
{
    if (c->digits == QS_BENCH_TEXT) {
        printf("%-*s", c->width, cell->text);
    } else if (!isfinite(cell->number)) {
        printf("%*s", c->width, "-");
    } else if (c->digits == QS_BENCH_SCIENTIFIC) {
        printf("%*.2e", c->width, cell->number);
    } else {
        printf("%*.*f", c->width, c->digits, cell->number);
    }
}

void qs_bench_report_samples(qs_bench_report *r, const double *values, int64_t count, double scale,
                             const char *unit)
{
    static const char *const names[] = {"samples", "p25", "p75"};
    double *sorted = calloc((size_t)count, sizeof *sorted);
    r->samples = sorted != NULL ? json_array() : NULL;
    if (r->samples == NULL) {
        free(sorted);
        return; /* the table has no room for them, and is no less right */
    }
    for (int64_t i = 0; i < count; i++) {
        sorted[i] = values[i] * scale;
        json_array_append_new(r->samples, number_of(sorted[i]));
    }
    qs_bench_sort(sorted, count);
    r->quartile[0] = qs_bench_quantile(sorted, count, 0.25);
    r->quartile[1] = qs_bench_quantile(sorted, count, 0.75);
    free(sorted);
    for (int i = 0; i < 3; i++) {
        json_object_set_new(r->units, names[i], json_string(unit));
    }
}

static void add_samples(qs_bench_report *r, json_t *row)
{
    if (r->samples != NULL) {
        json_object_set_new(row, "p25", number_of(r->quartile[0]));
        json_object_set_new(row, "p75", number_of(r->quartile[1]));
        json_object_set_new(row, "samples", r->samples);
        r->samples = NULL;
    }
}

void qs_bench_report_row(qs_bench_report *r, const qs_bench_cell *cells)
{
    json_t *row = json_object();
    for (int i = 0; i < r->n_columns; i++) {
        const qs_bench_column *c = &r->columns[i];
        json_object_set_new(row, c->name,
                            c->digits == QS_BENCH_TEXT ? json_string(cells[i].text)
                                                       : number_of(cells[i].number));
        if (r->speaks) {
            printf("%s", i == 0 ? "" : " ");
            print_cell(c, &cells[i]);
        }
    }
    add_samples(r, row);
    json_array_append_new(r->rows, row);
    if (r->speaks) {
        printf("\n");
        (void)fflush(stdout);
    }
}

/* ---- the end ---- */

qs_status qs_bench_report_write(qs_bench_report *r, const char *path)
{
    end_line(r);
    if (path == NULL || !r->speaks) {
        return QS_OK;
    }
    char *text = json_dumps(r->root, JSON_INDENT(2) | JSON_REAL_PRECISION(9));
    if (text == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "memory: the report cannot be written");
    }
    const size_t bytes = strlen(text);
    text[bytes] = '\n'; /* in place of the NUL */
    const qs_status st = qs_io_write_file(path, text, bytes + 1);
    free(text);
    return st;
}

void qs_bench_report_fail(qs_bench_report *r, qs_status status, const char *path)
{
    char text[QS_ERROR_LINE_MAX];
    if (r->rows != NULL) {
        snprintf(text, sizeof text, "E%d %s", (int)status, qs_error_text());
        json_object_set_new(r->root, "error", json_string(text));
        (void)qs_bench_report_write(r, path);
    }
    end_line(r);
}

void qs_bench_report_close(qs_bench_report *r)
{
    if (r != NULL) {
        json_decref(r->samples);
        json_decref(r->root);
        free(r);
    }
}
