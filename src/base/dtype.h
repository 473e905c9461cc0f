/* Element types of files and buffers, and the conversions between them: exact widening, round to
 * nearest even. */
#ifndef QS_BASE_DTYPE_H
#define QS_BASE_DTYPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum { QS_F32, QS_BF16, QS_F16, QS_U8, QS_I32, QS_I64 } qs_dtype;

/** Bytes per element. */
size_t qs_dtype_bytes(qs_dtype dtype);

/** "f32", "bf16", "f16", ...; as in our files. */
const char *qs_dtype_name(qs_dtype dtype);

/** The type called `name` ("bf16", "bfloat16", "BF16" alike); -1 if there is none. */
int qs_dtype_parse(const char *name);

float qs_f32_from_bf16(uint16_t bits);
float qs_f32_from_f16(uint16_t bits);
uint16_t qs_bf16_from_f32(float value); /* NaN stays NaN (quiet) */
uint16_t qs_f16_from_f32(float value);  /* overflow becomes infinity */

/** Convert `count` elements of type `dtype` (QS_F32, QS_BF16 or QS_F16) at `src` (any alignment)
 * to floats. */
void qs_f32_load(float *dst, const void *src, qs_dtype dtype, int64_t count);

/** Convert `count` floats to `dtype` (QS_F32, QS_BF16 or QS_F16). */
void qs_f32_store(void *dst, qs_dtype dtype, const float *src, int64_t count);

/** Whether none of `count` elements of type `dtype` (QS_F32, QS_BF16 or QS_F16) at `src` (any
 * alignment) is NaN or infinite. */
bool qs_all_finite(const void *src, qs_dtype dtype, int64_t count);

/** `value` rounded to `dtype` and widened again. */
float qs_f32_round(float value, qs_dtype dtype);

#endif
