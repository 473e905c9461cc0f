/* What the files of the data module share. */
#ifndef QS_DATA_DATA_IMPL_H
#define QS_DATA_DATA_IMPL_H

#include "data/data.h"
#include "store/h5.h"

enum {
    QS_DATA_VERSION = 1,
    QS_DATA_IGNORED = -100,
    QS_DATA_MAX_VOCAB = 1 << 22,
    QS_DATA_MAX_SEQ_LEN = 1 << 24,
};
#define QS_DATA_FORMAT "qshard-data"

/** Read and check the index of an open file into `data`, whose path is set. Not collective. */
qs_status qs_data_read_index(qs_data *data, qs_h5 *file);

/** Check vocabulary and lengths against a model and a limit; 0: none. */
qs_status qs_data_check_fit(const qs_data *data, int64_t model_vocab, int64_t max_seq_len);

/** Open the file's descriptor, through which sequences are read. */
qs_status qs_data_open_bytes(qs_data *data);

/** Open and check on this process alone, for the commands that look at a file. */
qs_status qs_data_open_alone(qs_data **out, const char *path);

#endif
