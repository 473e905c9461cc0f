/* Stop signals: a flag that the training loop reads behind every step and every pass, reduced over
 * the ranks, so that all save at the same step. USR1 comes from schedulers ahead of the time limit,
 * TERM at preemption, HUP when a terminal goes away; INT from a keyboard, where a second one means
 * now. */
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "comm/comm.h"
#include "train/train.h"

static atomic_int caught, terminations; /* read by the watch's thread, too */
static volatile sig_atomic_t interrupts;
static bool by_mpirun; /* which kills its ranks a second after their TERM */

static void on_signal(int number)
{
    caught++;
    terminations += number == SIGTERM;
    if (number == SIGINT && ++interrupts > 1) {
        _exit(128 + SIGINT);
    }
}

void qs_signals_install(void)
{
    static bool installed;
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    sigemptyset(&action.sa_mask);
    sigaction(SIGUSR1, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    struct sigaction before;
    if (sigaction(SIGHUP, NULL, &before) == 0 && before.sa_handler != SIG_IGN) { /* nohup */
        sigaction(SIGHUP, &action, NULL);
    }
    signal(SIGPIPE, SIG_IGN);
    by_mpirun = installed ? by_mpirun : qs_comm_launched_by_mpirun();
    installed = true;
}

int qs_signals_caught(void)
{
    return caught;
}

/* Ranks on other hosts are children of a daemon. */
int qs_signals_mpirun(void)
{
    char path[64], name[32] = "";
    snprintf(path, sizeof path, "/proc/%d/comm", (int)getppid());
    FILE *file = by_mpirun ? fopen(path, "re") : NULL;
    if (file == NULL) {
        return 0;
    }
    const bool read = fgets(name, sizeof name, file) != NULL;
    fclose(file);
    return read && (strncmp(name, "mpi", 3) == 0 || strstr(name, "run") != NULL) ? getppid() : 0;
}

bool qs_signals_hurry(void)
{
    return by_mpirun && terminations > 0;
}

int qs_signals_terminations(void)
{
    return terminations;
}
