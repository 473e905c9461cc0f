/* The checkpoint protocol on a dummy state, and two other ways of writing, for the sweep of I/O
 * faults.
 *
 *     case_save_dummy save DIR STEP BYTES KEEP   two files and a manifest as DIR/step-N; KEEP > 0:
 * keep that many case_save_dummy file PATH SEED             one file by qs_io_write_file
 *     case_save_dummy h5 PATH SEED               one HDF5 file on disk
 *
 * Leaves with the exit code of its status, one error line on stderr. What is written depends on
 * STEP or SEED alone: tests/test_io_faults.c knows it as well. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/log.h"
#include "base/status.h"
#include "store/h5.h"
#include "store/io.h"
#include "store/manifest.h"

enum { KEPT = 64, PATH_BYTES = 4096, H5_COUNT = 5000, FILE_BYTES = 300000 };

static char *content(int64_t seed, size_t bytes)
{
    char *data = malloc(bytes + 1);
    for (size_t i = 0; data != NULL && i < bytes; i++) {
        data[i] = (char)((uint64_t)seed * 131 + i * 7 + i / 251);
    }
    return data;
}

static qs_status write_state(const char *temp, int64_t step, size_t bytes,
                             qs_manifest_file files[2])
{
    qs_status st = QS_OK;
    char *data = content(step, bytes);
    for (int i = 0; st == QS_OK && i < 2; i++) {
        char path[PATH_BYTES + 32];
        char name[32];
        (void)snprintf(name, sizeof name, "rank-%05d.h5", i);
        (void)snprintf(path, sizeof path, "%s/%s", temp, name);
        st = qs_io_write_new(path, data, bytes);
        st = st != QS_OK ? st : qs_manifest_hash_file(temp, name, &files[i]);
    }
    free(data);
    return st;
}

static qs_status fill_and_publish(const char *dir, const char *temp, const char *final,
                                  int64_t step, size_t bytes)
{
    qs_manifest_file files[2];
    qs_manifest m = {.step = step, .nranks = 2, .n_files = 2, .files = files};
    strcpy(m.run_id, "dummy");
    QS_TRY(write_state(temp, step, bytes, files));
    QS_TRY(qs_manifest_write(temp, &m));
    QS_TRY(qs_io_fsync_dir(temp));
    QS_TRY(qs_io_rename(temp, final));
    return qs_io_fsync_dir(dir);
}

/** Remove all but the newest `keep`; only called once a newer one is safe. */
static void rotate(const char *dir, int keep)
{
    int64_t steps[KEPT];
    int count = 0;
    char path[PATH_BYTES];
    if (qs_manifest_list(dir, steps, KEPT, &count) != QS_OK) {
        return;
    }
    for (int i = keep; i < count; i++) {
        qs_manifest_step_dir(path, sizeof path, dir, steps[i]);
        if (qs_manifest_remove_dir(path) != QS_OK) { /* the new one is safe all the same */
            qs_log_warn("%s", qs_error_text());
            qs_error_clear();
        }
    }
}

static qs_status save(const char *dir, int64_t step, size_t bytes, int keep)
{
    char temp[PATH_BYTES];
    char final[PATH_BYTES];
    qs_manifest there = {0};
    qs_manifest_step_dir(final, sizeof final, dir, step);
    (void)snprintf(temp, sizeof temp, "%s/step-%08lld.tmp-x", dir, (long long)step);
    if (qs_manifest_verify(final, &there) == QS_OK) { /* killed after the rename, asked again */
        qs_manifest_free(&there);
        return QS_OK;
    }
    qs_error_clear();
    QS_TRY(qs_manifest_remove_dir(temp)); /* of a killed process */
    qs_status st = qs_io_mkdir(temp);
    st = st != QS_OK ? st : fill_and_publish(dir, temp, final, step, bytes);
    if (st != QS_OK) {
        (void)qs_manifest_remove_dir(temp);
        return st;
    }
    if (keep > 0) {
        rotate(dir, keep);
    }
    return QS_OK;
}

static qs_status write_file(const char *path, int64_t seed)
{
    char *data = content(seed, FILE_BYTES);
    qs_status st = qs_io_write_file(path, data, FILE_BYTES);
    free(data);
    return st;
}

static qs_status write_h5(const char *path, int64_t seed)
{
    qs_h5 *file = NULL;
    qs_h5_info filled = {.dtype = QS_U8, .rank = 1, .dims = {H5_COUNT}};
    qs_h5_info room = {.dtype = QS_F32, .rank = 2, .dims = {100, 64}};
    char *data = content(seed, H5_COUNT);
    qs_status st = qs_h5_create(&file, path);
    st = st != QS_OK ? st : qs_h5_attr_put_i64(file, "seed", seed);
    st = st != QS_OK ? st : qs_h5_attr_put_text(file, "format", "dummy");
    st = st != QS_OK ? st : qs_h5_dataset_put(file, "a/filled", &filled, data);
    st = st != QS_OK ? st : qs_h5_dataset_create(file, "a/room", &room);
    qs_status closed = qs_h5_close(file);
    free(data);
    return st != QS_OK ? st : closed;
}

int main(int argc, char **argv)
{
    qs_status st = QS_ERR_USAGE;
    if (argc == 6 && strcmp(argv[1], "save") == 0) {
        st = save(argv[2], atoll(argv[3]), (size_t)atoll(argv[4]), atoi(argv[5]));
    } else if (argc == 4 && strcmp(argv[1], "file") == 0) {
        st = write_file(argv[2], atoll(argv[3]));
    } else if (argc == 4 && strcmp(argv[1], "h5") == 0) {
        st = write_h5(argv[2], atoll(argv[3]));
    }
    if (st != QS_OK) {
        qs_error_print(st);
    }
    return qs_exit_code(st);
}
