/* Our HDF5 files: open, create, close. hdf5.h is used by src/store/h5*.c only.
 *
 * HDF5 hides write errors: a failed write may show only when the object is closed, or never (a full
 * disk leaves a sparse file of the right size). Hence three rules. (1) Every close is checked. (2)
 * Raw data never passes through HDF5's write path: it is written with qs_io_write_all at the offset
 * that HDF5 gave the dataset, or lies in a memory image. (3) A file on disk is opened again after
 * it has been closed, and every attribute, dataset and offset put into it is compared.
 *
 * Reading trusts nothing: names are fixed, every link on the way must be a hard one, and the bytes
 * of a dataset must lie inside the file before any of them is read. */
#include "store/h5.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "store/h5_impl.h"
#include "store/io.h"

enum {
    QS_H5_PAGE = 4096,
    QS_H5_REASON = 1024,
    QS_H5_IMAGE_STEP = 1 << 20, /* an image grows by this */
    QS_H5_SUPERBLOCK_END = 28,  /* where superblocks of version 2 and 3 hold the end of the file */
};

/* ---- the library ---- */

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

/** Start the library before main, so that it never cleans up by itself: neither at exit nor, where
 * it knows MPI, in MPI_Finalize. After an H5Fclose that failed (a full disk), 1.10.8 crashes there,
 * and the exit code would be lost. */
__attribute__((constructor)) static void start_library(void)
{
    (void)H5dont_atexit();
    (void)H5open(); /* a failure shows in the first real call */
}

void qs_h5_lock(void)
{
    pthread_mutex_lock(&mutex);
    H5Eset_auto2(H5E_DEFAULT, NULL, NULL); /* we report by hand; may be per thread */
    H5PLset_loading_state(0);              /* a file must not make us load code */
    H5Eclear2(H5E_DEFAULT);
}

void qs_h5_unlock(void)
{
    pthread_mutex_unlock(&mutex);
}

static herr_t take_first(unsigned n, const H5E_error2_t *error, void *out)
{
    if (n == 0 && error->desc != NULL) {
        char *reason = out;
        (void)snprintf(reason, QS_H5_REASON, "%s", error->desc);
        for (char *c = reason; *c != '\0'; c++) { /* it may hold the date as ctime prints it */
            *c = *c == '\n' ? ' ' : *c;
        }
    }
    return 0;
}

static herr_t find_no_memory(unsigned n, const H5E_error2_t *error, void *out)
{
    (void)n;
    bool *found = out;
    *found = *found || (error->maj_num == H5E_RESOURCE && error->min_num == H5E_NOSPACE);
    return 0;
}

/* Of what we write. A file that we read may ask for any amount of memory: that is its own fault. */
static bool lacks_memory(const qs_h5 *file)
{
    bool found = file->image.refused;
    H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, find_no_memory, &found);
    return found;
}

/* The reason is the innermost of HDF5's messages. */
qs_status qs_h5_check(const qs_h5 *file, int64_t result, const char *doing, const char *name)
{
    if (result >= 0) {
        return QS_OK;
    }
    char reason[QS_H5_REASON] = "no reason given";
    H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, take_first, reason);
    const char *number = strstr(reason, "errno = ");
    const bool no_memory = file->writing && number == NULL && lacks_memory(file);
    H5Eclear2(H5E_DEFAULT);
    if (no_memory) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for %s %s; use more ranks or more nodes",
                       file->path, doing, name);
    }
    if (!file->writing) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: %s %s failed: %s; the file is damaged or not ours",
                       file->path, doing, name, reason);
    }
    int error = 0; /* HDF5 hands the errno on as text only */
    if (number != NULL) {
        error = atoi(number + strlen("errno = "));
    }
    bool full = error == ENOSPC || error == EDQUOT || error == EFBIG;
    if (error > 0) {
        (void)snprintf(reason, sizeof reason, "%s",
                       strerror(error)); /* without addresses and counts */
    }
    return QS_FAIL(full ? QS_ERR_IO_FULL : QS_ERR_IO, "%s: %s %s failed: %s%s", file->path, doing,
                   name, reason, full ? "; free some space or raise the quota" : "");
}

qs_status qs_h5_closed(const qs_h5 *file, qs_status st, herr_t result, const char *name)
{
    return st != QS_OK ? st : qs_h5_check(file, result, "closing", name);
}

/* ---- images: HDF5's memory driver hands its buffer over when the file is closed ----
 *
 * H5Fget_file_image of 1.10 returns superblocks with a wrong checksum for files of the V110 format,
 * so it is not used. */

static void *image_malloc(size_t bytes, H5FD_file_image_op_t op, void *user)
{
    (void)op;
    qs_h5_image *im = user;
    im->buffer = malloc(bytes);
    im->bytes = im->buffer != NULL ? bytes : 0;
    im->refused = im->buffer == NULL;
    return im->buffer;
}

static void *image_realloc(void *ptr, size_t bytes, H5FD_file_image_op_t op, void *user)
{
    (void)op;
    qs_h5_image *im = user;
    void *grown = realloc(ptr, bytes);
    if (grown != NULL) {
        im->buffer = grown;
        im->bytes = bytes;
    }
    im->refused = im->refused || grown == NULL;
    return grown;
}

static herr_t image_free(void *ptr, H5FD_file_image_op_t op, void *user)
{
    (void)ptr;
    (void)op;
    (void)user; /* the buffer is ours from here on */
    return 0;
}

static void *image_user_copy(void *user)
{
    return user;
}

static herr_t image_user_free(void *user)
{
    (void)user;
    return 0;
}

/* ---- records of what was put into a file on disk ---- */

qs_status qs_h5_remember(qs_h5 *file, qs_h5_record_kind kind, const char *name, qs_h5_record **out)
{
    if (file->n_records == file->record_capacity) {
        int capacity = file->record_capacity > 0 ? 2 * file->record_capacity : 32;
        qs_h5_record *grown = realloc(file->records, (size_t)capacity * sizeof *grown);
        if (grown == NULL) {
            return QS_FAIL(QS_ERR_MEMORY, "%s: no memory to remember \"%s\"", file->path, name);
        }
        file->records = grown;
        file->record_capacity = capacity;
    }
    qs_h5_record *r = &file->records[file->n_records];
    *r = (qs_h5_record){.kind = kind, .name = strdup(name)};
    if (r->name == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory to remember \"%s\"", file->path, name);
    }
    file->n_records++;
    *out = r;
    return QS_OK;
}

/* ---- open, create, close ---- */

static void destroy(qs_h5 *file)
{
    for (int i = 0; i < file->n_records; i++) {
        free(file->records[i].name);
        free(file->records[i].text);
    }
    if (file->fd >= 0) {
        (void)close(file->fd);
    }
    free(file->records);
    free(file->image.buffer);
    free(file->path);
    free(file);
}

static qs_status allocate(qs_h5 **out, const char *path, bool writing)
{
    qs_h5 *file = calloc(1, sizeof *file);
    if (file == NULL || (file->path = strdup(path)) == NULL) {
        free(file);
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory to open it", path);
    }
    file->id = H5I_INVALID_HID;
    file->fd = -1;
    file->writing = writing;
    *out = file;
    return QS_OK;
}

/** File access properties. `im` NULL: a file on disk, into which several hosts may write at once.
 * Clients of network file systems write whole pages back, so every dataset, and every object of
 * HDF5's own, begins on a page there: none holds bytes of two. An image has one writer, and a page
 * an object would be most of it. */
static hid_t access_plist(qs_h5_image *im)
{
    const hsize_t smallest = im != NULL ? QS_H5_PAGE : 1; /* that is aligned */
    hid_t fapl = H5Pcreate(H5P_FILE_ACCESS);
    bool good = fapl >= 0 && H5Pset_libver_bounds(fapl, H5F_LIBVER_V110, H5F_LIBVER_V110) >= 0 &&
                H5Pset_alignment(fapl, smallest, QS_H5_PAGE) >= 0;
#if H5_VERSION_GE(1, 12, 1) || (H5_VERSION_GE(1, 10, 7) && !H5_VERSION_GE(1, 12, 0))
    good =
        good && H5Pset_file_locking(fapl, false, true) >= 0; /* network file systems refuse locks */
#endif
    if (good && im != NULL) {
        H5FD_file_image_callbacks_t callbacks = {.image_malloc = image_malloc,
                                                 .image_realloc = image_realloc,
                                                 .image_free = image_free,
                                                 .udata_copy = image_user_copy,
                                                 .udata_free = image_user_free,
                                                 .udata = im};
        good = H5Pset_fapl_core(fapl, QS_H5_IMAGE_STEP, false) >= 0 &&
               H5Pset_file_image_callbacks(fapl, &callbacks) >= 0;
    }
    if (!good && fapl >= 0) {
        H5Pclose(fapl);
        fapl = H5I_INVALID_HID;
    }
    return fapl;
}

/* What most often stands in place of a file of ours: what it is made from. */
#define HOW_TO_MAKE                                                                                \
    "qshard quantize makes a base.h5 of a model, qshard-prep a token file of JSON lines"

/** Whether HDF5's signature stands where it may: in front, or behind a user block of a power of
 * two. */
static bool has_signature(const qs_h5 *file)
{
    static const char signature[8] = "\x89HDF\r\n\x1a\n";
    char found[sizeof signature];
    for (off_t at = 0; file->file_bytes > at; at = at == 0 ? 512 : 2 * at) {
        if (pread(file->fd, found, sizeof found, at) == (ssize_t)sizeof found &&
            memcmp(found, signature, sizeof found) == 0) {
            return true;
        }
    }
    return false;
}

/** Open the descriptor that bytes are read through, and see that there is a file worth parsing. */
static qs_status open_bytes(qs_h5 *file)
{
    struct stat info;
    file->fd =
        open(file->path, O_RDONLY | O_CLOEXEC | O_NONBLOCK); /* a pipe must not make us wait */
    if (file->fd < 0 || fstat(file->fd, &info) != 0) {
        return QS_FAIL(QS_ERR_INPUT_MISSING, "%s: cannot be opened: %s", file->path,
                       strerror(errno));
    }
    if (S_ISDIR(info.st_mode)) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: is a folder; " HOW_TO_MAKE, file->path);
    }
    if (!S_ISREG(info.st_mode)) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: is not a plain file", file->path);
    }
    if (info.st_size == 0) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: is empty; make it again", file->path);
    }
    file->file_bytes = info.st_size;
    if (!has_signature(file)) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: is no HDF5 file; " HOW_TO_MAKE, file->path);
    }
    return QS_OK;
}

static qs_status refuse_user_block(qs_h5 *file)
{
    hsize_t bytes = 0;
    hid_t fcpl = H5Fget_create_plist(file->id);
    qs_status st =
        qs_h5_check(file, fcpl >= 0 ? H5Pget_userblock(fcpl, &bytes) : -1, "reading", "properties");
    st = qs_h5_closed(file, st, fcpl >= 0 ? H5Pclose(fcpl) : 0, "properties");
    if (st == QS_OK && bytes != 0) {
        return QS_FAIL(QS_ERR_INPUT_FORMAT, "%s: has a user block of %llu bytes in front; not ours",
                       file->path, (unsigned long long)bytes);
    }
    return st;
}

qs_status qs_h5_open(qs_h5 **out, const char *path)
{
    qs_h5 *file = NULL;
    *out = NULL;
    QS_TRY(allocate(&file, path, false));
    qs_status st = open_bytes(file);
    if (st != QS_OK) {
        destroy(file);
        return st;
    }
    qs_h5_lock();
    hid_t fapl = access_plist(NULL);
    file->id = fapl >= 0 ? H5Fopen(path, H5F_ACC_RDONLY, fapl) : H5I_INVALID_HID;
    st = qs_h5_check(file, file->id, "opening", "as HDF5");
    st = qs_h5_closed(file, st, fapl >= 0 ? H5Pclose(fapl) : 0, "properties");
    if (st == QS_OK) {
        st = refuse_user_block(file);
    }
    if (st != QS_OK && file->id >= 0) {
        H5Fclose(file->id);
    }
    qs_h5_unlock();
    if (st != QS_OK) {
        destroy(file);
        return st;
    }
    *out = file;
    return QS_OK;
}

/** Create the file with no times in it, so that equal content gives equal bytes. */
static qs_status create_locked(qs_h5 *file, bool on_disk)
{
    hid_t fapl = access_plist(on_disk ? NULL : &file->image);
    hid_t fcpl = H5Pcreate(H5P_FILE_CREATE);
    if (fapl >= 0 && fcpl >= 0 && H5Pset_obj_track_times(fcpl, false) >= 0) {
        file->id = H5Fcreate(file->path, H5F_ACC_TRUNC, fcpl, fapl);
    }
    qs_status st = qs_h5_check(file, file->id, "creating", "as HDF5");
    st = qs_h5_closed(file, st, fcpl >= 0 ? H5Pclose(fcpl) : 0, "properties");
    return qs_h5_closed(file, st, fapl >= 0 ? H5Pclose(fapl) : 0, "properties");
}

qs_status qs_h5_create(qs_h5 **out, const char *path)
{
    qs_h5 *file = NULL;
    *out = NULL;
    /* HDF5 tells files apart by name, images in memory too. */
    static atomic_uint images;
    char image_name[48];
    (void)snprintf(image_name, sizeof image_name, "(image in memory %u)",
                   atomic_fetch_add(&images, 1));
    QS_TRY(allocate(&file, path != NULL ? path : image_name, true));
    if (path != NULL) {
        file->fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        if (file->fd < 0) {
            qs_status status = errno == EEXIST                      ? QS_ERR_OUTPUT_TAKEN
                               : errno == ENOSPC || errno == EDQUOT ? QS_ERR_IO_FULL
                                                                    : QS_ERR_IO;
            (void)QS_FAIL(status, "%s: cannot be created: %s", path, strerror(errno));
            destroy(file);
            return status;
        }
    }
    qs_h5_lock();
    qs_status st = create_locked(file, path != NULL);
    qs_h5_unlock();
    if (st != QS_OK) {
        if (path != NULL) {
            (void)unlink(path);
        }
        destroy(file);
        return st;
    }
    *out = file;
    return QS_OK;
}

static qs_status close_locked(qs_h5 *file)
{
    qs_h5_lock();
    qs_status st = qs_h5_check(file, file->id >= 0 ? H5Fclose(file->id) : 0, "closing", "the file");
    file->id = H5I_INVALID_HID;
    qs_h5_unlock();
    return st;
}

/** Reserve the holes that early allocation left, and have everything on the disk. */
static qs_status sync_file(qs_h5 *file)
{
    struct stat info;
    if (fstat(file->fd, &info) != 0) {
        return QS_FAIL(QS_ERR_IO, "%s: reading its size failed: %s", file->path, strerror(errno));
    }
    QS_TRY(qs_io_reserve(file->fd, (size_t)info.st_size, file->path));
    QS_TRY(qs_io_fsync(file->fd, file->path));
    int fd = file->fd;
    file->fd = -1;
    return qs_io_close(fd, file->path);
}

static qs_status compare_data(qs_h5 *back, const qs_h5_record *r)
{
    int64_t count = r->info.dims[0] * (r->info.rank == 2 ? r->info.dims[1] : 1);
    size_t bytes = (size_t)count * qs_dtype_bytes(r->info.dtype);
    char hash[QS_XXH128_HEX];
    void *data = malloc(bytes + 1);
    if (data == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for reading \"%s\" back", back->path, r->name);
    }
    qs_status st = qs_io_read_all(back->fd, data, bytes, r->info.file_offset, back->path);
    qs_xxh3_128_hex(data, st == QS_OK ? bytes : 0, hash);
    free(data);
    return st == QS_OK && strcmp(hash, r->hash) != 0 ? QS_ERR_IO_VERIFY : st;
}

static qs_status compare_record(qs_h5 *back, const qs_h5_record *r)
{
    int64_t value = 0;
    qs_h5_info info = r->info;
    if (r->kind == QS_H5_RECORD_I64) {
        QS_TRY(qs_h5_attr_get_i64(back, r->name, &value));
        return value == r->value ? QS_OK : QS_ERR_IO_VERIFY;
    }
    if (r->kind == QS_H5_RECORD_DATASET) {
        QS_TRY(qs_h5_dataset_find(back, r->name, &info));
        if (info.file_offset != r->info.file_offset) {
            return QS_ERR_IO_VERIFY;
        }
        return r->filled && info.file_offset >= 0 ? compare_data(back, r) : QS_OK;
    }
    size_t capacity = strlen(r->text) + 2;
    char *text = malloc(capacity);
    if (text == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "%s: no memory for reading \"%s\" back", back->path, r->name);
    }
    qs_status st = qs_h5_attr_get_text(back, r->name, text, capacity);
    st = st == QS_OK && strcmp(text, r->text) != 0 ? QS_ERR_IO_VERIFY : st;
    free(text);
    return st;
}

/** Open the closed file again and compare what was put into it. */
static qs_status read_back(const qs_h5 *file)
{
    qs_h5 *back = NULL;
    const char *at = "the file";
    qs_status st = qs_h5_open(&back, file->path);
    for (int i = 0; st == QS_OK && i < file->n_records; i++) {
        at = file->records[i].name;
        st = compare_record(back, &file->records[i]);
    }
    qs_status last = qs_h5_close(back);
    st = st != QS_OK ? st : last;
    if (st == QS_OK || st == QS_ERR_MEMORY) {
        return st;
    }
    qs_error_clear();
    return QS_FAIL(QS_ERR_IO_VERIFY,
                   "%s: \"%s\" reads back differently from what was written; check the disk",
                   file->path, at);
}

qs_status qs_h5_close(qs_h5 *file)
{
    if (file == NULL) {
        return QS_OK;
    }
    qs_status st = close_locked(file);
    if (st == QS_OK && file->writing && file->fd >= 0) {
        st = sync_file(file);
        if (st == QS_OK) {
            st = read_back(file);
        }
    }
    destroy(file);
    return st;
}

void qs_h5_discard(qs_h5 *file)
{
    if (file != NULL) {
        (void)close_locked(file);
        destroy(file);
    }
}

qs_status qs_h5_close_image(qs_h5 *file, void **out, size_t *bytes)
{
    uint64_t end = 0;
    qs_status st = close_locked(file);
    if (st == QS_OK && file->image.bytes >= QS_H5_SUPERBLOCK_END + sizeof end) {
        memcpy(&end, (char *)file->image.buffer + QS_H5_SUPERBLOCK_END, sizeof end);
    }
    if (st == QS_OK && end > file->image.bytes) { /* a last dataset that was never written */
        size_t held = file->image.bytes;
        void *grown =
            image_realloc(file->image.buffer, end, H5FD_FILE_IMAGE_OP_NO_OP, &file->image);
        if (grown != NULL) {
            memset((char *)grown + held, 0, end - held);
        } else {
            st = QS_FAIL(QS_ERR_MEMORY, "%s: no memory for its %llu bytes", file->path,
                         (unsigned long long)end);
        }
    }
    if (st == QS_OK && end == 0) {
        st = QS_FAIL(QS_ERR_BUG, "%s: not a file that was created in memory", file->path);
    }
    if (st == QS_OK) {
        *out = file->image.buffer;
        *bytes = (size_t)end;
        file->image.buffer = NULL;
    }
    destroy(file);
    return st;
}

const char *qs_h5_path(const qs_h5 *file)
{
    return file->path;
}
