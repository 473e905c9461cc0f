/* case_quantize HF_DIR OUTPUT THREADS: qs_quantize under mpirun, with the exit code of the program.
 */
#include <stdio.h>
#include <stdlib.h>

#include "weights/quantize.h"

int main(int argc, char **argv)
{
    qs_comm *comm = NULL;
    qs_quantize_report report;
    qs_status st = qs_comm_mpi_create(&comm, &argc, &argv);
    if (st == QS_OK && argc == 4) {
        qs_quantize_options o = {.hf_dir = argv[1],
                                 .output = argv[2],
                                 .head_chunk_rows = 100,
                                 .double_quant = true,
                                 .threads = atoi(argv[3])};
        st = qs_quantize(&o, comm, &report);
        if (st == QS_OK && qs_comm_rank(comm) == 0) {
            printf("linears %lld zero_blocks %lld\n", (long long)report.linears,
                   (long long)report.zero_blocks);
        }
    }
    qs_error_print(st);
    qs_comm_destroy(comm);
    return qs_exit_code(st);
}
