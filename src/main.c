/* qshard: QLoRA fine-tuning sharded over MPI ranks. */
#include "cli/cli.h"

int main(int argc, char **argv)
{
    return qs_cli_main(argc, argv);
}
