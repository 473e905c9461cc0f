/* The command line: `qshard COMMAND [OPTION...]`. */
#ifndef QS_CLI_CLI_H
#define QS_CLI_CLI_H

/** Run the command in argv on this process's rank. \return the exit code of the process. */
int qs_cli_main(int argc, char **argv);

#endif
