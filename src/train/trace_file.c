#include "train/trace_file.h"

#include <stdio.h>
#include <stdlib.h>

#include "base/log.h"
#include "base/trace.h"
#include "store/io.h"

/* How the file begins. */
#define BEGIN "{\"traceEvents\": ["

qs_status qs_trace_file_check(const char *path, qs_comm *comm)
{
    return qs_comm_agree(comm, qs_comm_rank(comm) == 0 ? qs_io_try_file(path, BEGIN) : QS_OK);
}

qs_status qs_trace_file_start(qs_comm *comm)
{
    QS_TRY(qs_comm_barrier(comm));
    qs_trace_start();
    return QS_OK;
}

/* Names are the program's own: letters, digits, dots, blanks. Times are microseconds. */
static void print_spans(FILE *out, const qs_comm *comm)
{
    const int rank = qs_comm_rank(comm);
    size_t count = 0, lost = 0;
    const qs_span *spans = qs_trace_spans(&count, &lost);
    fprintf(out,
            "{\"name\": \"process_name\", \"ph\": \"M\", \"pid\": %d, \"args\": {\"name\": "
            "\"rank %d, host of rank %d\"}}",
            rank, rank, qs_comm_host(comm));
    for (int lane = 0; lane < QS_LANE_COUNT; lane++) {
        fprintf(out,
                ",\n{\"name\": \"thread_name\", \"ph\": \"M\", \"pid\": %d, \"tid\": %d, \"args\": "
                "{\"name\": \"%s\"}}",
                rank, lane, qs_lane_name((qs_lane)lane));
    }
    for (size_t i = 0; i < count; i++) {
        fprintf(out,
                ",\n{\"name\": \"%s\", \"ph\": \"X\", \"ts\": %.1f, \"dur\": %.1f, \"pid\": %d, "
                "\"tid\": %d}",
                spans[i].name, 1e6 * spans[i].begin_s, 1e6 * (spans[i].end_s - spans[i].begin_s),
                rank, (int)spans[i].lane);
    }
    if (lost > 0) {
        qs_log_warn("trace: %zu spans of rank %d are left out", lost, rank);
    }
}

/* This rank's part of the file; the caller frees it. */
static qs_status own_part(char **text, const qs_comm *comm)
{
    size_t bytes = 0;
    *text = NULL;
    FILE *out = open_memstream(text, &bytes);
    if (out != NULL) {
        print_spans(out, comm);
    }
    if (out == NULL || fclose(out) != 0) {
        return QS_FAIL(QS_ERR_MEMORY, "trace: no memory for the spans of a rank");
    }
    return QS_OK;
}

/* Everybody's part in turn, to `out` where there is one. */
static qs_status collect_parts(FILE *out, char *own, qs_comm *comm)
{
    for (int r = 0; r < qs_comm_nranks(comm); r++) {
        char *text = r == qs_comm_rank(comm) ? own : NULL;
        QS_TRY(qs_comm_bcast_text(comm, &text, r));
        if (out != NULL) {
            fputs(r == 0 ? BEGIN "\n" : ",\n", out);
            fputs(text, out);
        }
        if (text != own) {
            free(text);
        }
    }
    if (out != NULL) {
        fputs("\n]}\n", out);
    }
    return QS_OK;
}

/* The whole file's text, on rank 0; the caller frees it. Collective. */
static qs_status whole_text(char **text, size_t *bytes, qs_comm *comm)
{
    char *own = NULL;
    FILE *out = NULL;
    qs_status st = own_part(&own, comm);
    if (st == QS_OK && qs_comm_rank(comm) == 0) {
        out = open_memstream(text, bytes);
        st = out != NULL ? QS_OK : QS_FAIL(QS_ERR_MEMORY, "trace: no memory for the file");
    }
    st = qs_comm_agree(comm, st);
    if (st == QS_OK) {
        st = collect_parts(out, own, comm);
    }
    if (out != NULL && fclose(out) != 0 && st == QS_OK) {
        st = QS_FAIL(QS_ERR_MEMORY, "trace: no memory for the file");
    }
    free(own);
    return qs_comm_agree(comm, st);
}

qs_status qs_trace_file_write(const char *path, qs_comm *comm)
{
    char *text = NULL;
    size_t bytes = 0;
    qs_trace_stop();
    qs_status st = whole_text(&text, &bytes, comm);
    if (st == QS_OK) {
        st = qs_comm_agree(comm,
                           qs_comm_rank(comm) == 0 ? qs_io_write_file(path, text, bytes) : QS_OK);
    }
    free(text);
    if (st == QS_OK) {
        qs_log_info("%s: written; chrome://tracing and ui.perfetto.dev show it", path);
    }
    return st;
}
