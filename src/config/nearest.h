/* "Did you mean ...?": the nearest of a list of words. */
#ifndef QS_CONFIG_NEAREST_H
#define QS_CONFIG_NEAREST_H

/** Number of single-letter insertions, deletions, replacements and swaps of neighbours that turn
 * `a` into `b` (only the first 63 letters of each count). */
int qs_edit_distance(const char *a, const char *b);

/** The word of `words[count]` nearest to `word`, the first of equals; NULL for an empty list. */
const char *qs_nearest(const char *word, const char *const *words, int count);

#endif
