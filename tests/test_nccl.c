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

/* What every communicator must do, on queues of the CPU: the host's calls behind NCCL's. */
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
        cr_assert_eq(count_in(&run, "passed "), nranks * checks, "np %d:\n%s", nranks, run.output);
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
    cr_assert_eq(count_in(&run, "error[E401] out/base.h5: no space left\n"), 1, "%s", run.output);
}
