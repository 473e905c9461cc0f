/* HDF5 files of ours: what is put in comes out, and what is not ours is refused with a reason. */
#include <criterion/criterion.h>
#include <fcntl.h>
#include <hdf5.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/status.h"
#include "store/h5.h"
#include "store/io.h"
#include "tests/scratch.h"

static char dir[SCRATCH_MAX];
static char path[128];

/** In memory where that is possible: thousands of fsyncs. */
static void make_dir(void)
{
    scratch_make(dir, scratch_in_memory());
    (void)snprintf(path, sizeof path, "%s/f.h5", dir);
}

static void remove_dir(void)
{
    scratch_remove(dir);
}

#define CR_OK(expr) cr_assert_eq((expr), QS_OK, "%s", qs_error_text())

static int32_t numbers[1000];

/** A file with an attribute of each kind and datasets of each type. */
static void fill(qs_h5 *file, qs_h5_info *large)
{
    qs_h5_info ints = {.dtype = QS_I32, .rank = 1, .dims = {1000}};
    qs_h5_info floats = {.dtype = QS_F32, .rank = 2, .dims = {2, 3}};
    qs_h5_info none = {.dtype = QS_U8, .rank = 1, .dims = {0}};
    const float six[6] = {1, 2, 3, 4, 5, 6};
    for (int i = 0; i < 1000; i++) {
        numbers[i] = i * i - 77;
    }
    *large = (qs_h5_info){.dtype = QS_U8, .rank = 2, .dims = {3, 8192}};
    CR_OK(qs_h5_attr_put_text(file, "format", "qshard-test"));
    CR_OK(qs_h5_attr_put_i64(file, "format_version", 3));
    CR_OK(qs_h5_attr_put_text(file, "nothing", ""));
    CR_OK(qs_h5_attr_put_i64(file, "least", INT64_MIN));
    CR_OK(qs_h5_dataset_put(file, "numbers", &ints, numbers));
    CR_OK(qs_h5_dataset_put(file, "/units/layers.0/floats", &floats, six));
    CR_OK(qs_h5_dataset_create(file, "/units/layers.0/large", large));
    CR_OK(qs_h5_dataset_put(file, "/units/layers.1/none", &none, NULL));
    cr_assert_eq(none.file_offset, -1);
    cr_assert_geq(large->file_offset, 0);
}

static void expect_filled(const char *name)
{
    qs_h5 *file = NULL;
    char text[32];
    int64_t value = 0;
    int32_t some[10];
    float floats[4];
    qs_h5_info ints = {.dtype = QS_I32, .rank = 1, .dims = {-1}};
    qs_h5_info two = {.dtype = QS_F32, .rank = 2, .dims = {2, -1}};
    qs_h5_info none = {.dtype = QS_U8, .rank = 1, .dims = {-1}};
    CR_OK(qs_h5_open(&file, name));
    cr_assert_str_eq(qs_h5_path(file), name);
    CR_OK(qs_h5_expect_format(file, "qshard-test", 3));
    CR_OK(qs_h5_attr_get_text(file, "nothing", text, sizeof text));
    cr_assert_str_eq(text, "");
    CR_OK(qs_h5_attr_get_i64(file, "least", &value));
    cr_assert_eq(value, INT64_MIN);
    CR_OK(qs_h5_dataset_find(file, "numbers", &ints));
    cr_assert_eq(ints.dims[0], 1000);
    CR_OK(qs_h5_dataset_get(file, "numbers", &ints, 990, 10, some));
    cr_assert_arr_eq(some, numbers + 990, sizeof some);
    CR_OK(qs_h5_dataset_find(file, "/units/layers.0/floats", &two));
    cr_assert_eq(two.dims[1], 3);
    CR_OK(qs_h5_dataset_get(file, "/units/layers.0/floats", &two, 2, 4, floats));
    cr_assert_float_eq(floats[0], 3.0f, 0.0f);
    cr_assert_float_eq(floats[3], 6.0f, 0.0f);
    CR_OK(qs_h5_dataset_find(file, "units/layers.1/none", &none));
    cr_assert_eq(none.dims[0], 0);
    cr_assert_eq(none.file_offset, -1);
    cr_assert_eq(qs_h5_dataset_get(file, "numbers", &ints, 995, 6, some), QS_ERR_BUG);
    qs_error_clear();
    CR_OK(qs_h5_close(file));
}

TestSuite(h5, .init = make_dir, .fini = remove_dir);

Test(h5, a_file_on_disk_round_trips_and_takes_bytes_at_its_offsets)
{
    qs_h5 *file = NULL;
    qs_h5_info large;
    qs_h5_info found = {.dtype = QS_U8, .rank = 2, .dims = {3, 8192}};
    static unsigned char bytes[3 * 8192];
    static unsigned char back[3 * 8192];
    memset(bytes, 0xa5, sizeof bytes);
    CR_OK(qs_h5_create(&file, path));
    fill(file, &large);
    CR_OK(qs_h5_close(file));
    cr_assert_eq(large.file_offset % 4096, 0, "aligned for direct reads");
    int fd = open(path, O_RDWR);
    CR_OK(qs_io_write_all(fd, bytes, sizeof bytes, large.file_offset, path));
    close(fd);
    expect_filled(path);
    CR_OK(qs_h5_open(&file, path));
    CR_OK(qs_h5_dataset_find(file, "units/layers.0/large", &found));
    cr_assert_eq(found.file_offset, large.file_offset);
    CR_OK(qs_h5_dataset_get(file, "units/layers.0/large", &found, 0, 3 * 8192, back));
    cr_assert_arr_eq(back, bytes, sizeof bytes);
    CR_OK(qs_h5_close(file));
}

Test(h5, an_image_is_a_file_and_equal_content_gives_equal_bytes)
{
    void *image[2];
    size_t bytes[2];
    for (int i = 0; i < 2; i++) {
        qs_h5 *file = NULL;
        qs_h5_info large;
        CR_OK(qs_h5_create(&file, NULL));
        fill(file, &large);
        CR_OK(qs_h5_close_image(file, &image[i], &bytes[i]));
        memset((char *)image[i] + large.file_offset, 0, sizeof(unsigned char[3 * 8192]));
        usleep(i == 0 ? 1100000 : 0); /* times in the file would differ by now */
    }
    cr_assert_eq(bytes[0], bytes[1]);
    cr_assert_arr_eq(image[0], image[1], bytes[0]);
    CR_OK(qs_io_write_file(path, image[0], bytes[0]));
    expect_filled(path);
    free(image[0]);
    free(image[1]);
}

Test(h5, images_grow_past_their_step_and_many_groups_are_found)
{
    enum { UNITS = 200 };
    qs_h5 *file = NULL;
    void *image = NULL;
    size_t bytes = 0;
    char name[64];
    static unsigned char row[20000];
    static unsigned char back[20000];
    qs_h5_info info = {.dtype = QS_U8, .rank = 1, .dims = {20000}};
    CR_OK(qs_h5_create(&file, NULL));
    for (int i = 0; i < UNITS; i++) {
        (void)snprintf(name, sizeof name, "/units/layers.%d/packed", i);
        memset(row, i, sizeof row);
        CR_OK(qs_h5_dataset_put(file, name, &info, row));
    }
    CR_OK(qs_h5_close_image(file, &image, &bytes));
    cr_assert_gt(bytes, (size_t)UNITS * sizeof row);
    CR_OK(qs_io_write_file(path, image, bytes));
    free(image);
    CR_OK(qs_h5_open(&file, path));
    for (int i = UNITS - 1; i >= 0; i--) {
        (void)snprintf(name, sizeof name, "units/layers.%d/packed", i);
        CR_OK(qs_h5_dataset_find(file, name, &info));
        CR_OK(qs_h5_dataset_get(file, name, &info, 0, 20000, back));
        cr_assert_eq(back[0], i);
        cr_assert_eq(back[19999], i);
    }
    CR_OK(qs_h5_close(file));
}

Test(h5, existing_files_are_not_taken)
{
    qs_h5 *file = NULL;
    CR_OK(qs_io_write_file(path, "mine", 4));
    cr_assert_eq(qs_h5_create(&file, path), QS_ERR_OUTPUT_TAKEN);
    cr_assert_null(file);
    struct stat info;
    cr_assert_eq(stat(path, &info), 0);
    cr_assert_eq(info.st_size, 4);
}

static void expect_open(qs_status status, const char *words)
{
    qs_h5 *file = NULL;
    cr_assert_eq(qs_h5_open(&file, path), status, "%s", words);
    cr_assert_null(file);
    cr_assert_not_null(strstr(qs_error_text(), words), "%s", qs_error_text());
    cr_assert_not_null(strstr(qs_error_text(), "f.h5"));
    cr_assert_null(strchr(qs_error_text(), '\n'));
    qs_error_clear();
}

Test(h5, missing_empty_short_and_garbled_files_are_refused)
{
    qs_h5 *file = NULL;
    qs_h5_info large;
    void *data = NULL;
    size_t bytes = 0;
    expect_open(QS_ERR_INPUT_MISSING, "No such file");
    CR_OK(qs_io_write_file(path, "", 0));
    expect_open(QS_ERR_INPUT_FORMAT, "is empty");
    CR_OK(qs_io_write_file(path, "no HDF5 at all", 14));
    expect_open(QS_ERR_INPUT_FORMAT, "is no HDF5 file; qshard quantize makes");
    CR_OK(qs_io_write_file(path, "\x89HDF\r\n\x1a\nand no more", 19));
    expect_open(QS_ERR_INPUT_FORMAT, "opening as HDF5");
    CR_OK(qs_h5_create(&file, NULL));
    fill(file, &large);
    CR_OK(qs_h5_close_image(file, &data, &bytes));
    CR_OK(qs_io_write_file(path, data, bytes - 1));
    expect_open(QS_ERR_INPUT_FORMAT, "truncated");
    ((char *)data)[20] ^= 1;
    CR_OK(qs_io_write_file(path, data, bytes));
    expect_open(QS_ERR_INPUT_FORMAT, "checksum");
    free(data);
    cr_assert_eq(unlink(path), 0);
    cr_assert_eq(mkdir(path, 0777), 0);
    expect_open(QS_ERR_INPUT_FORMAT, "is a folder; qshard quantize makes");
}

Test(h5, wrong_attributes_are_refused_by_name)
{
    qs_h5 *file = NULL;
    qs_h5_info large;
    int64_t value = 0;
    char text[4];
    CR_OK(qs_h5_create(&file, path));
    fill(file, &large);
    CR_OK(qs_h5_close(file));
    CR_OK(qs_h5_open(&file, path));
    cr_assert_eq(qs_h5_attr_get_i64(file, "absent", &value), QS_ERR_INPUT_FORMAT);
    cr_assert_not_null(strstr(qs_error_text(), "\"absent\" is missing"));
    qs_error_clear();
    cr_assert_eq(qs_h5_attr_get_i64(file, "format", &value), QS_ERR_INPUT_FORMAT);
    qs_error_clear();
    cr_assert_eq(qs_h5_attr_get_text(file, "least", text, sizeof text), QS_ERR_INPUT_FORMAT);
    qs_error_clear();
    cr_assert_eq(qs_h5_attr_get_text(file, "format", text, sizeof text), QS_ERR_INPUT_FORMAT);
    qs_error_clear();
    cr_assert_eq(qs_h5_expect_format(file, "qshard-data", 3), QS_ERR_INPUT_FORMAT);
    qs_error_clear();
    cr_assert_eq(qs_h5_expect_format(file, "qshard-test", 4), QS_ERR_INPUT_UNKNOWN);
    cr_assert_not_null(strstr(qs_error_text(), "format_version=3"));
    qs_error_clear();
    CR_OK(qs_h5_close(file));
}

static void expect_find(const char *name, qs_h5_info want, const char *words)
{
    qs_h5 *file = NULL;
    CR_OK(qs_h5_open(&file, path));
    cr_assert_eq(qs_h5_dataset_find(file, name, &want), QS_ERR_INPUT_FORMAT, "%s", name);
    cr_assert_not_null(strstr(qs_error_text(), words), "%s", qs_error_text());
    cr_assert_not_null(strstr(qs_error_text(), "f.h5"));
    qs_error_clear();
    CR_OK(qs_h5_close(file));
}

Test(h5, wrong_datasets_are_refused_by_name)
{
    qs_h5 *file = NULL;
    qs_h5_info large;
    CR_OK(qs_h5_create(&file, path));
    fill(file, &large);
    CR_OK(qs_h5_close(file));
    expect_find("absent", (qs_h5_info){QS_I32, 1, {-1}, 0}, "\"absent\" is missing");
    expect_find("units/layers.7/x", (qs_h5_info){QS_I32, 1, {-1}, 0}, "is missing");
    expect_find("units", (qs_h5_info){QS_I32, 1, {-1}, 0}, "opening dataset");
    expect_find("numbers/x", (qs_h5_info){QS_I32, 1, {-1}, 0}, "numbers/x");
    expect_find("numbers", (qs_h5_info){QS_I64, 1, {-1}, 0}, "of the type i64");
    expect_find("numbers", (qs_h5_info){QS_F32, 1, {-1}, 0}, "of the type f32");
    expect_find("numbers", (qs_h5_info){QS_I32, 2, {-1, -1}, 0}, "two-dimensional");
    expect_find("numbers", (qs_h5_info){QS_I32, 1, {999}, 0}, "dimension 0 is 1000, not 999");
}

/** Datasets that HDF5 can make and that we do not read. */
static void write_foreign(void)
{
    const hsize_t dims[1] = {64};
    const hsize_t unlimited[1] = {H5S_UNLIMITED};
    hid_t file = H5Fcreate(path, H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
    hid_t space = H5Screate_simple(1, dims, NULL);
    hid_t growing = H5Screate_simple(1, dims, unlimited);
    hid_t scalar = H5Screate(H5S_SCALAR);
    hid_t chunked = H5Pcreate(H5P_DATASET_CREATE);
    H5Pset_chunk(chunked, 1, dims);
    hid_t external = H5Pcreate(H5P_DATASET_CREATE);
    H5Pset_external(external, "/etc/passwd", 0, 256);
    hid_t compact = H5Pcreate(H5P_DATASET_CREATE);
    H5Pset_layout(compact, H5D_COMPACT);
    hid_t virtual = H5Pcreate(H5P_DATASET_CREATE);
    H5Pset_virtual(virtual, space, "other.h5", "x", space);
    H5Dclose(
        H5Dcreate2(file, "plain", H5T_STD_U32LE, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
    H5Dclose(H5Dcreate2(file, "big", H5T_STD_I32BE, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
    H5Dclose(
        H5Dcreate2(file, "chunked", H5T_STD_I32LE, growing, H5P_DEFAULT, chunked, H5P_DEFAULT));
    H5Dclose(H5Dcreate2(file, "outside", H5T_STD_I32LE, space, H5P_DEFAULT, external, H5P_DEFAULT));
    H5Dclose(H5Dcreate2(file, "compact", H5T_STD_I32LE, space, H5P_DEFAULT, compact, H5P_DEFAULT));
    H5Dclose(H5Dcreate2(file, "virtual", H5T_STD_I32LE, space, H5P_DEFAULT, virtual, H5P_DEFAULT));
    H5Dclose(H5Dcreate2(file, "one", H5T_STD_I32LE, scalar, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT));
    H5Lcreate_soft("plain", file, "soft", H5P_DEFAULT, H5P_DEFAULT);
    H5Lcreate_external("other.h5", "x", file, "far", H5P_DEFAULT, H5P_DEFAULT);
    H5Lcreate_external("other.h5", "/", file, "group", H5P_DEFAULT, H5P_DEFAULT);
    cr_assert_geq(H5Fclose(file), 0);
}

Test(h5, foreign_storage_and_links_are_refused)
{
    write_foreign();
    const qs_h5_info want = {QS_I32, 1, {64}, 0};
    expect_find("plain", want, "do not lie in the file"); /* allocated late: no bytes at all */
    expect_find("big", want, "of the type i32");
    expect_find("chunked", want, "contiguous");
    expect_find("outside", want, "inside the file");
    expect_find("compact", want, "contiguous");
    expect_find("virtual", want, "contiguous");
    expect_find("one", want, "one-dimensional");
    expect_find("soft", want, "link");
    expect_find("far", want, "link");
    expect_find("group/x", want, "link");
}

Test(h5, a_user_block_is_refused)
{
    hid_t fcpl = H5Pcreate(H5P_FILE_CREATE);
    H5Pset_userblock(fcpl, 512);
    cr_assert_geq(H5Fclose(H5Fcreate(path, H5F_ACC_TRUNC, fcpl, H5P_DEFAULT)), 0);
    expect_open(QS_ERR_INPUT_FORMAT, "user block");
}

Test(h5, unsigned_datasets_are_read_as_the_integers_of_their_size)
{
    const hsize_t dims[1] = {2};
    const uint32_t values[2] = {7, 0xfffffff0u};
    int32_t back[2];
    qs_h5 *reader = NULL;
    qs_h5_info info = {.dtype = QS_I32, .rank = 1, .dims = {2}};
    hid_t file = H5Fcreate(path, H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
    hid_t space = H5Screate_simple(1, dims, NULL);
    hid_t dset = H5Dcreate2(file, "u", H5T_STD_U32LE, space, H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT);
    H5Dwrite(dset, H5T_NATIVE_UINT32, H5S_ALL, H5S_ALL, H5P_DEFAULT, values);
    H5Dclose(dset);
    H5Fclose(file);
    CR_OK(qs_h5_open(&reader, path));
    CR_OK(qs_h5_dataset_find(reader, "u", &info));
    CR_OK(qs_h5_dataset_get(reader, "u", &info, 0, 2, back));
    cr_assert_eq(back[0], 7);
    cr_assert_eq((uint32_t)back[1], 0xfffffff0u);
    CR_OK(qs_h5_close(reader));
}

Test(h5, every_flipped_byte_of_the_metadata_is_refused_or_changes_nothing)
{
    qs_h5 *file = NULL;
    void *data = NULL;
    size_t bytes = 0;
    int refused = 0;
    qs_h5_info one = {.dtype = QS_U8, .rank = 1, .dims = {5000}};
    static unsigned char zeros[5000];
    CR_OK(qs_h5_create(&file, NULL));
    CR_OK(qs_h5_attr_put_i64(file, "step", 12345));
    CR_OK(qs_h5_dataset_put(file, "group/x", &one, zeros));
    CR_OK(qs_h5_close_image(file, &data, &bytes));
    for (size_t at = 0; at < bytes; at++) {
        if ((int64_t)at >= one.file_offset && (int64_t)at < one.file_offset + 5000) {
            continue; /* data are the business of the manifest's hashes */
        }
        int64_t step = 0;
        qs_h5_info found = {.dtype = QS_U8, .rank = 1, .dims = {-1}};
        ((unsigned char *)data)[at] ^= 0x10;
        CR_OK(qs_io_write_file(path, data, bytes));
        ((unsigned char *)data)[at] ^= 0x10;
        qs_status st = qs_h5_open(&file, path);
        if (st == QS_OK) {
            qs_status attr = qs_h5_attr_get_i64(file, "step", &step);
            qs_status dset = qs_h5_dataset_find(file, "group/x", &found);
            cr_assert(attr != QS_OK || step == 12345, "byte %zu", at);
            cr_assert(dset != QS_OK ||
                          (found.dims[0] == 5000 && found.file_offset == one.file_offset),
                      "byte %zu", at);
            st = attr != QS_OK ? attr : dset;
            cr_assert_eq(qs_h5_close(file), QS_OK);
        }
        refused += st != QS_OK;
        qs_error_clear();
    }
    cr_assert_gt(refused, 300, "the superblock and the headers of three objects");
    free(data);
}

static void *open_and_close(void *name)
{
    int32_t some[1000];
    for (int i = 0; i < 50; i++) {
        qs_h5 *file = NULL;
        qs_h5_info info = {.dtype = QS_I32, .rank = 1, .dims = {1000}};
        if (qs_h5_open(&file, name) != QS_OK ||
            qs_h5_dataset_find(file, "numbers", &info) != QS_OK ||
            qs_h5_dataset_get(file, "numbers", &info, 0, 1000, some) != QS_OK ||
            memcmp(some, numbers, sizeof some) != 0 || qs_h5_close(file) != QS_OK) {
            return name;
        }
    }
    return NULL;
}

Test(h5, threads_share_the_library)
{
    pthread_t threads[4];
    qs_h5 *file = NULL;
    qs_h5_info large;
    CR_OK(qs_h5_create(&file, path));
    fill(file, &large);
    CR_OK(qs_h5_close(file));
    for (int i = 0; i < 4; i++) {
        cr_assert_eq(pthread_create(&threads[i], NULL, open_and_close, path), 0);
    }
    for (int i = 0; i < 4; i++) {
        void *failed = path;
        pthread_join(threads[i], &failed);
        cr_assert_null(failed);
    }
}

Test(h5, a_full_disk_shows_before_the_data_are_written)
{
    qs_h5 *file = NULL;
    char small[160];
    char name[200];
    (void)snprintf(small, sizeof small, "%s/disk", dir);
    (void)snprintf(name, sizeof name, "%s/f.h5", small);
    cr_assert_eq(mkdir(small, 0777), 0);
    if (mount("tmpfs", small, "tmpfs", 0, "size=1m") != 0) {
        cr_skip_test("a small tmpfs cannot be mounted here");
    }
    qs_h5_info info = {.dtype = QS_U8, .rank = 1, .dims = {2 << 20}};
    qs_status made = qs_h5_create(&file, name);
    qs_status placed = qs_h5_dataset_create(file, "large", &info);
    qs_status closed = qs_h5_close(file);
    umount(small);
    cr_assert_eq(made, QS_OK);
    cr_assert_eq(placed, QS_OK);
    cr_assert_eq(closed, QS_ERR_IO_FULL, "%s", qs_error_text());
}

Test(h5, a_file_that_is_given_up_leaves_the_first_error)
{
    qs_h5 *file = NULL;
    qs_h5_info large;
    CR_OK(qs_h5_create(&file, path));
    fill(file, &large);
    (void)QS_FAIL(QS_ERR_INPUT_VALUE, "what went wrong");
    cr_assert_eq(unlink(path), 0);
    qs_h5_discard(file);
    cr_assert_str_eq(qs_error_text(), "what went wrong");
    qs_h5_discard(NULL);
}

#ifndef __SANITIZE_ADDRESS__ /* which has an allocator of its own */

/* realloc() of the process, by which an image grows. */
static bool refuse_memory;
extern void *__libc_realloc(void *old, size_t bytes);

void *realloc(void *old, size_t bytes)
{
    return refuse_memory && bytes >= 1 << 20 ? NULL : __libc_realloc(old, bytes);
}

/* Not as a failure of the disk, after which a run is told to make room. */
Test(h5, an_image_without_memory_is_told_as_such)
{
    qs_h5 *file = NULL;
    refuse_memory = true;
    const qs_status st = qs_h5_create(&file, NULL);
    refuse_memory = false;
    cr_assert_eq(st, QS_ERR_MEMORY, "%s", qs_error_text());
    CR_OK((qs_error_clear(), qs_h5_create(&file, NULL)));
    qs_h5_discard(file);
}

#endif
