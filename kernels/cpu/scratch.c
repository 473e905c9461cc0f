#include "kernels/cpu/scratch.h"

#include <pthread.h>
#include <stdlib.h>

#include "base/mem.h"

typedef struct {
    float *data[QS_SCRATCH_COUNT];
    int64_t count[QS_SCRATCH_COUNT];
} scratch_set;

static pthread_key_t scratch_key;
static pthread_once_t scratch_once = PTHREAD_ONCE_INIT;
static int scratch_key_error;

static void set_destroy(void *ptr)
{
    scratch_set *set = ptr;
    for (int i = 0; i < QS_SCRATCH_COUNT; i++) {
        qs_mem_free(set->data[i]);
    }
    free(set);
}

static void key_create(void)
{
    scratch_key_error = pthread_key_create(&scratch_key, set_destroy);
}

static scratch_set *set_of_thread(void)
{
    pthread_once(&scratch_once, key_create);
    if (scratch_key_error != 0) {
        return NULL;
    }
    scratch_set *set = pthread_getspecific(scratch_key);
    if (set == NULL) {
        set = calloc(1, sizeof *set);
        if (set != NULL && pthread_setspecific(scratch_key, set) != 0) {
            free(set);
            set = NULL;
        }
    }
    return set;
}

qs_status qs_scratch(qs_scratch_user user, int64_t count, float **out)
{
    scratch_set *set = set_of_thread();
    if (set == NULL) {
        return QS_FAIL(QS_ERR_MEMORY, "no memory for the kernels' table of scratch buffers");
    }
    if (set->count[user] < count) {
        qs_mem_free(set->data[user]);
        set->data[user] = NULL;
        set->count[user] = 0;
        QS_TRY(QS_ALLOC(&set->data[user], count, QS_MEM_WORK));
        set->count[user] = count;
    }
    *out = set->data[user];
    return QS_OK;
}
