/* What the readers and the writer of base.h5 share: the table of units as a function of the
 * model's config, and its JSON. */
#ifndef QS_WEIGHTS_BASE_IMPL_H
#define QS_WEIGHTS_BASE_IMPL_H

#include "store/h5.h"
#include "weights/base_file.h"

enum { QS_BASE_NAME = 128 }; /* longest tensor or dataset name, with its NUL */

/** How many units a model has: layers, embedding chunks, head chunks. */
int64_t qs_base_count_units(const qs_hf_config *config, int64_t head_chunk_rows);

/** Allocate index->units and index->final with the names, kinds and shapes that index->config and
 * index->head_chunk_rows imply. Linears are NF4, what is left to decide are the dtypes and which
 * linears are raw. */
qs_status qs_base_make_units(qs_base_index *index);

/** Number the quanta and the small bytes of a unit whose kinds and dtypes are set; fills size and
 * small_bytes. `raw_elems`: elements of a raw quantum. */
void qs_base_place(const qs_base_index *index, qs_base_unit *unit, int64_t raw_elems);

/** Elements of a raw quantum of unit `u`: 16,384 in a layer and in "final", a row in a chunk. */
int64_t qs_base_raw_elems(const qs_base_index *index, int u);

int64_t qs_base_tensor_count(const qs_base_tensor *tensor);

/** The JSON of a complete index; the caller frees *text. `small` hashes and offsets must be set. */
qs_status qs_base_index_text(const qs_base_index *index, char **text);

/** Parse the JSON and check it against the config in it. Pure: no I/O; maps and places in the file
 * are not set, and the rows of maps that tensors name are not checked. */
qs_status qs_base_index_parse(qs_base_index **out, const char *text, size_t bytes,
                              const char *path);

/** One dataset of a unit: its suffix, shape and where the unit keeps its place. */
typedef struct {
    const char *suffix;
    qs_h5_info info;
    int64_t *place;
} qs_base_dataset;
enum { QS_BASE_DATASETS = 6 };

/** The datasets of a unit, empty ones included (dims[0] = 0); `hash` is the last, `small` the one
 * before. */
void qs_base_unit_datasets(qs_base_unit *unit, qs_base_dataset out[QS_BASE_DATASETS]);

/** The text of the index, `bytes` long and a NUL behind it; the caller frees *text, also after a
 * failure. */
qs_status qs_base_read_index_text(qs_h5 *file, char **text, size_t *bytes);

/** Read and verify the index of a file, on the calling process alone. */
qs_status qs_base_open_local(qs_base_index **out, const char *path);

/** The same, with the text of the index for other ranks; the caller frees *text. */
qs_status qs_base_open_with_text(qs_base_index **out, char **text, const char *path);

/** Compare the data of unit `u` in the file with their hashes; number n_units is "final". Not
 * collective. */
qs_status qs_base_verify_unit(const qs_base_index *index, int fd, int u);

/** XXH3-64 of the index's text and the maps behind it: attribute index_xxh3 of the file. */
uint64_t qs_base_index_hash(const qs_base_index *index, const char *text, size_t bytes);

/** XXH3-64 of NF4 quantum `i` within sections that start at the given pointers. */
uint64_t qs_base_nf4_hash(const qs_unit_size *size, const uint8_t *packed, const uint8_t *absmax8,
                          const uint8_t *absmax32, int64_t i);

#endif
