/* qshard doctor: a line per thing that a run depends on, OK, WARN or FAIL, and what to do about it.
 * Nothing is changed; the write test removes its file again. */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "backend/backend.h"
#include "base/cores.h"
#include "base/proc.h"
#include "cli/cli_impl.h"
#include "kernels/cpu/isa.h"
#include "store/h5.h"
#include "store/io.h"
#include "train/products.h"
#include "train/room.h"

#define GIB (1024.0 * 1024.0 * 1024.0)

typedef enum { FINE, NOTE, BROKEN } verdict;

static int broken_count;

/* "OK    memory      24.0 GiB, 20.1 free" and, where there is one, the remedy below it. */
static void __attribute__((format(printf, 4, 5)))
line(verdict v, const char *what, const char *remedy, const char *format, ...)
{
    static const char *const words[] = {"OK", "WARN", "FAIL"};
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    printf("%-5s %-12s %s\n", words[v], what, text);
    if (v != FINE && remedy) {
        printf("%-18s -> %s\n", "", remedy);
    }
    broken_count += v == BROKEN;
}

/* ---- the machine ---- */

static void look_at_cpu(void)
{
    char model[256];
    qs_proc_value("/proc/cpuinfo", "model name", model, sizeof model);
    const char *isa = qs_isa_get()->name;
    bool slow = strcmp(isa, "portable") == 0;
    line(slow ? NOTE : FINE, "CPU", "a CPU with AVX2 or AVX-512 is several times faster",
         "%s; kernels: %s, cpu.gemm: auto is %s", model[0] ? model : "unknown", isa,
         qs_products_name(qs_products_here()));
    int cores = qs_cores_available();
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    line(FINE, "cores", NULL, "%d for this process%s, %ld hardware threads in the machine", cores,
         qs_cores_bound() ? " (bound)" : "", online);
    const char *omp = getenv("OMP_NUM_THREADS");
    if (omp && atoi(omp) > cores) {
        line(NOTE, "threads", "unset it: a rank takes the cores that it was given",
             "OMP_NUM_THREADS=%s is more than the %d cores", omp, cores);
    }
}

static void look_at_memory(void)
{
    char total[64], available[64];
    qs_proc_value("/proc/meminfo", "MemTotal", total, sizeof total);
    qs_proc_value("/proc/meminfo", "MemAvailable", available, sizeof available);
    double free_gib = strtod(available, NULL) * 1024 / GIB;
    line(free_gib < 1 ? NOTE : FINE, "memory", "qshard train --dry-run prints what a rank needs",
         "%.1f GiB, %.1f free", strtod(total, NULL) * 1024 / GIB, free_gib);
}

/* What a rank may have of it: what plans and runs on the CPU go by. */
static void look_at_share(const qs_comm *comm)
{
    const int ranks = qs_comm_local_nranks(comm);
    const qs_room room = qs_room_assume(qs_threads_for_rank(ranks, 0, 0), ranks);
    char what[QS_ROOM_TEXT_MAX];
    qs_room_describe(&room, what, sizeof what);
    const char *remedy = qs_limit_remedy(&room.limit);
    line(FINE, "for a rank", NULL, "%.2f GiB of %s%s%s", (double)room.bytes / GIB, what,
         remedy[0] != '\0' ? ": " : "", remedy);
}

static void look_at_limits(void)
{
    struct rlimit files = {0, 0}, core = {0, 0}, locked = {0, 0};
    getrlimit(RLIMIT_NOFILE, &files);
    getrlimit(RLIMIT_CORE, &core);
    getrlimit(RLIMIT_MEMLOCK, &locked);
    line(files.rlim_cur < 1024 ? NOTE : FINE, "open files", "ulimit -n 4096", "%" PRIu64,
         (uint64_t)files.rlim_cur);
    line(FINE, "core dumps", NULL, "%s", core.rlim_cur ? "on" : "off");
    if (locked.rlim_cur == RLIM_INFINITY) {
        line(FINE, "memlock", NULL, "unlimited");
    } else {
        /* Registered memory of fast networks comes out of this limit. */
        line(locked.rlim_cur < (64 << 20) ? NOTE : FINE, "memlock",
             "ulimit -l unlimited, if ranks talk over InfiniBand or the like", "%" PRIu64 " KiB",
             (uint64_t)locked.rlim_cur / 1024);
    }
}

/* NCCL's ranks of one host talk through it where their GPUs have no direct way. */
static void look_at_shared_memory(void)
{
    static const char dir[] = "/dev/shm";
    uint64_t bytes = 0;
    if (qs_io_free_bytes(dir, &bytes) != QS_OK) {
        line(NOTE, "shared mem", "several GPUs need it", "%s", qs_error_text());
        qs_error_clear();
        return;
    }
    line((double)bytes < GIB ? NOTE : FINE, "shared mem",
         "a container needs more for several GPUs: docker run --shm-size=1g --ulimit memlock=-1",
         "%s: %.2f GiB free", dir, (double)bytes / GIB);
}

/* Without a GPU nothing is wrong, unless the machine has one. */
static void look_at_gpus(void)
{
    const char *why = qs_backend_cuda_missing();
    const char *plugin = qs_backend_cuda_description();
    if (*plugin) {
        line(FINE, "GPU plugin", NULL, "%s", plugin);
    }
    if (why) {
        bool wanted = access("/dev/nvidia0", F_OK) == 0;
        line(wanted ? NOTE : FINE, "GPU", "runs compute on the CPU until then", "none is used: %s",
             why);
        return;
    }
    for (int i = 0; i < qs_backend_cuda_devices(); i++) {
        qs_backend backend;
        size_t free_bytes = 0, total_bytes = 0;
        if (qs_backend_open_gpu(&backend, i) != QS_OK) {
            line(BROKEN, "GPU", "nvidia-smi shows what it does", "%d: %s", i, qs_error_text());
            qs_error_clear();
            continue;
        }
        qs_device_memory(backend.device, &free_bytes, &total_bytes);
        line(FINE, "GPU", NULL, "%d: %s; %.1f GiB free", i, qs_device_description(backend.device),
             (double)free_bytes / GIB);
        qs_backend_close(&backend);
    }
    look_at_shared_memory();
}

/* ---- libraries and launcher ---- */

/* MPI ends the process where it cannot start, so a child tries. */
static void try_mpi(void)
{
    char name[128];
    qs_comm_mpi_version(name, sizeof name);
    fflush(NULL);
    pid_t child = fork();
    if (child == 0) {
        qs_comm *comm = NULL;
        qs_status st = qs_comm_mpi_create(&comm, NULL, NULL);
        st = st == QS_OK ? qs_comm_barrier(comm) : st;
        qs_comm_destroy(comm);
        _exit(st == QS_OK ? 0 : 1);
    }
    int status = 0;
    bool good = child > 0 && waitpid(child, &status, 0) == child && WIFEXITED(status) &&
                WEXITSTATUS(status) == 0;
    line(good ? FINE : BROKEN, "MPI", "start with the mpirun of this library, or load its module",
         "%s; %s", name, good ? "starts, thread level FUNNELED or better" : "cannot be started");
}

static void look_at_mpi(const qs_comm *comm)
{
    char name[128];
    if (!qs_comm_launched()) {
        try_mpi();
        return;
    }
    qs_comm_mpi_version(name, sizeof name);
    line(FINE, "MPI", NULL,
         "%s; running on %d ranks, %d on this host, thread level FUNNELED or "
         "better",
         name, qs_comm_nranks(comm), qs_comm_local_nranks(comm));
}

static void look_at_hdf5(void)
{
    char version[64];
    qs_h5_version(version, sizeof version);
    int major = 0, minor = 0, release = 0;
    (void)sscanf(version, "%d.%d.%d", &major, &minor, &release);
    bool recent = major > 1 || (major == 1 && (minor > 14 || (minor == 14 && release >= 6)));
    line(recent ? FINE : NOTE, "HDF5",
         "1.14.6 or later has fixes for damaged files; until then open only files that you or "
         "people you trust have made",
         "%s", version);
}

static void look_at_launcher(void)
{
    static const char *const names[] = {
        "SLURM_JOB_ID",        "SLURM_NNODES",         "SLURM_NTASKS", "SLURM_CPUS_PER_TASK",
        "SLURM_RESTART_COUNT", "OMPI_COMM_WORLD_SIZE", "PMIX_RANK",    "OMP_NUM_THREADS",
        "OPENBLAS_CORETYPE",   "HDF5_USE_FILE_LOCKING"};
    const char *launcher = getenv("OMPI_COMM_WORLD_SIZE") && !getenv("SLURM_STEP_ID") ? "mpirun"
                           : getenv("SLURM_STEP_ID")                                  ? "srun"
                           : getenv("SLURM_JOB_ID") ? "a batch job, but no launcher"
                                                    : "none (one process)";
    line(FINE, "launcher", NULL, "%s", launcher);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (getenv(names[i])) {
            line(FINE, "environment", NULL, "%s=%s", names[i], getenv(names[i]));
        }
    }
}

/* ---- disks ---- */

static void look_at_room(const char *what, const char *dir)
{
    uint64_t bytes = 0;
    if (qs_io_free_bytes(dir, &bytes) != QS_OK) {
        line(BROKEN, what, "make it, or choose another directory", "%s", qs_error_text());
        qs_error_clear();
        return;
    }
    line((double)bytes < GIB ? NOTE : FINE, what, "make room, or write elsewhere",
         "%s: %.1f GiB free", dir, (double)bytes / GIB);
}

/* Everything that a checkpoint does to a directory, with a few bytes. */
static qs_status try_to_write(const char *folder)
{
    static const char text[] = "qshard doctor";
    char first[256], second[256];
    void *back = NULL;
    size_t bytes = 0;
    snprintf(first, sizeof first, "%s/a", folder);
    snprintf(second, sizeof second, "%s/b", folder);
    QS_TRY(qs_io_mkdir(folder));
    QS_TRY(qs_io_write_new(first, text, sizeof text));
    QS_TRY(qs_io_rename(first, second));
    QS_TRY(qs_io_fsync_dir(folder));
    QS_TRY(qs_io_read_file(second, 1024, &back, &bytes));
    bool same = bytes == sizeof text && memcmp(back, text, bytes) == 0;
    free(back);
    return same ? QS_OK
                : QS_FAIL(QS_ERR_IO_VERIFY, "%s: reads back differently from what was written",
                          second);
}

static void look_at_writing(void)
{
    char folder[128];
    snprintf(folder, sizeof folder, ".qshard-doctor-%ld", (long)getpid());
    qs_status st = try_to_write(folder);
    if (st == QS_OK) {
        line(FINE, "writing", NULL, "write, sync, rename and read back work here");
    } else {
        line(BROKEN, "writing", "run where you may write", "%s", qs_error_text());
    }
    (void)qs_io_remove_dir(folder);
    qs_error_clear();
}

qs_status qs_cli_doctor(const qs_cli_args *args, qs_comm *comm)
{
    (void)args;
    const char *temp = getenv("TMPDIR");
    broken_count = 0;
    look_at_cpu();
    look_at_memory();
    look_at_share(comm);
    look_at_limits();
    look_at_mpi(comm); /* before the GPUs: their driver's threads and contexts survive no fork */
    look_at_gpus();
    look_at_hdf5();
    look_at_launcher();
    look_at_room("temp", temp && *temp ? temp : "/tmp");
    look_at_room("output", ".");
    look_at_writing();
    return broken_count == 0
               ? QS_OK
               : QS_FAIL(QS_ERR_ENVIRONMENT,
                         "doctor: %d things will not work; see the FAIL lines above", broken_count);
}
