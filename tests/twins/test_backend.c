/* Which device a rank gets, and what is said where there is none (src/backend). The emulator stands
 * in for GPUs of every kind, by its environment variables. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "backend/backend.h"
#include "kernels/cuda/core/attention_tiles.h"
#include "kernels/cuda/core/norm.h"
#include "tests/team.h"

static const char *emulated_path(void)
{
    static char path[1024];
    snprintf(path, sizeof path, "%s/libqshard_emulated.so", getenv("QSHARD_BINARY_DIR"));
    return access(path, F_OK) == 0 ? path : NULL;
}

static void assert_failed(qs_status st, qs_status want, const char *text)
{
    cr_assert_eq(st, want, "status %d, '%s'", (int)st, qs_error_text());
    cr_assert(strstr(qs_error_text(), text) != NULL, "'%s' is not in '%s'", text, qs_error_text());
}

static void use_emulator(const char *devices)
{
    if (emulated_path() == NULL) {
        cr_skip_test("no libqshard_emulated.so");
    }
    setenv("QSHARD_PLUGIN", emulated_path(), 1);
    setenv("QSHARD_EMULATOR_DEVICES", devices, 1);
}

/* What two ranks of one host are to find. */
typedef struct {
    qs_device_kind kind;
    bool allow_shared;
    qs_status status;
    const char *name; /* of the device */
} opening;

static qs_status open_body(team_member *me)
{
    const opening *o = me->ctx;
    qs_backend b;
    const qs_status st = qs_backend_open(&b, o->kind, me->comm, o->allow_shared);
    if (st == QS_OK) {
        TEAM_CHECK(strcmp(qs_device_name(b.device), o->name) == 0, "on %s",
                   qs_device_name(b.device));
        TEAM_CHECK((b.ops->act_dtype == QS_BF16) == (strcmp(o->name, "cuda") == 0), "other ops");
    }
    qs_backend_close(&b);
    return st;
}

static void both_ranks(opening o, const char *text)
{
    team_member members[2];
    team_run(members, 2, open_body, &o);
    for (int r = 0; r < 2; r++) {
        cr_assert_eq(members[r].st, o.status, "rank %d: status %d, '%s'", r, (int)members[r].st,
                     members[r].text);
        cr_assert(strstr(members[r].text, text) != NULL, "'%s' is not in '%s'", text,
                  members[r].text);
    }
}

Test(backend, every_local_rank_gets_a_gpu_of_its_own)
{
    use_emulator("2");
    both_ranks((opening){QS_DEVICE_CUDA, false, QS_OK, "cuda"}, "");
    both_ranks((opening){QS_DEVICE_AUTO, false, QS_OK, "cuda"}, "");
    cr_assert_null(qs_backend_cuda_missing());
    cr_assert_eq(qs_backend_cuda_devices(), 2);
    cr_assert(strstr(qs_backend_cuda_description(), "libqshard_emulated.so") != NULL);
}

Test(backend, more_ranks_than_gpus_is_an_error_that_names_host_numbers_and_ranks)
{
    use_emulator("1");
    char host[64] = "", text[160];
    (void)gethostname(host, sizeof host - 1);
    snprintf(text, sizeof text, "2 ranks on %s see 1 GPU, and ranks 0 and 1 would share one", host);
    both_ranks((opening){QS_DEVICE_CUDA, false, QS_ERR_ENVIRONMENT, ""}, text);
    both_ranks((opening){QS_DEVICE_CUDA, false, QS_ERR_ENVIRONMENT, ""}, "--allow-shared-device");
    both_ranks((opening){QS_DEVICE_AUTO, false, QS_OK, "cpu"}, "");
    both_ranks((opening){QS_DEVICE_CUDA, true, QS_OK, "cuda"}, "");
}

/* One rank alone. */
static qs_status open_alone(qs_backend *b, qs_device_kind kind)
{
    qs_comm *host = NULL;
    cr_assert_eq(qs_comm_self_create(&host), QS_OK);
    const qs_status st = qs_backend_open(b, kind, host, false);
    qs_comm_destroy(host);
    return st;
}

typedef struct {
    const char *variable, *value, *text;
} missing;

/* Why there is no GPU, told apart; auto computes on the CPU all the same. */
static void check_missing(const missing *m)
{
    use_emulator("1");
    setenv(m->variable, m->value, 1);
    qs_backend b;
    cr_assert_eq(open_alone(&b, QS_DEVICE_AUTO), QS_OK, "%s", qs_error_text());
    cr_assert_str_eq(qs_device_name(b.device), "cpu");
    qs_backend_close(&b);
    assert_failed(open_alone(&b, QS_DEVICE_CUDA), QS_ERR_ENVIRONMENT, m->text);
    cr_assert(strstr(qs_backend_cuda_missing(), m->text) != NULL);
    qs_backend_close(&b);
    cr_assert_eq(open_alone(&b, QS_DEVICE_CPU), QS_OK);
    cr_assert_str_eq(qs_device_name(b.device), "cpu");
}

Test(backend, without_a_plugin)
{
    check_missing(&(missing){"QSHARD_PLUGIN", "/nowhere.so", "/nowhere.so cannot be loaded"});
}

Test(backend, without_a_gpu)
{
    check_missing(&(missing){"QSHARD_EMULATOR_DEVICES", "0", "no GPU is visible"});
}

Test(backend, without_a_driver)
{
    check_missing(&(missing){"QSHARD_EMULATOR_DRIVER", "0", "no NVIDIA driver is loaded"});
}

Test(backend, with_a_driver_that_is_too_old)
{
    check_missing(&(missing){"QSHARD_EMULATOR_DRIVER", "12080",
                             "too old: it is for CUDA 12.8, this plugin for CUDA 13.0"});
}

Test(backend, with_a_card_that_is_too_old)
{
    check_missing(&(missing){"QSHARD_EMULATOR_CAPABILITY", "7.5", "device 0 is sm_75; sm_80"});
}

/* Which models the operations say they take is what the attention is compiled for. */
Test(backend, a_model_that_a_gpu_does_not_take_is_named)
{
    use_emulator("1");
    qs_backend cpu, gpu;
    cr_assert_eq(open_alone(&cpu, QS_DEVICE_CPU), QS_OK);
    cr_assert_eq(open_alone(&gpu, QS_DEVICE_CUDA), QS_OK, "%s", qs_error_text());
    for (int dim = 2; dim <= 300; dim += 2) {
        char why[256] = "", field[32];
        const qs_ops_limits model = {.head_dim = dim, .hidden = 4096};
        snprintf(field, sizeof field, "head_dim=%d:", dim);
        cr_assert(cpu.ops->takes(&model, why, sizeof why));
        if (dim % 8 == 0 && qs_attention_padded_dim(dim) > 0) {
            cr_assert(gpu.ops->takes(&model, why, sizeof why), "%s", why);
        } else {
            cr_assert_not(gpu.ops->takes(&model, why, sizeof why), "%d", dim);
            cr_assert(strstr(why, field) == why && strstr(why, "up to 256") != NULL, "%s", why);
        }
    }
    const qs_ops_limits wide = {.head_dim = 128, .hidden = QS_NORM_COLS_MAX + 8};
    char why[256] = "";
    cr_assert(cpu.ops->takes(&wide, why, sizeof why));
    cr_assert_not(gpu.ops->takes(&wide, why, sizeof why));
    cr_assert(strstr(why, "hidden_size=") == why, "%s", why);
    qs_ops_limits whole = {.head_dim = 128, .hidden = 4096, .q_norm = QS_NORM_COLS_MAX};
    cr_assert(gpu.ops->takes(&whole, why, sizeof why), "%s", why);
    whole.q_norm += 8;
    cr_assert(cpu.ops->takes(&whole, why, sizeof why));
    cr_assert_not(gpu.ops->takes(&whole, why, sizeof why));
    cr_assert(strstr(why, "num_attention_heads * head_dim=32776") == why, "%s", why);
    qs_backend_close(&gpu);
}

/* The communicator: the host's own on the CPU. */
Test(backend, the_cpu_talks_over_the_hosts_communicator)
{
    qs_backend b;
    qs_comm *host = NULL, *comm = NULL;
    cr_assert_eq(qs_comm_self_create(&host), QS_OK);
    cr_assert_eq(open_alone(&b, QS_DEVICE_CPU), QS_OK);
    cr_assert_eq(qs_backend_comm(&comm, &b, host), QS_OK);
    cr_assert_eq(comm, host);
    qs_backend_comm_destroy(comm, host);
    cr_assert_eq(qs_comm_nranks(host), 1, "still there");
    qs_comm_destroy(host);
    qs_backend_close(&b);
    qs_backend_close(&b);
}
