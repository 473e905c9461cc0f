#include "train/trace_file.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/log.h"
#include "base/trace.h"

static qs_status open_file(FILE **out, const char *path, const char *mode)
{
    *out = fopen(path, mode);
    return *out != NULL ? QS_OK
                        : QS_FAIL(QS_ERR_IO, "%s: cannot be written: %s", path, strerror(errno));
}

qs_status qs_trace_file_check(const char *path, qs_comm *comm)
{
    FILE *file = NULL;
    qs_status st = QS_OK;
    if (qs_comm_rank(comm) == 0) {
        st = open_file(&file, path, "a");
    }
    if (file != NULL) {
        fclose(file);
    }
    return qs_comm_agree(comm, st);
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

static qs_status append(FILE *out, const char *text, int rank, const char *path)
{
    const bool written =
        fputs(rank == 0 ? "{\"traceEvents\": [\n" : ",\n", out) >= 0 && fputs(text, out) >= 0;
    return written ? QS_OK : QS_FAIL(QS_ERR_IO, "%s: could not be written", path);
}

/* Everybody's part in turn. */
static qs_status write_parts(FILE *out, char *own, const char *path, qs_comm *comm)
{
    qs_status st = QS_OK;
    for (int r = 0; r < qs_comm_nranks(comm); r++) {
        char *text = r == qs_comm_rank(comm) ? own : NULL;
        QS_TRY(qs_comm_bcast_text(comm, &text, r));
        if (out != NULL && st == QS_OK) {
            st = append(out, text, r, path);
        }
        if (text != own) {
            free(text);
        }
    }
    return st;
}

qs_status qs_trace_file_write(const char *path, qs_comm *comm)
{
    qs_status st = QS_OK;
    char *own = NULL;
    FILE *out = NULL;
    qs_trace_stop();
    st = own_part(&own, comm);
    if (st == QS_OK && qs_comm_rank(comm) == 0) {
        st = open_file(&out, path, "w");
    }
    QS_GOTO(qs_comm_agree(comm, st));
    st = write_parts(out, own, path, comm);
    if (out != NULL) {
        const bool ended = fputs("\n]}\n", out) >= 0;
        const bool closed = fclose(out) == 0;
        if (st == QS_OK && !(ended && closed)) {
            st = QS_FAIL(QS_ERR_IO, "%s: could not be written", path);
        }
    }
    QS_GOTO(qs_comm_agree(comm, st));
    qs_log_info("%s: written; chrome://tracing and ui.perfetto.dev show it", path);
done:
    free(own);
    return st;
}
