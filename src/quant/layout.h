/* Where the bytes of a gathered unit lie: arithmetic only, used by the store, the gather and the
 * kernels alike.
 *
 *   a unit gathered from N ranks is N messages of message_bytes each, rank after rank:
 *   | packed p4*8192 | absmax8 p4*256 | absmax32 p4*4 | raw p16*raw_quantum_bytes |
 *   p4 = ceil(nf4_quanta / N), p16 = ceil(raw_quanta / N), sections padded to 128 bytes
 *
 * NF4 quantum q is number q % p4 of message q / p4. Kernels never see a flat pointer: they ask
 * this view. */
#ifndef QS_QUANT_LAYOUT_H
#define QS_QUANT_LAYOUT_H

#include <stddef.h>
#include <stdint.h>

#include "base/dtype.h"
#include "quant/nf4.h"

/** Sizes of one unit; the same on every rank and for every rank count. */
typedef struct {
    int64_t nf4_quanta;
    int64_t raw_quanta;
    int64_t raw_quantum_elems;
    qs_dtype raw_dtype;
    int absmax8_per_quantum;  /* 256 with double quantization, else 0 */
    int absmax32_per_quantum; /* 1 with double quantization, else 256 */
} qs_unit_size;

/** Layout of one message of a unit that is shared by `nranks`. */
typedef struct {
    qs_unit_size size;
    int nranks;
    int64_t nf4_per_rank; /* p4 */
    int64_t raw_per_rank; /* p16 */
    size_t packed_at, absmax8_at, absmax32_at, raw_at;
    size_t message_bytes;
} qs_unit_layout;

qs_unit_layout qs_unit_layout_make(const qs_unit_size *size, int nranks);

/** Bytes of one raw quantum. */
size_t qs_raw_quantum_bytes(const qs_unit_size *size);

/** A gathered unit: the layout and where message 0 lies; message r follows at r * message_bytes. */
typedef struct {
    qs_unit_layout layout;
    const uint8_t *base;
} qs_unit_view;

typedef struct {
    const uint8_t *packed;  /* [8192] */
    const uint8_t *absmax8; /* [256], NULL without double quantization */
    const float *absmax32;  /* [1] or [256] */
} qs_nf4_quantum;

qs_nf4_quantum qs_unit_nf4_quantum(const qs_unit_view *view, int64_t quantum);
const uint8_t *qs_unit_raw_quantum(const qs_unit_view *view, int64_t quantum);

/** One linear weight [out, in] inside a gathered unit. */
typedef enum { QS_WEIGHT_NF4, QS_WEIGHT_RAW } qs_weight_kind;

typedef struct {
    qs_weight_kind kind;
    int64_t out, in;
    int64_t quantum;  /* first quantum of the tensor within the unit */
    qs_dtype dtype;   /* NF4: what W is rounded to; raw: the stored type */
    const float *map; /* [256] second-level map, NULL without double quantization; borrowed */
    float offset;     /* nested offset */
} qs_weight;

/** Decode elements [first, first + count) of the row-major tensor to floats: W = round(code *
 * absmax) to w->dtype, or the raw value widened. The definition of what a weight is.
 * \param [out] out  [count]. */
void qs_weight_decode(const qs_unit_view *view, const qs_weight *w, int64_t first, int64_t count,
                      float *out);

#endif
