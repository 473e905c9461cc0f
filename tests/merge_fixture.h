/* A scratch folder, which a test is in, with models, their bases and adapters to merge. */
#ifndef QS_TESTS_MERGE_FIXTURE_H
#define QS_TESTS_MERGE_FIXTURE_H

#include <stdbool.h>
#include <stdint.h>

#include "lora/lora.h"
#include "support/tiny_hf.h"
#include "tests/program.h"
#include "weights/base_file.h"

enum {
    MF_ALL = (1 << QS_QKV) - 1, /* linears of a layer of Llama */
    MF_RANK = 4
};

/** Where the program and the libraries of faults are. */
extern char mf_binaries[PROGRAM_FOLDER_MAX];

/** Init and fini of a suite. */
void mf_make_folder(void);
void mf_remove_folder(void);

/** A model's directory, and the base that it is quantized to. */
void mf_make_model(const char *model, const char *base, const tiny_hf *o);

/** The caller frees it. */
qs_base_index *mf_open_index(const char *base);

typedef struct {
    qs_config config;
    qs_lora_layout layout;
    float *vector; /* the caller frees it */
} mf_adapter;

/** Weights in [-size / 2, size / 2), the same ones each time; and as a PEFT directory. */
mf_adapter mf_make_adapter(const qs_hf_config *model, uint32_t targets, bool rslora, bool dora,
                           float size);
void mf_write_adapter(const char *dir, const mf_adapter *a);

/** model/, base.h5 and adapter/ of the usual kind. */
void mf_make_usual(void);

/** A small file. */
void mf_put(const char *name, const char *text);

/** How many temporary names are in the folder; whether two files or directories differ. */
int mf_leftovers(void);
int mf_differs(const char *a, const char *b);

#endif
