/* Which core each thread of a team runs on, if that is said: whoever knows (cores.h) says it before
 * the team starts, whoever starts threads (kernels/cpu/parallel.h) sees to it. */
#ifndef QS_BASE_PLACES_H
#define QS_BASE_PLACES_H

/** From now on thread i < count of a team has hardware thread cpus[i] to itself; copied. Once in a
 * process, before any team. Thread 0, the caller, is not bound to its place: it finds the one that
 * is left, and the threads of libraries that it may start are not confined to it. */
void qs_places_set(const int *cpus, int count);

/** Bind the calling thread as number `thread` > 0 of a team; nothing if no place was given for it.
 */
void qs_places_take(int thread);

#endif
