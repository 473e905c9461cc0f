/* A scratch folder with a run directory, and a trainer's state of known values to save there. */
#ifndef QS_TESTS_CKPT_FIXTURE_H
#define QS_TESTS_CKPT_FIXTURE_H

#include "ckpt/ckpt.h"
#include "team.h"
#include "tests/scratch.h"

extern char fx_folder[SCRATCH_MAX], fx_run_dir[96]; /* the second in the first */

/** Init and fini of a suite. */
void fx_make_folder(void);
void fx_remove_folder(void);

/** A small configuration whose output is fx_run_dir. */
qs_config fx_config(void);

/** 7 chunks a layer: no rank count of the tests divides it but 1 and 7. */
qs_lora_layout fx_layout(const qs_config *c);

typedef struct {
    qs_config config;
    qs_lora_layout layout;
    qs_ckpt_meta meta;
    char *yaml;    /* the caller frees it */
    int fail_rank; /* saves a share of the wrong size */
} fx_plan;

void fx_plan_init(fx_plan *p, int64_t step);

/** An element of master (which 0), m (1) or v (2). */
float fx_value(int which, int layer, int64_t element);

/** Write a rank's elements, or with `equal` compare them. */
void fx_each_element(const fx_plan *p, qs_optim *o, int rank, int nranks, bool *equal);

qs_status fx_make_optim(const fx_plan *p, qs_comm *comm, qs_optim **out);

/** Save the plan's step; a body of team.h with the plan as ctx. */
qs_status fx_save_body(team_member *me);
void fx_save_step(int64_t step, int nranks);

/** Of fx_run_dir: is `name` in it, and how many names without a dot in front are? */
bool fx_exists(const char *name);
int fx_entries(void);

#endif
