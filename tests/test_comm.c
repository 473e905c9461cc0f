/* The communicators: every check with threads as ranks, then under mpirun, and what happens when a
 * rank fails. */
#include <criterion/criterion.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cases/comm_checks.h"
#include "comm/comm_impl.h"
#include "mpirun.h"

static const int team_sizes[] = {1, 2, 3, 4, 8};

static const char *host_name(void)
{
    static char name[64];
    (void)gethostname(name, sizeof name - 1);
    return name;
}

/* What case_comm's rank says that cannot read its input; rank 0 does not name itself. */
static const char *line_of(int rank)
{
    static char line[256];
    const char *const text = "error[E300] model.safetensors: no such file";
    if (rank == 0) {
        snprintf(line, sizeof line, "%s\n", text);
    } else {
        snprintf(line, sizeof line, "%s (rank %d on %s)\n", text, rank, host_name());
    }
    return line;
}

/* ---- where ranks are ---- */

/* A letter a rank: its host. Any rank of these would say the same. */
Test(comm, neighbours_on_equal_hosts_are_told_from_ranks_in_turns)
{
    static const struct {
        const char *hosts;
        int per_host;
        bool in_turns;
    } cases[] = {{"a", 0, false},     {"aaaa", 0, false},    {"ab", 0, false},
                 {"aabb", 2, false},  {"abab", 0, true},     {"abba", 0, true},
                 {"aab", 0, false},   {"aabbb", 0, false},   {"ababb", 0, false},
                 {"abcabc", 0, true}, {"aabbcc", 2, false},  {"aaabbb", 3, false},
                 {"aabcbc", 0, true}, {"aabbccc", 0, false}, {"aabccc", 0, false}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        int hosts[8];
        qs_comm comm = {.nranks = (int)strlen(cases[i].hosts), .hosts = hosts};
        for (int r = 0; r < comm.nranks; r++) {
            hosts[r] = (int)(strchr(cases[i].hosts, cases[i].hosts[r]) - cases[i].hosts);
            comm.local_nranks += hosts[r] == 0; /* as rank 0 has it */
        }
        cr_expect_eq(qs_comm_per_host(&comm), cases[i].per_host, "%s", cases[i].hosts);
        cr_expect_eq(qs_comm_in_turns(&comm), cases[i].in_turns, "%s", cases[i].hosts);
    }
}

/* ---- threads as ranks ---- */

typedef struct {
    qs_comm *comm;
    comm_check check;
    const char *wrong; /* text of the check, copied: it belongs to the thread */
    char text[1024];
} member;

static void *run_member(void *arg)
{
    member *m = arg;
    const char *wrong = m->check(m->comm);
    if (wrong != NULL) {
        snprintf(m->text, sizeof m->text, "%s", wrong);
        m->wrong = m->text;
        (void)QS_FAIL(QS_ERR_BUG, "check failed");
        qs_comm_abort(m->comm, QS_ERR_BUG); /* the others need not wait for us */
    }
    qs_comm_destroy(m->comm);
    return NULL;
}

static void run_team(int nranks, comm_check check, member *members)
{
    qs_comm *comms[8];
    pthread_t threads[8];
    cr_assert_eq(qs_comm_threads_create(comms, nranks), QS_OK);
    for (int r = 0; r < nranks; r++) {
        members[r] = (member){.comm = comms[r], .check = check};
        cr_assert_eq(pthread_create(&threads[r], NULL, run_member, &members[r]), 0);
    }
    for (int r = 0; r < nranks; r++) {
        pthread_join(threads[r], NULL);
    }
}

static void threads_pass(const char *name)
{
    comm_check check = comm_check_find(name);
    cr_assert_not_null(check, "no check is called %s", name);
    for (size_t i = 0; i < sizeof team_sizes / sizeof *team_sizes; i++) {
        member members[8];
        run_team(team_sizes[i], check, members);
        for (int r = 0; r < team_sizes[i]; r++) {
            cr_assert_null(members[r].wrong, "%s, rank %d of %d: %s", name, r, team_sizes[i],
                           members[r].wrong);
        }
    }
    qs_comm *self;
    cr_assert_eq(qs_comm_self_create(&self), QS_OK);
    const char *wrong = check(self);
    cr_assert_null(wrong, "%s, self: %s", name, wrong);
    qs_comm_destroy(self);
}

#define THREADS(check)                                                                             \
    Test(comm_threads, check, .timeout = 120)                                                      \
    {                                                                                              \
        threads_pass(#check);                                                                      \
    }

THREADS(all_gather)
THREADS(several_under_way)
THREADS(interleaved_queues)
THREADS(progress_by_idle)
THREADS(all_to_all_v)
THREADS(all_to_all_v_own_piece_in_place)
THREADS(bcast)
THREADS(max_and_sum)
THREADS(all_gather_now)
THREADS(barrier)
THREADS(bcast_text)
THREADS(agree)
THREADS(received_bytes)
THREADS(places)
THREADS(split)

/* Nothing moves by itself: an all-gather is under way, not done, until this rank polls. */
static const char *needs_a_poll(qs_comm *comm)
{
    int mine = 40 + qs_comm_rank(comm), all[8] = {0}, peer = 1 - qs_comm_rank(comm);
    qs_queue *queue;
    if (qs_queue_create(&queue, 1) != QS_OK) {
        return "no queue";
    }
    qs_status st = qs_comm_all_gather(comm, &mine, all, sizeof mine, queue);
    const char *wrong = st == QS_OK && all[peer] == 0 ? NULL : "it was there at once";
    st = qs_queue_wait(queue);
    if (wrong == NULL && (st != QS_OK || all[peer] != 40 + peer)) {
        wrong = "it never came";
    }
    qs_queue_destroy(queue);
    return wrong;
}

Test(comm_threads, transfers_need_polling_as_with_mpi, .timeout = 30)
{
    member members[8];
    run_team(2, needs_a_poll, members);
    cr_assert_null(members[0].wrong, "%s", members[0].wrong);
    cr_assert_null(members[1].wrong, "%s", members[1].wrong);
}

/* Rank 1 leaves without joining; the others are told instead of waiting for ever. */
static const char *rank_1_leaves(qs_comm *comm)
{
    if (qs_comm_rank(comm) == 1) {
        return NULL;
    }
    qs_status st = qs_comm_barrier(comm);
    return st == QS_ERR_PEER ? NULL : "the barrier did not notice";
}

static const char *rank_1_aborts(qs_comm *comm)
{
    int mine = 0, all[8];
    if (qs_comm_rank(comm) == 1) {
        qs_error_adopt(QS_ERR_IO, "quiet", true);
        qs_comm_abort(comm, QS_ERR_IO);
        return NULL;
    }
    qs_queue *queue;
    if (qs_queue_create(&queue, 1) != QS_OK) {
        return "no queue";
    }
    qs_status st = qs_comm_all_gather(comm, &mine, all, sizeof mine, queue);
    st = st == QS_OK ? qs_queue_wait(queue) : st;
    qs_queue_destroy(queue);
    return st == QS_ERR_PEER ? NULL : "the wait did not notice";
}

static const char *rank_1_sends_less(qs_comm *comm)
{
    char data[8 * 8] = {0};
    qs_status st = qs_comm_bcast(comm, data, qs_comm_rank(comm) == 1 ? 3 : 8, 1);
    return st != QS_OK || qs_comm_rank(comm) == 1 ? NULL : "sizes differ unnoticed";
}

Test(comm_threads, a_rank_that_leaves_aborts_or_disagrees_is_noticed, .timeout = 60)
{
    static const comm_check checks[] = {rank_1_leaves, rank_1_aborts, rank_1_sends_less};
    for (size_t c = 0; c < 3; c++) {
        for (int nranks = 2; nranks <= 8; nranks += 3) {
            member members[8];
            run_team(nranks, checks[c], members);
            for (int r = 0; r < nranks; r++) {
                cr_assert_null(members[r].wrong, "%zu, rank %d of %d: %s", c, r, nranks,
                               members[r].wrong);
            }
        }
    }
}

/* A queue that is destroyed with a transfer under way must not leave the others reading freed
 * memory. */
static const char *rank_1_drops_its_queue(qs_comm *comm)
{
    enum { BYTES = 100000 };
    char *mine = calloc(BYTES, 1), *all = calloc(8, BYTES);
    qs_queue *queue;
    if (qs_queue_create(&queue, 1) != QS_OK) {
        return "no queue";
    }
    qs_status st = qs_comm_all_gather(comm, mine, all, BYTES, queue);
    if (qs_comm_rank(comm) != 1 && st == QS_OK) {
        st = qs_queue_wait(queue);
    }
    qs_queue_destroy(queue);
    free(mine);
    free(all);
    return qs_comm_rank(comm) == 1 || st == QS_ERR_PEER ? NULL : "the wait did not notice";
}

Test(comm_threads, a_dropped_transfer_is_noticed, .timeout = 30)
{
    member members[8];
    run_team(3, rank_1_drops_its_queue, members);
    for (int r = 0; r < 3; r++) {
        cr_assert_null(members[r].wrong, "rank %d: %s", r, members[r].wrong);
    }
}

static const char *rank_2_fails_and_all_print(qs_comm *comm)
{
    qs_status mine = QS_OK;
    if (qs_comm_rank(comm) >= 2) {
        mine = QS_FAIL(QS_ERR_INPUT_TENSOR, "shard %d: missing", qs_comm_rank(comm));
    }
    qs_status agreed = qs_comm_agree(comm, mine);
    qs_error_print(agreed);
    return agreed == QS_ERR_INPUT_TENSOR ? NULL : "another status";
}

Test(comm_threads, all_leave_with_one_status_and_one_line, .timeout = 30)
{
    int ends[2];
    cr_assert_eq(pipe(ends), 0);
    pid_t child = fork();
    if (child == 0) {
        dup2(ends[1], STDERR_FILENO);
        member members[8];
        run_team(4, rank_2_fails_and_all_print, members);
        int bad = 0;
        for (int r = 0; r < 4; r++) {
            bad += members[r].wrong != NULL;
        }
        _exit(bad);
    }
    close(ends[1]);
    char text[4096] = "";
    size_t end = 0;
    for (ssize_t got; (got = read(ends[0], text + end, sizeof text - 1 - end)) > 0;) {
        end += (size_t)got;
    }
    int status;
    waitpid(child, &status, 0);
    cr_assert_eq(status, 0);
    char line[256];
    snprintf(line, sizeof line, "error[E305] shard 2: missing (rank 2 on %s)\n", host_name());
    cr_assert_str_eq(text, line);
}

/* ---- under mpirun ---- */

Test(comm_mpi, every_check_passes_on_1_to_4_ranks, .timeout = 300)
{
    int checks = 0;
    while (comm_checks[checks].name != NULL) {
        checks++;
    }
    for (int nranks = 1; nranks <= 4; nranks++) {
        mpirun_result run;
        shell(&run, 60, "mpirun -np %d %s all", nranks, case_path("comm"));
        cr_assert_eq(run.code, 0, "np %d: exit %d\n%s", nranks, run.code, run.output);
        cr_assert_eq(count_in(&run, "passed "), nranks * checks, "np %d:\n%s", nranks, run.output);
        char who[64];
        snprintf(who, sizeof who, "comm mpi of %d", nranks);
        cr_assert_eq(count_in(&run, who), 1, "%s", run.output);
    }
}

Test(comm_mpi, checks_pass_over_tcp, .timeout = 120)
{
    mpirun_result run;
    shell(&run, 60, "mpirun --mca btl tcp,self --mca btl_tcp_if_include lo -np 3 %s all",
          case_path("comm"));
    cr_assert_eq(run.code, 0, "exit %d\n%s", run.code, run.output);
}

Test(comm_mpi, without_a_launcher_it_runs_as_self_or_singleton, .timeout = 120)
{
    mpirun_result run;
    shell(&run, 60, "%s all", case_path("comm"));
    cr_assert_eq(run.code, 0, "%s", run.output);
    cr_assert_eq(count_in(&run, "comm self of 1"), 1, "%s", run.output);
    shell(&run, 60, "%s all singleton", case_path("comm"));
    cr_assert_eq(run.code, 0, "%s", run.output);
    cr_assert_eq(count_in(&run, "comm mpi of 1"), 1, "%s", run.output);
}

Test(comm_mpi, one_failing_rank_ends_all_with_its_code_and_one_line, .timeout = 200)
{
    for (int nranks = 1; nranks <= 4; nranks++) {
        mpirun_result run;
        shell(&run, 60, "mpirun -np %d %s last_rank_fails", nranks, case_path("comm"));
        cr_assert_eq(run.code, 3, "np %d: exit %d\n%s", nranks, run.code, run.output);
        cr_assert_eq(count_in(&run, "error["), 1, "%s", run.output);
        cr_assert_eq(count_in(&run, line_of(nranks - 1)), 1, "%s", run.output);
        cr_assert_eq(count_in(&run, "rank leaves: 300 told"), nranks, "%s", run.output);
    }
}

/* The lower of two ranks that fail is still on its way when the other's grace is over: one line all
 * the same, and its code. */
Test(comm_mpi, a_rank_that_has_failed_does_not_wait_in_silence_for_one_that_is_late, .timeout = 120)
{
    for (int nranks = 2; nranks <= 3; nranks++) {
        mpirun_result run;
        shell(&run, 60, "mpirun -np %d %s late", nranks, case_path("comm"));
        cr_assert_eq(run.code, 3, "np %d: exit %d\n%s", nranks, run.code, run.output);
        cr_assert_eq(count_in(&run, "error["), 1, "%s", run.output);
        cr_assert_eq(count_in(&run, line_of(nranks - 1)), 1, "%s", run.output);
        cr_assert_eq(count_in(&run, "rank leaves: 300 told"), 2, "%s", run.output);
    }
}

Test(comm_mpi, a_rank_that_has_failed_says_so_where_another_ends_the_job, .timeout = 120)
{
    static const char *const ways[] = {"never_comes", "never_comes_before_the_grace",
                                       "never_comes_with_a_handler"};
    for (size_t i = 0; i < sizeof ways / sizeof *ways; i++) {
        mpirun_result run;
        shell(&run, 60, "mpirun -np 2 %s %s", case_path("comm"), ways[i]);
        cr_assert_eq(run.code, 137, "%s: exit %d\n%s", ways[i], run.code, run.output);
        cr_assert_eq(count_in(&run, line_of(1)), 1, "%s:\n%s", ways[i], run.output);
        cr_assert_eq(count_in(&run, "error["), 1, "%s:\n%s", ways[i], run.output);
        cr_assert_eq(count_in(&run, "caught\n"), i == 2, "%s:\n%s", ways[i], run.output);
    }
}

Test(comm_mpi, who_knows_the_cause_speaks_before_those_who_see_what_came_of_it, .timeout = 120)
{
    static const char *const ways[] = {"one_knows_why", "one_knows_why_and_all_agree"};
    for (size_t i = 0; i < sizeof ways / sizeof *ways; i++) {
        mpirun_result run;
        char line[256];
        shell(&run, 60, "mpirun -np 3 %s %s", case_path("comm"), ways[i]);
        snprintf(line, sizeof line, "error[E900] the card fell off (rank 2 on %s)\n", host_name());
        cr_assert_eq(run.code, 9, "%s: exit %d\n%s", ways[i], run.code, run.output);
        cr_assert_eq(count_in(&run, line), 1, "%s:\n%s", ways[i], run.output);
        cr_assert_eq(count_in(&run, "error["), 1, "%s:\n%s", ways[i], run.output);
    }
}

Test(comm_mpi, abort_ends_waiting_ranks_with_the_code, .timeout = 120)
{
    mpirun_result run;
    shell(&run, 60, "mpirun -np 3 %s rank_0_aborts", case_path("comm"));
    cr_assert_eq(run.code, 4, "exit %d\n%s", run.code, run.output);
    char line[256];
    snprintf(line, sizeof line, "error[E401] out/base.h5: no space left (rank 0 on %s)\n",
             host_name());
    cr_assert_eq(count_in(&run, line), 1, "%s", run.output);
    cr_assert_eq(count_in(&run, "error["), 1, "%s", run.output);
}

Test(comm_mpi, a_killed_rank_ends_the_job, .timeout = 120)
{
    mpirun_result run;
    shell(&run, 60, "mpirun -np 3 %s last_rank_is_killed", case_path("comm"));
    cr_assert_eq(run.code, 137, "exit %d\n%s", run.code, run.output);
    cr_assert_not_null(strstr(run.output, "signal 9"), "ended by the timeout?\n%s", run.output);
}

Test(comm_mpi, messages_of_the_wrong_length_are_errors, .timeout = 120)
{
    mpirun_result run;
    shell(&run, 60, "mpirun -np 2 %s too_long", case_path("comm"));
    cr_assert_eq(run.code, 6, "exit %d\n%s", run.code, run.output);
    cr_assert_eq(count_in(&run, "error[E600] MPI_Irecv: "), 1, "%s", run.output);
    shell(&run, 60, "mpirun -np 2 %s too_short", case_path("comm"));
    cr_assert_eq(run.code, 70, "exit %d\n%s", run.code, run.output);
    cr_assert_eq(count_in(&run, "rank 0 expects 12 bytes of rank 1, which sent 8"), 1, "%s",
                 run.output);
}

Test(comm_mpi, messages_past_1_gib_are_cut_in_pieces, .timeout = 300)
{
    if (getenv("QSHARD_TEST_LARGE") == NULL) {
        cr_skip_test("needs 5 GiB: set QSHARD_TEST_LARGE=1");
    }
    mpirun_result run;
    shell(&run, 200, "mpirun -np 2 %s huge", case_path("comm"));
    cr_assert_eq(run.code, 0, "exit %d\n%s", run.code, run.output);
}

/* Ranks started inside a binding that is not theirs alone share its cores. */
Test(comm_mpi, threads_of_ranks_that_share_a_binding_sum_to_its_cores, .timeout = 60)
{
    mpirun_result run;
    unsetenv("OMP_NUM_THREADS");
    shell(&run, 60, "mpirun -np 2 %s threads", case_path("comm"));
    cr_assert_eq(run.code, 0, "%s", run.output);
    shell(&run, 60, "taskset -c 0 mpirun -np 2 %s threads", case_path("comm"));
    cr_assert_eq(run.code, 0, "%s", run.output);
    cr_assert_eq(count_in(&run, "threads 1\n"), 2, "%s", run.output);
}

/* ---- who launched us ---- */

static void forget_launcher(void)
{
    static const char *names[] = {"OMPI_COMM_WORLD_SIZE",
                                  "PMIX_RANK",
                                  "PMI_RANK",
                                  "PMI_SIZE",
                                  "SLURM_STEP_ID",
                                  "SLURM_PROCID",
                                  "SLURM_STEP_NUM_TASKS",
                                  "SLURM_NTASKS"};
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        unsetenv(names[i]);
    }
}

Test(comm, launchers_are_recognized_and_a_batch_script_is_none)
{
    forget_launcher();
    cr_assert(!qs_comm_launched());
    setenv("SLURM_PROCID", "0", 1); /* in the batch script of a job of 4 tasks */
    setenv("SLURM_NTASKS", "4", 1);
    cr_assert(!qs_comm_launched());
    setenv("SLURM_STEP_ID", "0", 1); /* the shell of srun --pty */
    setenv("SLURM_STEP_NUM_TASKS", "1", 1);
    setenv("PMIX_RANK", "0", 1);
    cr_assert(!qs_comm_launched());
    setenv("OMPI_COMM_WORLD_SIZE", "2", 1); /* mpirun in that shell */
    cr_assert(qs_comm_launched());
    unsetenv("OMPI_COMM_WORLD_SIZE");
    setenv("SLURM_STEP_NUM_TASKS", "4", 1); /* srun -n 4 */
    cr_assert(qs_comm_launched());
    unsetenv(
        "PMIX_RANK"); /* srun --mpi=none: MPI will refuse, rather than 4 runs of one rank start */
    cr_assert(qs_comm_launched());
    forget_launcher();
    setenv("PMIX_RANK", "0", 1); /* another PMIx launcher */
    cr_assert(qs_comm_launched());
    forget_launcher();
    setenv("PMI_SIZE", "2", 1); /* Hydra */
    cr_assert(qs_comm_launched());
}

static void abort_self(void)
{
    (void)QS_FAIL(QS_ERR_NUMERIC, "x");
    qs_comm *comm = NULL;
    if (qs_comm_self_create(&comm) == QS_OK) {
        qs_comm_abort(comm, QS_ERR_NUMERIC);
    }
}

Test(comm, abort_of_self_exits_with_the_code, .exit_code = 5)
{
    abort_self();
}

Test(comm, abort_without_a_communicator_exits_with_the_code, .exit_code = 8)
{
    qs_comm_abort(NULL, QS_ERR_ENVIRONMENT);
}

Test(comm, destroy_accepts_null)
{
    qs_comm_destroy(NULL);
}
