/* Stop signals: a flag that the training loop reads behind every step and every pass, reduced over
 * the ranks, so that all save at the same step. USR1 comes from schedulers ahead of the time limit,
 * TERM at preemption; INT from a keyboard, where a second one means now. */
#include <signal.h>
#include <stdatomic.h>
#include <unistd.h>

#include "train/train.h"

static atomic_int caught, terminations; /* read by the watch's thread, too */
static volatile sig_atomic_t interrupts;

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
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    sigemptyset(&action.sa_mask);
    sigaction(SIGUSR1, &action, NULL);
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
    signal(SIGPIPE, SIG_IGN);
}

int qs_signals_caught(void)
{
    return caught;
}

int qs_signals_terminations(void)
{
    return terminations;
}
