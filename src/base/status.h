/* Errors: one number per kind of failure, one record per thread, one line for the user.
 *
 * A function that can fail returns a qs_status, 0 when all is well. The number is the code that
 * the user sees: QS_ERR_CONFIG_KEY = 201 is printed as `error[E201]`, and 201 / 100 = 2 is the
 * exit code of the process. The text is kept in the failing thread's record until qs_error_print,
 * so that a caller high up decides who speaks.
 *
 *     if (cfg->hidden % cfg->heads != 0) {
 *         return QS_FAIL(QS_ERR_INPUT_VALUE, "%s: hidden_size=%d is not ...", path, ...);
 *     }
 */
#ifndef QS_BASE_STATUS_H
#define QS_BASE_STATUS_H

#include <stdbool.h>
#include <stddef.h>

typedef enum {
    QS_OK = 0,
    /* 2: usage or configuration */
    QS_ERR_USAGE = 200,        /* unknown command or option, missing argument */
    QS_ERR_CONFIG_KEY = 201,   /* unknown key */
    QS_ERR_CONFIG_VALUE = 202, /* value mistyped or out of range */
    QS_ERR_CONFIG_PAIR = 203,  /* two settings contradict each other */
    QS_ERR_OUTPUT_TAKEN = 204, /* the output exists and is not ours */
    /* 3: bad input file */
    QS_ERR_INPUT_MISSING = 300, /* cannot be opened or read */
    QS_ERR_INPUT_FORMAT = 301,  /* not the format that it claims */
    QS_ERR_INPUT_VALUE = 302,   /* a field is out of range or contradicts another */
    QS_ERR_INPUT_UNKNOWN = 303, /* an architecture, dtype or scheme that is not supported */
    QS_ERR_INPUT_HASH = 304,    /* content does not match its hash */
    QS_ERR_INPUT_TENSOR = 305,  /* a tensor is missing, duplicate or of the wrong shape */
    /* 4: output or checkpoint I/O */
    QS_ERR_IO = 400,         /* a write, sync or rename failed */
    QS_ERR_IO_FULL = 401,    /* no space or quota */
    QS_ERR_IO_VERIFY = 402,  /* what was written reads back differently */
    QS_ERR_CHECKPOINT = 403, /* no checkpoint that verifies */
    /* 5: numeric */
    QS_ERR_NUMERIC = 500, /* loss or gradient not finite */
    /* 6: peer lost or hang */
    QS_ERR_PEER = 600,  /* a collective failed */
    QS_ERR_STALL = 601, /* nothing moves any more */
    /* 7: memory */
    QS_ERR_MEMORY = 700,
    /* 8: ranks disagree, or the environment does not fit */
    QS_ERR_DISAGREE = 800,
    QS_ERR_ENVIRONMENT = 801,
    QS_ERR_RESUME = 802, /* a checkpoint of another configuration */
    /* 9: device */
    QS_ERR_DEVICE = 900,
    /* 70: our own mistake */
    QS_ERR_BUG = 7000,
    /* 75: not an error: saved on request, please start me again */
    QS_REQUEUE = 7500,
} qs_status;

/** Exit code of the process for a status (status / 100). */
int qs_exit_code(qs_status status);

/** Record an error in this thread and return `status`. The first error since qs_error_clear is
 * kept: later ones are consequences. Use QS_FAIL. */
qs_status qs_error_set(qs_status status, const char *file, int line, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

#define QS_FAIL(status, ...) qs_error_set((status), __FILE__, __LINE__, __VA_ARGS__)

/** Text of this thread's recorded error, "" when there is none. Borrowed until the next error call
 * of the thread. */
const char *qs_error_text(void);

/** In this thread's record, write `to` for each `from`, which is not shorter: messages of work in a
 * temporary place name the one that was asked for. */
void qs_error_rename(const char *from, const char *to);

/** Note the errno that the recorded error came from. */
void qs_error_because(int error);

/** The errno behind this thread's recorded error; 0 where none was noted. */
int qs_error_cause(void);

/** Replace this thread's record: what qs_comm_agree does on the ranks that did not fail
 * themselves. `silent` keeps qs_error_print quiet, because another rank speaks. */
void qs_error_adopt(qs_status status, const char *text, bool silent);

/** True if the record was adopted from a rank that speaks for itself. */
bool qs_error_is_silent(void);

/** Whose the recorded error is, put behind the text when it is printed: "rank 3 on node7"; "": not
 * to be named. */
void qs_error_name_place(const char *place);

/** Forget this thread's record. */
void qs_error_clear(void);

enum { QS_ERROR_LINE_MAX = 2048 + 256 };

/** The line that would be printed for `status`, with its end of line. \return its length, 0 where
 * nothing is recorded or there is nothing to print. */
size_t qs_error_line(char *out, size_t capacity, qs_status status);

/** Print `error[E203] text (place)` as one line on stderr, at most once per record, nothing if
 * silent or QS_REQUEUE. */
void qs_error_print(qs_status status);

/** Has it been printed? And: another thread has (base/cause.h). */
bool qs_error_is_printed(void);
void qs_error_set_printed(void);

/** Return from this function if `expr` is not QS_OK. */
#define QS_TRY(expr)                                                                               \
    do {                                                                                           \
        qs_status qs_try_status_ = (expr);                                                         \
        if (qs_try_status_ != QS_OK) {                                                             \
            return qs_try_status_;                                                                 \
        }                                                                                          \
    } while (0)

/** Set the local `st` and go to the label `done` if `expr` is not QS_OK. */
#define QS_GOTO(expr)                                                                              \
    do {                                                                                           \
        st = (expr);                                                                               \
        if (st != QS_OK) {                                                                         \
            goto done;                                                                             \
        }                                                                                          \
    } while (0)

#endif
