#include "bench/bench.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/cores.h"
#include "base/proc.h"
#include "bench/bench_impl.h"
#include "kernels/cpu/isa.h"
#include "store/io.h"
#include "store/provenance.h"

typedef qs_status (*benchmark)(qs_bench_job *job);

static const struct {
    const char *name;
    benchmark run;
    bool alone; /* of one rank */
} benchmarks[QS_BENCH_COUNT] = {
    [QS_BENCH_GATHER] = {"gather", qs_bench_collectives, false},
    [QS_BENCH_REDUCE] = {"reduce", qs_bench_collectives, false},
    [QS_BENCH_STEP] = {"step", qs_bench_step, false},
    [QS_BENCH_GEMM] = {"gemm", qs_bench_single, true},
    [QS_BENCH_DECODE] = {"decode", qs_bench_single, true},
    [QS_BENCH_ATTENTION] = {"attention", qs_bench_single, true},
    [QS_BENCH_HEAD] = {"head", qs_bench_single, true},
};

const char *qs_bench_name(qs_bench_kind kind)
{
    return benchmarks[kind].name;
}

qs_status qs_bench_find(const char *name, qs_bench_kind *out)
{
    char known[128] = "";
    for (int i = 0; i < QS_BENCH_COUNT; i++) {
        if (strcmp(benchmarks[i].name, name) == 0) {
            *out = (qs_bench_kind)i;
            return QS_OK;
        }
        strncat(known, i > 0 ? ", " : "", sizeof known - strlen(known) - 1);
        strncat(known, benchmarks[i].name, sizeof known - strlen(known) - 1);
    }
    return QS_FAIL(QS_ERR_USAGE, "bench: \"%.40s\" is not known; there are %s", name, known);
}

/* ---- what they share ---- */

qs_ops_limits qs_bench_least_limits(int threads)
{
    return (qs_ops_limits){.threads = threads,
                           .tokens = 1,
                           .documents = 1,
                           .loss_rows = 1,
                           .widest = 64,
                           .n_heads = 1,
                           .n_kv_heads = 1,
                           .head_dim = 64,
                           .hidden = 64,
                           .head_rows = 1};
}

qs_bench_times qs_bench_summary(double *values, int64_t count)
{
    qs_bench_sort(values, count);
    return (qs_bench_times){qs_bench_quantile(values, count, 0.5), values[0], values[count - 1]};
}

double qs_bench_share(double bound, double time)
{
    return bound <= time ? 100 * bound / time : NAN;
}

qs_status qs_bench_slowest(qs_comm *comm, double *values, int64_t count)
{
    for (int64_t i = 0; i < count; i++) {
        int64_t ns = llround(values[i] * 1e9);
        QS_TRY(qs_comm_max_i64(comm, &ns, 1));
        values[i] = (double)ns * 1e-9;
    }
    return QS_OK;
}

qs_status qs_bench_describe(qs_bench_job *job, const qs_device *device, const qs_ops *ops,
                            int threads, const char *comm_name)
{
    qs_comm *world = job->world;
    qs_bench_report *r = job->report;
    char model[256];
    int64_t nodes = qs_comm_host(world) == qs_comm_rank(world);
    QS_TRY(qs_comm_sum_i64(world, &nodes, 1));
    qs_proc_value("/proc/cpuinfo", "model name", model, sizeof model);
    qs_bench_report_text(r, "host", "cpu", model[0] != '\0' ? model : "unknown");
    qs_bench_report_text(r, "host", "isa", qs_isa_get()->name);
    qs_bench_report_number(r, "host", "cores", qs_cores_available());
    qs_bench_report_number(r, "host", "ranks", qs_comm_nranks(world));
    qs_bench_report_number(r, "host", "nodes", (double)nodes);
    qs_bench_report_number(r, "host", "threads", threads);
    qs_bench_report_text(r, "host", "backend", ops->name);
    qs_bench_report_text(r, "host", "comm", comm_name);
    if (!qs_device_is_host(device)) {
        qs_bench_report_text(r, "host", "device", qs_device_description(device));
    }
    return QS_OK;
}

/* ---- the whole ---- */

static qs_status check_alone(const qs_bench_options *options, const qs_comm *comm)
{
    const char *name = benchmarks[options->kind].name;
    if (benchmarks[options->kind].alone && qs_comm_nranks(comm) > 1) {
        return QS_FAIL(QS_ERR_USAGE,
                       "bench %s measures one rank, and there are %d: start it without mpirun",
                       name, qs_comm_nranks(comm));
    }
    return QS_OK;
}

static qs_status verdict(const qs_bench_job *job)
{
    return job->wrong == 0
               ? QS_OK
               : QS_FAIL(QS_ERR_NUMERIC,
                         "bench %s: %" PRId64 " elements are wrong; see the column #wrong, and try "
                         "QSHARD_CPU_ISA=portable, another number of ranks or another network",
                         benchmarks[job->options->kind].name, job->wrong);
}

/* Before anything is measured, since the load of the hosts is among it. */
static qs_status say_where(const qs_bench_job *job)
{
    const qs_bench_options *o = job->options;
    const qs_device_kind device = o->kind == QS_BENCH_STEP ? o->config.device : o->device;
    json_t *provenance = NULL;
    QS_TRY(qs_provenance_make(
        &provenance, device != QS_DEVICE_CPU ? qs_backend_cuda_description() : NULL, job->world));
    qs_bench_report_json(job->report, "provenance", provenance);
    return QS_OK;
}

qs_status qs_bench_run(const qs_bench_options *options, qs_comm *comm)
{
    qs_bench_job job = {.options = options, .world = comm};
    const bool speaks = qs_comm_rank(comm) == 0;
    qs_status st = QS_OK;
    QS_TRY(qs_comm_agree(comm, check_alone(options, comm)));
    QS_TRY(qs_comm_agree(comm, speaks && options->json != NULL
                                   ? qs_io_try_file(options->json, QS_BENCH_FORMAT)
                                   : QS_OK));
    QS_GOTO(qs_comm_agree(
        comm, qs_bench_report_open(&job.report, benchmarks[options->kind].name, speaks)));
    QS_GOTO(say_where(&job));
    st = benchmarks[options->kind].run(&job);
    if (st != QS_OK) {
        qs_bench_report_fail(job.report, st, options->json);
        goto done;
    }
    qs_bench_report_number(job.report, "result", "wrong", (double)job.wrong);
    QS_GOTO(qs_comm_agree(comm, qs_bench_report_write(job.report, options->json)));
    st = qs_comm_agree(comm, verdict(&job));
done:
    qs_bench_report_close(job.report);
    return st;
}
