/* qshard quantize: a Hugging Face checkpoint (bf16, f16, f32, or bitsandbytes NF4) to base.h5.
 *
 * Ranks share the work by tensor; a rank holds a few tensors at a time. Rank 0 creates the file
 * under a temporary name with all datasets allocated, every rank writes its own ranges, reads
 * them back, and rank 0 renames; where they came from several hosts it verifies all of them before.
 * A killed run leaves nothing that looks finished. */
#ifndef QS_WEIGHTS_QUANTIZE_H
#define QS_WEIGHTS_QUANTIZE_H

#include "backend/backend.h"
#include "comm/comm.h"
#include "weights/base_file.h"

typedef struct {
    const char *hf_dir;
    const char *output;
    int64_t head_chunk_rows; /* 0: 4096 */
    bool double_quant;       /* default true; an import keeps what the checkpoint has */
    int threads;
    const qs_backend *backend; /* where to compute; NULL: the CPU. The bytes are the same. */
} qs_quantize_options;

typedef struct {
    int64_t linears, zero_blocks; /* over all ranks */
    int64_t source_bytes, output_bytes;
    double seconds;
    size_t peak_bytes; /* largest of the ranks */
} qs_quantize_report;

/** Collective. QS_ERR_OUTPUT_TAKEN if the output exists. */
qs_status qs_quantize(const qs_quantize_options *options, qs_comm *comm,
                      qs_quantize_report *report);

/** The index that qshard quantize would give the checkpoint in HF_DIR with its default options, as
 * far as config.json says it: every linear NF4, double quantization. No weights are looked at; for
 * planning. Not collective; free with qs_base_index_free. */
qs_status qs_base_index_expected(qs_base_index **out, const char *hf_dir);

#endif
