/* Facts from /proc. */
#ifndef QS_BASE_PROC_H
#define QS_BASE_PROC_H

#include <stddef.h>

/** The value behind "key :" in a file of /proc, for example "model name" in /proc/cpuinfo; "" if
 * there is none. */
void qs_proc_value(const char *path, const char *key, char *out, size_t capacity);

#endif
