/* "Did you mean ...?": the nearest of a list of words, if one is near. */
#ifndef QS_CONFIG_NEAREST_H
#define QS_CONFIG_NEAREST_H

#include <stddef.h>

/** Number of single-letter insertions, deletions, replacements and swaps of neighbours that turn
 * `a` into `b` (only the first 63 letters of each count). */
int qs_edit_distance(const char *a, const char *b);

/** The most edits after which a word of `length` letters is still taken for a typing error: one for
 * every three letters begun. Beyond that the nearest word is a guess that misleads. */
int qs_typing_errors(size_t length);

/** The word of `words[count]` nearest to `word`, the first of equals; else the one that `word`
 * begins with or that begins with it; NULL where none is near. */
const char *qs_nearest(const char *word, const char *const *words, int count);

#endif
