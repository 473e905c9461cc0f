/* Datasets: contiguous, allocated early, without filters, so that each is one range of bytes in the
 * file. */
#include <stdio.h>
#include <string.h>

#include "base/mem.h"
#include "store/h5.h"
#include "store/h5_impl.h"
#include "store/io.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "file bytes are used as they are");

/** The library's type for `dtype`; unsigned or signed for integers of more than a byte. */
static hid_t file_type(qs_dtype dtype, bool is_unsigned)
{
    switch (dtype) {
    case QS_U8:
        return H5T_STD_U8LE;
    case QS_I32:
        return is_unsigned ? H5T_STD_U32LE : H5T_STD_I32LE;
    case QS_I64:
        return is_unsigned ? H5T_STD_U64LE : H5T_STD_I64LE;
    case QS_F32:
        return H5T_IEEE_F32LE;
    case QS_BF16:
    case QS_F16:
        break;
    }
    return H5I_INVALID_HID;
}

/** Bytes of a dataset; QS_ERR_INPUT_FORMAT or QS_ERR_BUG if that is no sensible number. */
static qs_status dataset_bytes(const qs_h5 *file, const char *name, const qs_h5_info *info,
                               size_t *bytes)
{
    size_t second = info->rank == 2 ? (size_t)info->dims[1] : 1;
    bool good = (info->rank == 1 || info->rank == 2) && info->dims[0] >= 0 &&
                (info->rank == 1 || info->dims[1] >= 0);
    good = good && qs_size_mul_add((size_t)info->dims[0], second, 0, bytes) &&
           qs_size_mul_add(*bytes, qs_dtype_bytes(info->dtype), 0, bytes) && *bytes <= INT64_MAX;
    return good ? QS_OK
                : QS_FAIL(file->writing ? QS_ERR_BUG : QS_ERR_INPUT_FORMAT,
                          "%s: dataset \"%s\" has a shape that cannot be", file->path, name);
}

/** Visit the prefixes of "a/b/c": "a", "a/b", "a/b/c". False at the end. */
static bool next_prefix(const char *name, char prefix[QS_H5_NAME])
{
    size_t length = strlen(prefix);
    if (name[length] == '\0' || strlen(name) >= QS_H5_NAME) {
        return false;
    }
    const char *slash = strchr(name + length + 1, '/');
    length = slash != NULL ? (size_t)(slash - name) : strlen(name);
    memcpy(prefix, name, length);
    prefix[length] = '\0';
    return true;
}

static qs_status make_groups(qs_h5 *file, const char *name)
{
    char prefix[QS_H5_NAME] = "";
    qs_status st = QS_OK;
    while (st == QS_OK && next_prefix(name, prefix) && strcmp(prefix, name) != 0) {
        htri_t exists = H5Lexists(file->id, prefix, H5P_DEFAULT);
        st = qs_h5_check(file, exists, "looking for group", prefix);
        if (st != QS_OK || exists > 0) {
            continue;
        }
        hid_t group = H5I_INVALID_HID;
        hid_t gcpl = H5Pcreate(H5P_GROUP_CREATE);
        if (gcpl >= 0 && H5Pset_obj_track_times(gcpl, false) >= 0) {
            group = H5Gcreate2(file->id, prefix, H5P_DEFAULT, gcpl, H5P_DEFAULT);
        }
        st = qs_h5_check(file, group, "creating group", prefix);
        st = qs_h5_closed(file, st, group >= 0 ? H5Gclose(group) : 0, prefix);
        st = qs_h5_closed(file, st, gcpl >= 0 ? H5Pclose(gcpl) : 0, prefix);
    }
    return st;
}

/** Contiguous, allocated at once, never filled by HDF5, without times. */
static hid_t contiguous_plist(void)
{
    hid_t dcpl = H5Pcreate(H5P_DATASET_CREATE);
    if (dcpl >= 0 && (H5Pset_layout(dcpl, H5D_CONTIGUOUS) < 0 ||
                      H5Pset_alloc_time(dcpl, H5D_ALLOC_TIME_EARLY) < 0 ||
                      H5Pset_fill_time(dcpl, H5D_FILL_TIME_NEVER) < 0 ||
                      H5Pset_obj_track_times(dcpl, false) < 0)) {
        H5Pclose(dcpl);
        dcpl = H5I_INVALID_HID;
    }
    return dcpl;
}

/** Create a dataset; with `data` and a file in memory, fill it as well. */
static qs_status create_dataset_locked(qs_h5 *file, const char *name, qs_h5_info *info,
                                       const void *data)
{
    qs_status st = QS_OK;
    hid_t space = H5I_INVALID_HID;
    hid_t dcpl = H5I_INVALID_HID;
    hid_t dset = H5I_INVALID_HID;
    hid_t type = file_type(info->dtype, false);
    hsize_t dims[2] = {(hsize_t)info->dims[0], (hsize_t)info->dims[1]};
    QS_GOTO(make_groups(file, name));
    space = H5Screate_simple(info->rank, dims, NULL);
    QS_GOTO(qs_h5_check(file, space, "creating dataset", name));
    dcpl = contiguous_plist();
    QS_GOTO(qs_h5_check(file, dcpl, "creating dataset", name));
    dset = H5Dcreate2(file->id, name, type, space, H5P_DEFAULT, dcpl, H5P_DEFAULT);
    QS_GOTO(qs_h5_check(file, dset, "creating dataset", name));
    haddr_t offset = H5Dget_offset(dset);
    info->file_offset = offset == HADDR_UNDEF ? -1 : (int64_t)offset;
    if (data != NULL && info->file_offset >= 0 && file->fd < 0) {
        QS_GOTO(qs_h5_check(file, H5Dwrite(dset, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, data),
                            "writing dataset", name));
    }
done:
    st = qs_h5_closed(file, st, dset >= 0 ? H5Dclose(dset) : 0, name);
    st = qs_h5_closed(file, st, dcpl >= 0 ? H5Pclose(dcpl) : 0, name);
    return qs_h5_closed(file, st, space >= 0 ? H5Sclose(space) : 0, name);
}

static qs_status create_dataset(qs_h5 *file, const char *name, qs_h5_info *info, const void *data)
{
    size_t bytes = 0;
    qs_h5_record *r = NULL;
    name += name[0] == '/';
    if (!file->writing || strlen(name) >= QS_H5_NAME || file_type(info->dtype, false) < 0) {
        return QS_FAIL(QS_ERR_BUG, "%s: dataset \"%s\" of type %s cannot be created", file->path,
                       name, qs_dtype_name(info->dtype));
    }
    QS_TRY(dataset_bytes(file, name, info, &bytes));
    qs_h5_lock();
    qs_status st = create_dataset_locked(file, name, info, data);
    qs_h5_unlock();
    QS_TRY(st);
    if (bytes > 0 && info->file_offset < 0) {
        return QS_FAIL(QS_ERR_IO, "%s: dataset \"%s\" got no place in the file", file->path, name);
    }
    QS_TRY(qs_h5_remember(file, QS_H5_RECORD_DATASET, name, &r));
    r->info = *info;
    if (data != NULL) {
        r->filled = true;
        qs_xxh3_128_hex(data, bytes, r->hash);
    }
    if (data != NULL && bytes > 0 && file->fd >= 0) {
        QS_TRY(qs_io_write_all(file->fd, data, bytes, info->file_offset, file->path));
    }
    return QS_OK;
}

qs_status qs_h5_dataset_create(qs_h5 *file, const char *name, qs_h5_info *info)
{
    return create_dataset(file, name, info, NULL);
}

qs_status qs_h5_dataset_put(qs_h5 *file, const char *name, qs_h5_info *info, const void *data)
{
    return create_dataset(file, name, info, data != NULL ? data : "");
}

/** Every link on the way must exist and lie in this file: no soft, external or user-defined ones.
 */
static qs_status check_links(qs_h5 *file, const char *name)
{
    char prefix[QS_H5_NAME] = "";
    while (next_prefix(name, prefix)) {
        H5L_info_t info;
        htri_t exists = H5Lexists(file->id, prefix, H5P_DEFAULT);
        QS_TRY(qs_h5_check(file, exists, "looking for", prefix));
        if (exists == 0) {
            return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: dataset \"%s\" is missing", file->path, name);
        }
        QS_TRY(qs_h5_check(file, H5Lget_info(file->id, prefix, &info, H5P_DEFAULT), "looking at",
                           prefix));
        if (info.type != H5L_TYPE_HARD) {
            return QS_FAIL(QS_ERR_INPUT_FORMAT,
                           "%s: \"%s\" is a soft or external link; these are not followed",
                           file->path, prefix);
        }
    }
    return QS_OK;
}

static qs_status dataset_wrong(const qs_h5 *file, const char *name, const char *wanted)
{
    return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: dataset \"%s\" is not %s", file->path, name, wanted);
}

typedef struct {
    hid_t dset, type, space, dcpl;
} dataset_ids;

/** The checks of an open dataset that need the library. */
static qs_status inspect_dataset(qs_h5 *file, const char *name, dataset_ids *ids, qs_h5_info *info)
{
    hsize_t dims[2] = {0, 0};
    ids->type = H5Dget_type(ids->dset);
    QS_TRY(qs_h5_check(file, ids->type, "reading the type of", name));
    ids->space = H5Dget_space(ids->dset);
    QS_TRY(qs_h5_check(file, ids->space, "reading the shape of", name));
    ids->dcpl = H5Dget_create_plist(ids->dset);
    QS_TRY(qs_h5_check(file, ids->dcpl, "reading the properties of", name));
    if (H5Pget_layout(ids->dcpl) != H5D_CONTIGUOUS || H5Pget_nfilters(ids->dcpl) != 0 ||
        H5Pget_external_count(ids->dcpl) != 0) {
        return dataset_wrong(file, name, "contiguous, without filters and inside the file");
    }
    if (H5Tequal(ids->type, file_type(info->dtype, false)) <= 0 &&
        H5Tequal(ids->type, file_type(info->dtype, true)) <= 0) {
        char wanted[48];
        (void)snprintf(wanted, sizeof wanted, "of the type %s", qs_dtype_name(info->dtype));
        return dataset_wrong(file, name, wanted);
    }
    if (H5Sget_simple_extent_type(ids->space) == H5S_SCALAR ||
        H5Sget_simple_extent_ndims(ids->space) != info->rank) {
        return dataset_wrong(file, name, info->rank == 1 ? "one-dimensional" : "two-dimensional");
    }
    QS_TRY(qs_h5_check(file, H5Sget_simple_extent_dims(ids->space, dims, NULL),
                       "reading the shape of", name));
    for (int i = 0; i < info->rank; i++) {
        if (dims[i] > INT64_MAX || (info->dims[i] >= 0 && dims[i] != (hsize_t)info->dims[i])) {
            return QS_FAIL(QS_ERR_INPUT_FORMAT,
                           "%s: dataset \"%s\": dimension %d is %llu, not %lld", file->path, name,
                           i, (unsigned long long)dims[i], (long long)info->dims[i]);
        }
        info->dims[i] = (int64_t)dims[i];
    }
    haddr_t offset = H5Dget_offset(ids->dset);
    info->file_offset = offset == HADDR_UNDEF || offset > INT64_MAX ? -1 : (int64_t)offset;
    return QS_OK;
}

/** The bytes must lie inside the file. */
static qs_status check_range(const qs_h5 *file, const char *name, qs_h5_info *info)
{
    size_t bytes = 0;
    QS_TRY(dataset_bytes(file, name, info, &bytes));
    if (bytes == 0) {
        info->file_offset = -1;
        return QS_OK;
    }
    if (info->file_offset < 0 || info->file_offset > file->file_bytes ||
        (int64_t)bytes > file->file_bytes - info->file_offset) {
        return QS_FAIL(
            QS_ERR_INPUT_FORMAT,
            "%s: dataset \"%s\": its %zu bytes from %lld do not lie in the file of %lld bytes; "
            "it was cut off, copy it again",
            file->path, name, bytes, (long long)info->file_offset, (long long)file->file_bytes);
    }
    return QS_OK;
}

qs_status qs_h5_dataset_find(qs_h5 *file, const char *name, qs_h5_info *want)
{
    name += name[0] == '/';
    if (file->writing || strlen(name) >= QS_H5_NAME || file_type(want->dtype, false) < 0 ||
        want->rank < 1 || want->rank > 2) {
        return QS_FAIL(QS_ERR_BUG, "%s: dataset \"%s\" of type %s cannot be looked up", file->path,
                       name, qs_dtype_name(want->dtype));
    }
    dataset_ids ids = {H5I_INVALID_HID, H5I_INVALID_HID, H5I_INVALID_HID, H5I_INVALID_HID};
    qs_h5_lock();
    qs_status st = check_links(file, name);
    if (st == QS_OK) {
        ids.dset = H5Dopen2(file->id, name, H5P_DEFAULT);
        st = qs_h5_check(file, ids.dset, "opening dataset", name);
    }
    if (st == QS_OK) {
        st = inspect_dataset(file, name, &ids, want);
    }
    st = qs_h5_closed(file, st, ids.dcpl >= 0 ? H5Pclose(ids.dcpl) : 0, name);
    st = qs_h5_closed(file, st, ids.space >= 0 ? H5Sclose(ids.space) : 0, name);
    st = qs_h5_closed(file, st, ids.type >= 0 ? H5Tclose(ids.type) : 0, name);
    st = qs_h5_closed(file, st, ids.dset >= 0 ? H5Dclose(ids.dset) : 0, name);
    qs_h5_unlock();
    QS_TRY(st);
    return check_range(file, name, want);
}

qs_status qs_h5_dataset_get(qs_h5 *file, const char *name, const qs_h5_info *info, int64_t first,
                            int64_t count, void *data)
{
    int64_t total = info->dims[0] * (info->rank == 2 ? info->dims[1] : 1);
    if (file->writing || first < 0 || count < 0 || first > total || count > total - first) {
        return QS_FAIL(QS_ERR_BUG,
                       "%s: dataset \"%s\": elements %lld + %lld of %lld cannot be read",
                       file->path, name, (long long)first, (long long)count, (long long)total);
    }
    int64_t size = (int64_t)qs_dtype_bytes(info->dtype);
    return count == 0 ? QS_OK
                      : qs_io_read_all(file->fd, data, (size_t)(count * size),
                                       info->file_offset + first * size, file->path);
}
