#define _GNU_SOURCE /* pthread_setaffinity_np */
#include "base/places.h"

#include <pthread.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>

static int *places;
static int places_count;

void qs_places_set(const int *cpus, int count)
{
    int *copy = malloc((size_t)count * sizeof *copy);
    if (copy != NULL) { /* without it the system chooses, as it would have */
        memcpy(copy, cpus, (size_t)count * sizeof *copy);
        free(places);
        places = copy;
        places_count = count;
    }
}

void qs_places_take(int thread)
{
    if (thread < places_count && places[thread] < CPU_SETSIZE) {
        cpu_set_t set;
        CPU_ZERO(&set);
        CPU_SET((size_t)places[thread], &set);
        (void)pthread_setaffinity_np(pthread_self(), sizeof set, &set);
    }
}
