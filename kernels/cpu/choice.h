/* One of several tables of inner loops that give the same bits: the fastest that this CPU runs, or,
 * for tests, what a variable of the environment names. */
#ifndef QS_KERNELS_CPU_CHOICE_H
#define QS_KERNELS_CPU_CHOICE_H

#include <stdbool.h>

enum { QS_CHOICE_TABLES = 3 };

typedef struct {
    const char *variable;                  /* of the environment */
    const char *names[QS_CHOICE_TABLES];   /* the fastest first, the last runs anywhere */
    const void *(*find)(const char *name); /* NULL: none, or this CPU cannot run it */
    const void *_Atomic forced;
    _Atomic bool warned;
} qs_choice;

/** The table in use, never NULL. A variable that names none of this CPU's warns once. */
const void *qs_choice_get(qs_choice *c);

/** Use the table called `name` from now on, NULL: as by default. \return false if this CPU cannot
 * run it. */
bool qs_choice_force(qs_choice *c, const char *name);

#endif
