/* The bulk-synchronous training run: steps, evaluation, metrics, checkpoints, stop signals. */
#ifndef QS_TRAIN_TRAIN_H
#define QS_TRAIN_TRAIN_H

#include "ckpt/run_dir.h"
#include "comm/comm.h"
#include "config/config.h"

typedef struct {
    qs_config config;
    qs_resume resume;
    bool takeover; /* take the run directory over from a writer that is gone */
    bool dry_run;  /* check all inputs, print the memory table, stop; the output is not looked at */
    const char *dump_grads; /* safetensors: gradients of the first step before clipping, then stop;
                               or NULL */
    const char
        *dump_order;   /* text: sequence indices per step, one line a step, then stop; or NULL */
    const char *trace; /* file for the spans of profile_steps on all ranks, or NULL */
    int64_t
        profile_steps[2]; /* first and last step that an attached profiler sees, from 1; 0: none */
} qs_train_options;

/** Train. Collective. QS_REQUEUE after a stop signal, when everything is saved. */
qs_status qs_train_run(const qs_train_options *options, qs_comm *comm);

typedef struct {
    qs_config config;
    const char *adapter; /* PEFT directory, checkpoint step-N or run directory; NULL: base only */
    const char
        *dump_logits; /* safetensors with "logits" [tokens, vocab] of the first sequence, or NULL */
} qs_eval_options;

/** Loss and perplexity on data.eval; prints one line on stdout from rank 0. Collective. */
qs_status qs_eval_run(const qs_eval_options *options, qs_comm *comm);

typedef struct {
    qs_config config;
    const char *adapter, *prompts;
    int64_t tokens; /* to add to each prompt */
} qs_sample_options;

/** Greedy continuations of every prompt, printed on stdout by rank 0. Collective. */
qs_status qs_sample_run(const qs_sample_options *options, qs_comm *comm);

/** Install handlers: USR1, TERM, INT and HUP (but under nohup) set a flag; a second INT ends the
 * process. First before MPI starts. */
void qs_signals_install(void);
int qs_signals_caught(void);       /* how many so far */
int qs_signals_mpirun(void);       /* the mpirun that a USR1 reaches all ranks by; 0: none here */
bool qs_signals_hurry(void);       /* whoever sent one of them kills this process in a second */
int qs_signals_terminations(void); /* TERM among them: a launcher ends its ranks by it */

#endif
