/* A layer's linear under test: a frozen weight with its adapter, LoRA's or DoRA's, their matrices
 * on the device and the same values on the host, and how both sides compute both passes. By how
 * much the results may differ is what the tests say. */
#ifndef QS_TESTS_LINEAR_LAYER_H
#define QS_TESTS_LINEAR_LAYER_H

#include "adapter.h"

/* _F32: y, and with it the residual, in fp32. */
typedef enum {
    NO_RESIDUAL,
    RESIDUAL,
    RESIDUAL_IS_Y,
    RESIDUAL_F32,
    RESIDUAL_IS_Y_F32
} residual_kind;
typedef enum { NO_DX, DX, DX_ADD } dx_kind;
typedef enum { NF4, NF4_PLAIN_SCALES, NF4_F16, RAW_BF16, RAW_F32 } weight_form;
typedef enum { LORA, DORA } adapter_kind;

enum { BORDER = -1 };

typedef struct {
    int64_t rows, out, in;
    int rank, most_rank; /* of this linear; of the largest one */
    float dropout;
    weight_form weight;
    bool opened;
    int x_pad, dy_pad; /* columns behind x and dy; BORDER: those that the backend asks for, and
                          some behind them that nobody may touch */
    bool bias;
    residual_kind residual;
    dx_kind dx;
} layer_case;

/** The same floats on both sides, [count] fp32. */
typedef struct {
    float *host;
    void *device;
    int64_t count;
} layer_vector;

typedef struct {
    const tw_backend *b;
    const layer_case *c;
    adapter_kind kind;
    char what[200]; /* the case, for messages */
    tw_unit unit;
    adapter ad;
    layer_vector bias, da, db;
    layer_vector magnitude, norm, gain, dm; /* DORA; empty for LORA */
    tw_mat x, y, residual, xa, dy, work, dx;
    float *dropped; /* [rows, in] drop(x) */
} layer;

/** A frozen weight [out, in] of a form. Free with tw_unit_free. */
tw_unit layer_weight(const tw_backend *b, weight_form form, int64_t out, int64_t in);

/** What rounding W's elements to bf16 can change of them, relative: 0 if they are bf16 already. */
double layer_weight_rounding(const layer_case *c);

/** Whether the residual lies where y goes; whether both are fp32. */
bool layer_residual_is_y(const layer_case *c);
bool layer_y_is_f32(const layer_case *c);

/** All that a case needs, full of random values; `c` is borrowed until layer_free. */
layer layer_make(const tw_backend *b, const layer_case *c, adapter_kind kind);
void layer_free(layer *l);

/** Copy a vector's host side to the device; what the device has, to be freed with free. */
void layer_upload(const layer *l, const layer_vector *v);
float *layer_read(const layer *l, const layer_vector *v);

/** Open the backend for the case and, if it says so, the unit (`decoded`: again); close both. */
void layer_open(const layer *l);
void layer_open_unit(const layer *l, const qs_lora *lora, bool decoded);
void layer_close(const layer *l);

/** DORA: norms of the weight with `lora` and, with `magnitude`, gains, on the device. */
void layer_norms(const layer *l, const qs_lora *lora, const void *magnitude);

/** DORA: make the magnitudes such as they are in training, near the norms of W, so that gains are
 * 0.75 to 1.25; compute norms and gains on both sides, compare them, and give them to the adapter.
 * Of an opened layer. */
void layer_set_gains(layer *l);

/** The passes on the device; the backward with that of the magnitudes for DORA. */
void layer_forward(layer *l);
void layer_backward(layer *l);

/** Both passes on the device, twice: with the same bits, and with nothing written but results. Then
 * on the CPU, into the host's matrices: its xa is A drop(x), its work (g dy) B. */
void layer_run(layer *l);

/** Both passes on the device without rows: nothing but gradients of zero. */
void layer_check_empty(layer *l);

/** The device's result within `limit` of the host's, element by element; and, as limits of many
 * tokens' sums are wide, the whole within 1 %: roundings are as often up as down. Frees `limit`. */
void layer_assert_mat(const layer *l, const char *name, const tw_mat *mat, double *limit);
void layer_assert_vector(const layer *l, const char *name, const layer_vector *v, double *limit);

/** LORA: y, and da and db, within what roundings on the longest way can change. `start` [rows,
 * out]: what the product was added to; NULL: nothing. */
void layer_check_y(const layer *l, const float *start);
void layer_check_gradients(const layer *l);

#endif
