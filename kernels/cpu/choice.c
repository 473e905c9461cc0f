#include "kernels/cpu/choice.h"

#include <stdlib.h>

#include "base/log.h"

const void *qs_choice_get(qs_choice *c)
{
    const void *table = c->forced;
    const char *wanted = table == NULL ? getenv(c->variable) : NULL;
    if (wanted != NULL && *wanted == '\0') {
        wanted = NULL;
    }
    if (wanted != NULL) {
        table = c->find(wanted);
    }
    if (wanted != NULL && table == NULL && !c->warned) {
        c->warned = true;
        qs_log_warn("%s=%s: not one of %s, %s, %s, or this CPU cannot run it; taking the best it "
                    "can (the results are the same)",
                    c->variable, wanted, c->names[0], c->names[1], c->names[2]);
    }
    for (int i = 0; table == NULL; i++) {
        table = c->find(c->names[i]);
    }
    return table;
}

bool qs_choice_force(qs_choice *c, const char *name)
{
    const void *table = name != NULL ? c->find(name) : NULL;
    if (name != NULL && table == NULL) {
        return false;
    }
    c->forced = table;
    return true;
}
