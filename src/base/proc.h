/* What this host is: its name, and facts from /proc. */
#ifndef QS_BASE_PROC_H
#define QS_BASE_PROC_H

#include <stddef.h>
#include <stdint.h>

enum { QS_HOST_NAME_BYTES = 65 }; /* Linux takes names of 64 */

/** The name of this host, "(unknown)" if it has none; zeros behind it, so that it can be sent. */
void qs_host_name(char out[QS_HOST_NAME_BYTES]);

/** The value behind "key :" in a file of /proc, for example "model name" in /proc/cpuinfo; "" if
 * there is none. */
void qs_proc_value(const char *path, const char *key, char *out, size_t capacity);

/** A number that stands for what a small file says; 0 where it is not there or empty. */
uint64_t qs_proc_file_number(const char *path);

/** A number of the running kernel's, so that two containers of one machine count as one host. Where
 * /proc is not there every process counts as on one host: shares are small then, never too large.
 */
uint64_t qs_proc_host_number(void);

#endif
