#include "config/nearest.h"

#include <stdbool.h>
#include <string.h>

enum { WORD_MAX = 63 };

static int min_of(int a, int b)
{
    return a < b ? a : b;
}

/* Optimal string alignment: three rows of the usual table, so that a swap can look two rows back.
 */
int qs_edit_distance(const char *a, const char *b)
{
    int rows[3][WORD_MAX + 1];
    int a_len = (int)strnlen(a, WORD_MAX), b_len = (int)strnlen(b, WORD_MAX);
    int *before = rows[0], *above = rows[1], *row = rows[2];
    for (int j = 0; j <= b_len; j++) {
        above[j] = j;
    }
    for (int i = 1; i <= a_len; i++) {
        row[0] = i;
        for (int j = 1; j <= b_len; j++) {
            int change = above[j - 1] + (a[i - 1] != b[j - 1]);
            row[j] = min_of(change, min_of(above[j], row[j - 1]) + 1);
            if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) {
                row[j] = min_of(row[j], before[j - 2] + 1);
            }
        }
        int *spare = before;
        before = above;
        above = row;
        row = spare;
    }
    return above[b_len];
}

int qs_typing_errors(size_t length)
{
    return (int)((length + 2) / 3);
}

static bool begins_with(const char *word, const char *start)
{
    return strncmp(word, start, strlen(start)) == 0;
}

const char *qs_nearest(const char *word, const char *const *words, int count)
{
    const char *best = NULL;
    int least = qs_typing_errors(strlen(word)) + 1;
    for (int i = 0; i < count; i++) {
        int distance = qs_edit_distance(word, words[i]);
        if (distance < least) {
            least = distance;
            best = words[i];
        }
    }
    for (int i = 0; i < count && best == NULL && word[0] != '\0'; i++) {
        best = begins_with(word, words[i]) || begins_with(words[i], word) ? words[i] : NULL;
    }
    return best;
}
