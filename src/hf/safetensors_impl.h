/* What the files of the safetensors module share. */
#ifndef QS_HF_SAFETENSORS_IMPL_H
#define QS_HF_SAFETENSORS_IMPL_H

#include "hf/safetensors.h"

enum { QS_ST_MAX_HEADER = 100000000 }; /* bytes, as the reference reader */

/** "BF16", ...; as in the header. */
const char *qs_st_dtype_name(qs_st_dtype dtype);

#endif
