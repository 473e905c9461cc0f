/* What is being written stands under NAME.tmp-PID, a file or a directory of plain files and perhaps
 * one more directory of such, and gets its name when it is complete. A command that fails removes
 * it; here is what a signal leaves.
 *
 * INT, TERM and HUP remove the guarded name and then end the process as they would have. Nobody
 * can do that for KILL or a host that goes down: the next command with the same output does. */
#ifndef QS_STORE_TEMP_H
#define QS_STORE_TEMP_H

#define QS_TEMP_MARK ".tmp-" /* between NAME and PID */

/** From now on those signals remove `path` first; it need not be there yet. One at a time. A signal
 * that is ignored (nohup) or that somebody else handles stays so. */
void qs_temp_guard(const char *path);
/** The signals do again what they did. */
void qs_temp_release(void);

/** The process number of `entry` if that is NAME, `mark` and such a number, in digits, as in
 * NAME.tmp-PID; 0: it is something else. */
int qs_temp_pid(const char *entry, const char *name, const char *mark);

/** Remove what killed commands left beside `output`: OUTPUT.tmp-PID, whose process is gone on this
 * host, and which nobody, on whatever host, has written into for ten minutes. `inner`: name of the
 * directory that it may hold; NULL: none. One with any other in it is not ours. */
void qs_temp_remove_stale(const char *output, const char *inner);

#endif
