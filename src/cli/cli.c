/* From argv to an exit code: choose the communicator, find the command, run it, let one rank say
 * what went wrong, and leave with the same code everywhere. */
#define _GNU_SOURCE /* O_DIRECTORY */
#include "cli/cli.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "backend/plugin.h"
#include "base/log.h"
#include "cli/cli_impl.h"
#include "config/nearest.h"
#include "kernels/cpu/isa.h"
#include "qshard_version.h"
#include "store/h5.h"
#include "train/train.h"

const qs_cli_command qs_cli_commands[] = {
    {"quantize", "HF_DIR -o BASE.h5",
     "Quantize a Hugging Face checkpoint to an NF4 base, or take over a bitsandbytes one.",
     qs_cli_quantize_options, 1, false, qs_cli_quantize, true},
    {"train", "RUN.yaml", "Fine-tune with LoRA on the ranks of this job.", qs_cli_train_options, 1,
     true, qs_cli_train, true},
    {"eval", "RUN.yaml", "Loss and perplexity on data.eval.", qs_cli_eval_options, 1, false,
     qs_cli_eval, true},
    {"sample", "RUN.yaml --prompts FILE --tokens N", "Greedy continuations of prompts.",
     qs_cli_sample_options, 1, false, qs_cli_sample, true},
    {"export", "CKPT_OR_RUN -o DIR", "Write a checkpoint as a PEFT adapter directory.",
     qs_cli_export_options, 1, false, qs_cli_export, false},
    {"merge", "CKPT_OR_RUN_OR_PEFT_DIR -o HF_DIR",
     "Write adapter and base together as a Hugging Face checkpoint.", qs_cli_merge_options, 1,
     false, qs_cli_merge, false},
    {"plan", "RUN.yaml", "Forecast memory and step time of a run on GPUs that need not be here.",
     qs_cli_plan_options, 1, false, qs_cli_plan, false},
    {"bench", "NAME [RUN.yaml]",
     "Measure gather, reduce, step, gemm, decode, attention or head beside their bounds.",
     qs_cli_bench_options, -2, false, qs_cli_bench, true},
    {"inspect", "PATH", "Show what a file or directory holds.", qs_cli_plain_options, 1, false,
     qs_cli_inspect, false},
    {"check", "PATH", "Verify a file or directory against its hashes and rules.",
     qs_cli_plain_options, 1, false, qs_cli_check, false},
    {"doctor", "", "Look at the environment and say what would go wrong.", qs_cli_plain_options, 0,
     false, qs_cli_doctor, false},
};
enum { COMMAND_COUNT = sizeof qs_cli_commands / sizeof *qs_cli_commands };
const int qs_cli_commands_count = COMMAND_COUNT;

const qs_cli_exit_code qs_cli_exit_codes[] = {
    {0, "done"},
    {2, "usage or configuration"},
    {3, "bad input file"},
    {4, "output or checkpoint"},
    {5, "numeric"},
    {6, "peer lost or stalled"},
    {7, "memory"},
    {8, "ranks disagree or environment"},
    {9, "device"},
    {70, "bug"},
    {75, "saved: please start again"},
};
const int qs_cli_exit_codes_count = (int)(sizeof qs_cli_exit_codes / sizeof *qs_cli_exit_codes);

static void print_help(void)
{
    printf("Usage: qshard COMMAND [OPTION...]\n\n"
           "QLoRA fine-tuning, sharded over MPI ranks. Token files to train on are made by\n"
           "qshard-prep (qshard-prep --help). Commands:\n\n");
    for (int i = 0; i < COMMAND_COUNT; i++) {
        printf("  %-9s %s\n", qs_cli_commands[i].name, qs_cli_commands[i].summary);
    }
    printf("\n  qshard COMMAND --help   options of a command; or qshard help COMMAND\n"
           "  qshard --version        version and build\n\nExit codes:\n\n");
    for (int i = 0; i < qs_cli_exit_codes_count; i++) {
        printf("  %-9d %s\n", qs_cli_exit_codes[i].code, qs_cli_exit_codes[i].meaning);
    }
}

static void print_version(void)
{
    char mpi[128], hdf5[64], why[512];
    const qs_plugin *plugin = qs_plugin_find(why, sizeof why, NULL, 0); /* no driver is asked */
    qs_comm_mpi_version(mpi, sizeof mpi);
    qs_h5_version(hdf5, sizeof hdf5);
    printf("qshard %s (%s)\n", QSHARD_VERSION, QSHARD_COMMIT);
    printf("  compiler  %s, %s, %s\n", QSHARD_COMPILER,
           QSHARD_BUILD_TYPE[0] ? QSHARD_BUILD_TYPE : "no build type",
           QSHARD_BUILD_FLAGS[0] ? QSHARD_BUILD_FLAGS : "no flags");
    printf("  MPI       %s\n", mpi);
    printf("  HDF5      %s\n", hdf5);
    printf("  CPU       %s kernels\n", qs_isa_get()->name);
    printf("  GPU       %s\n", plugin != NULL ? plugin->description() : "no plugin");
}

static qs_status unknown_command(const char *name)
{
    const char *names[COMMAND_COUNT];
    for (int i = 0; i < COMMAND_COUNT; i++) {
        names[i] = qs_cli_commands[i].name;
    }
    const char *near = qs_nearest(name, names, COMMAND_COUNT);
    return near != NULL
               ? QS_FAIL(QS_ERR_USAGE, "unknown command \"%.64s\"; did you mean \"%s\"?", name,
                         near)
               : QS_FAIL(QS_ERR_USAGE, "unknown command \"%.64s\"; see qshard --help", name);
}

static const qs_cli_command *find_command(const char *name)
{
    for (int i = 0; i < COMMAND_COUNT; i++) {
        if (strcmp(name, qs_cli_commands[i].name) == 0) {
            return &qs_cli_commands[i];
        }
    }
    return NULL;
}

/* What the first word asks for. */
typedef struct {
    const qs_cli_command *command; /* NULL: `print` */
    void (*print)(void);
    qs_cli_args args;
} request;

static qs_status understand(request *r, int argc, char **argv)
{
    const char *first = argc > 1 ? argv[1] : "";
    memset(r, 0, sizeof *r);
    if (!*first) {
        return QS_FAIL(QS_ERR_USAGE, "no command is given; see qshard --help");
    }
    if (strcmp(first, "help") == 0 && argc > 2 && argv[2][0] != '-') {
        r->command = find_command(argv[2]);
        r->args.help = true;
        return r->command != NULL ? QS_OK : unknown_command(argv[2]);
    }
    if (strcmp(first, "--help") == 0 || strcmp(first, "-h") == 0 || strcmp(first, "help") == 0) {
        r->print = print_help;
        return QS_OK;
    }
    if (strcmp(first, "--version") == 0) {
        r->print = print_version;
        return QS_OK;
    }
    r->command = find_command(first);
    if (r->command != NULL) {
        return qs_cli_parse(r->command, argc - 1, argv + 1, &r->args);
    }
    return first[0] == '-'
               ? QS_FAIL(QS_ERR_USAGE, "unknown option %.64s; did you mean --help or --version?",
                         first)
               : unknown_command(first);
}

static void start_log(const request *r, const qs_comm *comm)
{
    qs_log_level level = r->args.verbose ? QS_LOG_DEBUG : r->args.quiet ? QS_LOG_WARN : QS_LOG_INFO;
    qs_log_init(qs_comm_rank(comm), qs_comm_nranks(comm), level, r->args.verbose);
}

static qs_status perform(const request *r, qs_comm *comm)
{
    bool first = qs_comm_rank(comm) == 0;
    if (!r->command || r->args.help) {
        if (first && r->command) {
            qs_cli_command_help(r->command);
        } else if (first) {
            r->print();
        }
        return QS_OK;
    }
    if (r->command->collective) {
        return r->command->run(&r->args, comm);
    }
    return qs_comm_agree(comm, first ? r->command->run(&r->args, comm) : QS_OK);
}

/* Results go to stdout; a full disk or a closed pipe must not look like success. */
static qs_status flush_output(void)
{
    return fflush(stdout) == 0 && !ferror(stdout)
               ? QS_OK
               : QS_FAIL(QS_ERR_IO, "standard output: could not be written completely");
}

/* A descriptor of 0, 1 and 2 that is closed would be the next file's that is opened: lines for the
 * terminal would be written into a checkpoint. What stands in its place fails like a closed one. */
static void fill_descriptors(void)
{
    int fd = 0;
    do {
        fd = open("/", O_RDONLY | O_DIRECTORY); /* the lowest that is free */
    } while (fd >= 0 && fd <= STDERR_FILENO);
    if (fd >= 0) {
        (void)close(fd);
    }
}

/* Signals that would end the process before it can say or save anything: a file above the limit of
 * `ulimit -f` is an error of the write, and a stop signal while MPI starts is one for the run. */
static void prepare_signals(int argc, char **argv)
{
    signal(SIGXFSZ, SIG_IGN);
    if (argc > 1 && strcmp(argv[1], "train") == 0) {
        qs_signals_install();
    }
}

int qs_cli_main(int argc, char **argv)
{
    qs_comm *comm = NULL;
    request r;
    fill_descriptors();
    prepare_signals(argc, argv);
    qs_status st =
        qs_comm_launched() ? qs_comm_mpi_create(&comm, &argc, &argv) : qs_comm_self_create(&comm);
    if (st != QS_OK) {
        qs_error_print(st);
        return qs_exit_code(st);
    }
    st = qs_comm_agree(comm, understand(&r, argc, argv));
    if (st == QS_OK) {
        start_log(&r, comm);
        st = perform(&r, comm);
        st = st == QS_OK ? qs_comm_agree(comm, flush_output()) : st;
    }
    qs_comm_end_unagreed(comm, st);
    qs_error_print(st);
    qs_comm_destroy(comm);
    return qs_exit_code(st);
}
