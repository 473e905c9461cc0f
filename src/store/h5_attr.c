/* Attributes of the root: scalars of two types, 64-bit integers and strings of fixed length. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "store/h5.h"
#include "store/h5_impl.h"

enum { QS_H5_TEXT = 1 << 20 }; /* longest text attribute */

static qs_status attr_put_locked(qs_h5 *file, const char *name, hid_t type, const void *value)
{
    qs_status st = QS_OK;
    hid_t attr = H5I_INVALID_HID;
    hid_t space = H5Screate(H5S_SCALAR);
    QS_GOTO(qs_h5_check(file, space, "creating attribute", name));
    attr = H5Acreate2(file->id, name, type, space, H5P_DEFAULT, H5P_DEFAULT);
    QS_GOTO(qs_h5_check(file, attr, "creating attribute", name));
    QS_GOTO(qs_h5_check(file, H5Awrite(attr, type, value), "writing attribute", name));
done:
    st = qs_h5_closed(file, st, attr >= 0 ? H5Aclose(attr) : 0, name);
    return qs_h5_closed(file, st, space >= 0 ? H5Sclose(space) : 0, name);
}

qs_status qs_h5_attr_put_i64(qs_h5 *file, const char *name, int64_t value)
{
    qs_h5_record *r = NULL;
    QS_TRY(qs_h5_remember(file, QS_H5_RECORD_I64, name, &r));
    r->value = value;
    qs_h5_lock();
    qs_status st = attr_put_locked(file, name, H5T_STD_I64LE, &value);
    qs_h5_unlock();
    return st;
}

/** A string type of `bytes` bytes, NUL-padded UTF-8. */
static hid_t text_type(size_t bytes)
{
    hid_t type = H5Tcopy(H5T_C_S1);
    if (type >= 0 && (H5Tset_size(type, bytes) < 0 || H5Tset_strpad(type, H5T_STR_NULLPAD) < 0 ||
                      H5Tset_cset(type, H5T_CSET_UTF8) < 0)) {
        H5Tclose(type);
        type = H5I_INVALID_HID;
    }
    return type;
}

qs_status qs_h5_attr_put_text(qs_h5 *file, const char *name, const char *text)
{
    qs_h5_record *r = NULL;
    QS_TRY(qs_h5_remember(file, QS_H5_RECORD_TEXT, name, &r));
    r->text = strdup(text);
    if (r->text == NULL) {
        file->n_records--;
        free(r->name);
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for attribute \"%s\"", file->path, name);
    }
    size_t bytes = strlen(text) > 0 ? strlen(text) : 1; /* a type of no bytes does not exist */
    qs_h5_lock();
    hid_t type = text_type(bytes);
    qs_status st = qs_h5_check(file, type, "creating attribute", name);
    if (st == QS_OK) {
        st = attr_put_locked(file, name, type, text);
        st = qs_h5_closed(file, st, H5Tclose(type), name);
    }
    qs_h5_unlock();
    return st;
}

static qs_status attr_wrong(const qs_h5 *file, const char *name, const char *wanted)
{
    return QS_FAIL(QS_ERR_INPUT_FORMAT,
                   "%s: attribute \"%s\" is not %s; the file is damaged or not ours", file->path,
                   name, wanted);
}

typedef struct {
    hid_t attr, type, space;
} attr_ids;

/** Open an attribute of the root that must be there and be a scalar. */
static qs_status attr_open(qs_h5 *file, const char *name, attr_ids *ids)
{
    *ids = (attr_ids){H5I_INVALID_HID, H5I_INVALID_HID, H5I_INVALID_HID};
    htri_t exists = H5Aexists(file->id, name);
    QS_TRY(qs_h5_check(file, exists, "looking for attribute", name));
    if (exists == 0) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: attribute \"%s\" is missing; the file is not ours",
                       file->path, name);
    }
    ids->attr = H5Aopen(file->id, name, H5P_DEFAULT);
    QS_TRY(qs_h5_check(file, ids->attr, "opening attribute", name));
    ids->type = H5Aget_type(ids->attr);
    QS_TRY(qs_h5_check(file, ids->type, "reading the type of attribute", name));
    ids->space = H5Aget_space(ids->attr);
    QS_TRY(qs_h5_check(file, ids->space, "reading the shape of attribute", name));
    return H5Sget_simple_extent_type(ids->space) == H5S_SCALAR ? QS_OK
                                                               : attr_wrong(file, name, "a scalar");
}

static qs_status attr_close(qs_h5 *file, qs_status st, const attr_ids *ids, const char *name)
{
    st = qs_h5_closed(file, st, ids->space >= 0 ? H5Sclose(ids->space) : 0, name);
    st = qs_h5_closed(file, st, ids->type >= 0 ? H5Tclose(ids->type) : 0, name);
    return qs_h5_closed(file, st, ids->attr >= 0 ? H5Aclose(ids->attr) : 0, name);
}

qs_status qs_h5_attr_get_i64(qs_h5 *file, const char *name, int64_t *value)
{
    attr_ids ids;
    qs_h5_lock();
    qs_status st = attr_open(file, name, &ids);
    if (st == QS_OK && H5Tequal(ids.type, H5T_STD_I64LE) <= 0) {
        st = attr_wrong(file, name, "a 64-bit integer");
    }
    if (st == QS_OK) {
        st = qs_h5_check(file, H5Aread(ids.attr, H5T_STD_I64LE, value), "reading attribute", name);
    }
    st = attr_close(file, st, &ids, name);
    qs_h5_unlock();
    return st;
}

qs_status qs_h5_attr_exists(qs_h5 *file, const char *name, bool *exists)
{
    qs_h5_lock();
    const htri_t found = H5Aexists(file->id, name);
    const qs_status st = qs_h5_check(file, found, "looking for attribute", name);
    qs_h5_unlock();
    *exists = found > 0;
    return st;
}

static qs_status attr_read_text(qs_h5 *file, const char *name, const attr_ids *ids, char *text,
                                size_t capacity)
{
    if (H5Tget_class(ids->type) != H5T_STRING || H5Tis_variable_str(ids->type) != 0) {
        return attr_wrong(file, name, "a string of fixed length");
    }
    size_t bytes = H5Tget_size(ids->type);
    if (bytes == 0 || bytes > QS_H5_TEXT) {
        return attr_wrong(file, name, "a string of 1 byte to 1 MiB");
    }
    char *buffer = calloc(bytes + 1, 1);
    if (buffer == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for attribute \"%s\"", file->path, name);
    }
    qs_status st =
        qs_h5_check(file, H5Aread(ids->attr, ids->type, buffer), "reading attribute", name);
    if (st == QS_OK && strlen(buffer) >= capacity) {
        st = QS_FAIL(QS_ERR_INPUT_FORMAT,
                     "%s: attribute \"%s\" has %zu bytes; at most %zu are allowed", file->path,
                     name, strlen(buffer), capacity - 1);
    }
    if (st == QS_OK) {
        memcpy(text, buffer, strlen(buffer) + 1);
    }
    free(buffer);
    return st;
}

qs_status qs_h5_attr_get_text(qs_h5 *file, const char *name, char *text, size_t capacity)
{
    attr_ids ids;
    qs_h5_lock();
    qs_status st = attr_open(file, name, &ids);
    if (st == QS_OK) {
        st = attr_read_text(file, name, &ids, text, capacity);
    }
    st = attr_close(file, st, &ids, name);
    qs_h5_unlock();
    return st;
}

qs_status qs_h5_expect_format(qs_h5 *file, const char *format, int64_t version)
{
    char found[64];
    int64_t found_version = 0;
    QS_TRY(qs_h5_attr_get_text(file, "format", found, sizeof found));
    if (strcmp(found, format) != 0) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: format=\"%s\", but a \"%s\" file is needed here",
                       file->path, found, format);
    }
    QS_TRY(qs_h5_attr_get_i64(file, "format_version", &found_version));
    if (found_version != version) {
        return QS_FAIL(QS_ERR_INPUT_UNKNOWN,
                       "%s: format_version=%lld; this program reads version %lld; use the program "
                       "that wrote the file, or make it again",
                       file->path, (long long)found_version, (long long)version);
    }
    return QS_OK;
}
