/* The NCCL communicator with bytes in device memory: the plugin's own code on the emulated device,
 * NCCL played by MPI (tests/emulator/nccl_mpi.c), ranks of mpirun. What happens when NCCL fails is
 * in test_comm_nccl.c. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cases/comm_checks.h"
#include "mpirun.h"

enum { DEVICE_CHECKS = 6 };

Test(nccl, device_memory_on_1_to_4_ranks, .timeout = 300)
{
    for (int nranks = 1; nranks <= 4; nranks++) {
        mpirun_result run;
        shell(&run, 60, "mpirun -np %d %s all", nranks, case_path("nccl"));
        cr_assert_eq(run.code, 0, "np %d: exit %d\n%s", nranks, run.code, run.output);
        cr_assert_eq(count_in(&run, "passed "), nranks * DEVICE_CHECKS, "np %d:\n%s", nranks,
                     run.output);
        char who[64];
        snprintf(who, sizeof who, "comm nccl of %d", nranks);
        cr_assert_eq(count_in(&run, who), 1, "%s", run.output);
    }
}

/* What every communicator must do, on queues of the CPU: the host's calls behind NCCL's. All but
 * "split". */
Test(nccl, host_memory_on_1_to_4_ranks, .timeout = 300)
{
    int checks = 0;
    while (comm_checks[checks].name != NULL) {
        checks++;
    }
    for (int nranks = 1; nranks <= 4; nranks++) {
        mpirun_result run;
        shell(&run, 60, "mpirun -np %d %s host", nranks, case_path("nccl"));
        cr_assert_eq(run.code, 0, "np %d: exit %d\n%s", nranks, run.code, run.output);
        cr_assert_eq(count_in(&run, "passed "), nranks * (checks - 1), "np %d:\n%s", nranks,
                     run.output);
    }
}

Test(nccl, without_a_launcher_it_stands_on_self, .timeout = 120)
{
    mpirun_result run;
    shell(&run, 60, "%s all", case_path("nccl"));
    cr_assert_eq(run.code, 0, "%s", run.output);
    cr_assert_eq(count_in(&run, "comm nccl of 1"), 1, "%s", run.output);
    cr_assert_eq(count_in(&run, "passed "), DEVICE_CHECKS, "%s", run.output);
}

Test(nccl, one_failing_rank_ends_all_with_its_code_and_one_line, .timeout = 120)
{
    for (int nranks = 1; nranks <= 3; nranks++) {
        mpirun_result run;
        shell(&run, 60, "mpirun -np %d %s last_rank_fails", nranks, case_path("nccl"));
        cr_assert_eq(run.code, 3, "np %d: exit %d\n%s", nranks, run.code, run.output);
        cr_assert_eq(count_in(&run, "error["), 1, "%s", run.output);
    }
}

Test(nccl, abort_ends_waiting_ranks_with_the_code, .timeout = 120)
{
    mpirun_result run;
    shell(&run, 60, "mpirun -np 3 %s rank_0_aborts", case_path("nccl"));
    cr_assert_eq(run.code, 4, "exit %d\n%s", run.code, run.output);
    cr_assert_eq(count_in(&run, "error[E401] out/base.h5: no space left (rank 0 on "), 1, "%s",
                 run.output);
}

/* ---- NCCL fails: QSHARD_EMULATOR_NCCL_FAIL ---- */

static void run_failing(mpirun_result *run, const char *setting, const char *name)
{
    shell(run, 60, "env %s mpirun -np 3 %s %s", setting, case_path("nccl"), name);
}

Test(nccl, a_failing_exchange_is_exit_6, .timeout = 200)
{
    static const char *const settings[] = {"4@1", "4", "async:5@0", "async:3"}; /* two are tried */
    static const char *const names[] = {"all_gather", "all_to_all_v"};
    for (int i = 0; i < 4; i++) {
        char setting[96];
        snprintf(setting, sizeof setting, "QSHARD_EMULATOR_NCCL_FAIL=%s", settings[i]);
        mpirun_result run;
        run_failing(&run, setting, names[i % 2]);
        cr_assert_eq(run.code, 6, "%s: exit %d\n%s", setting, run.code, run.output);
        cr_assert_geq(count_in(&run, "error[E600] nccl"), 1, "%s:\n%s", setting, run.output);
        cr_assert_geq(count_in(&run, "remote process exited"), 1, "%s:\n%s", setting, run.output);
    }
}

/* GPUs that spoil what they send each other: said by the first bytes, before anything is loaded. */
Test(nccl, wrong_bytes_at_the_start_are_exit_9_and_one_line, .timeout = 120)
{
    static const char *const settings[] = {"wrong:1@2", "wrong:2@0", "wrong:1"};
    static const char *const calls[] = {"all-gather", "exchange", "all-gather"};
    for (int i = 0; i < 3; i++) {
        char setting[96], says[64];
        snprintf(setting, sizeof setting, "QSHARD_EMULATOR_NCCL_FAIL=%s", settings[i]);
        snprintf(says, sizeof says, "error[E900] NCCL: the first %s brings rank", calls[i]);
        mpirun_result run;
        run_failing(&run, setting, "all");
        cr_assert_eq(run.code, 9, "%s: exit %d\n%s", setting, run.code, run.output);
        cr_assert_eq(count_in(&run, "error["), 1, "%s:\n%s", setting, run.output);
        cr_assert_eq(count_in(&run, says), 1, "%s:\n%s", setting, run.output);
    }
}

Test(nccl, a_start_that_fails_is_exit_6_and_one_line, .timeout = 120)
{
    mpirun_result run;
    run_failing(&run, "QSHARD_EMULATOR_NCCL_FAIL=init", "all");
    cr_assert_eq(run.code, 6, "exit %d\n%s", run.code, run.output);
    cr_assert_eq(count_in(&run, "error["), 1, "%s", run.output);
    cr_assert_eq(count_in(&run, "error[E600] ncclCommInitRankConfig: unhandled system error"), 1,
                 "%s", run.output);
}

/* Rank 1 has failed and says nothing to the others' NCCL. */
Test(nccl, a_peer_that_does_not_come_is_waited_for_no_longer_than_the_limit, .timeout = 120)
{
    mpirun_result run;
    run_failing(&run, "QSHARD_NCCL_TIMEOUT=1 QSHARD_EMULATOR_NCCL_FAIL=init@1", "all");
    cr_assert_eq(run.code, 6, "exit %d\n%s", run.code, run.output);
    cr_assert_geq(count_in(&run, "of 3 has waited 1 s for the others"), 1, "%s", run.output);
}

Test(nccl, different_libraries_are_exit_8_and_one_line, .timeout = 120)
{
    mpirun_result run;
    run_failing(&run, "QSHARD_EMULATOR_NCCL_VERSION=22501@2", "all");
    cr_assert_eq(run.code, 8, "exit %d\n%s", run.code, run.output);
    cr_assert_eq(count_in(&run, "error["), 1, "%s", run.output);
    cr_assert_eq(count_in(&run, "NCCL 2.25.1"), 1, "%s", run.output);
}
