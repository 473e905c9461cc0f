#include <stdio.h>

#include "store/h5_impl.h"

void qs_h5_version(char *out, size_t capacity)
{
    unsigned major = 0, minor = 0, release = 0;
    qs_h5_lock();
    (void)H5get_libversion(&major, &minor, &release);
    qs_h5_unlock();
    (void)snprintf(out, capacity, "%u.%u.%u", major, minor, release);
}
