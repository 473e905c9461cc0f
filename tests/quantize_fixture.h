/* A scratch folder with a model to quantize and a folder for what comes of it. */
#ifndef QS_TESTS_QUANTIZE_FIXTURE_H
#define QS_TESTS_QUANTIZE_FIXTURE_H

#include "store/hash.h"
#include "team.h"
#include "tests/scratch.h"
#include "weights/base_file.h"
#include "weights/quantize.h"

extern char qf_dir[SCRATCH_MAX], qf_model[96], qf_out[96]; /* the others in the first */

/** Init and fini of a suite. */
void qf_make_dirs(void);
void qf_remove_dirs(void);

/** The path of a file of qf_out, until the call after the next. */
const char *qf_file(const char *name);

/** How many files are in qf_out, hidden ones too. */
int qf_files(void);

void qf_sha256(const char *path, char hex[QS_SHA256_HEX]);

typedef struct {
    qs_quantize_options options;
    qs_quantize_report report[TEAM_MAX];
} qf_run;

/** qf_model to `path`, with the settings that tests do not care about. */
qf_run qf_to_file(const char *path, int threads);

/** Quantize on `nranks` threads-as-ranks; all must end alike. The error text of rank 0's kind is
 * left in *text. */
qs_status qf_quantize_on(int nranks, qf_run *c, char text[512]);

/** The same on one rank, which must succeed. */
void qf_quantize(const char *path);

/** The index of the file that comes of it, which is gone then. The caller frees it. */
qs_base_index *qf_index(void);

#endif
