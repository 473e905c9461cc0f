/* Which device a rank gets, and what is said where there is none (src/backend). The emulator stands
 * in for GPUs of every kind, by its environment variables. */
#include <criterion/criterion.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "backend/backend.h"

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

Test(backend, every_local_rank_gets_a_gpu_of_its_own)
{
    use_emulator("2");
    for (int rank = 0; rank < 2; rank++) {
        qs_backend b;
        cr_assert_eq(qs_backend_open(&b, QS_DEVICE_CUDA, rank, 2, false), QS_OK, "%s",
                     qs_error_text());
        cr_assert_str_eq(qs_device_name(b.device), "cuda");
        cr_assert_eq(b.ops->act_dtype, QS_BF16);
        qs_backend_close(&b);
    }
    cr_assert_null(qs_backend_cuda_missing());
    cr_assert_eq(qs_backend_cuda_devices(), 2);
    cr_assert(strstr(qs_backend_cuda_description(), "libqshard_emulated.so") != NULL);
}

Test(backend, more_ranks_than_gpus_is_an_error_that_names_both_numbers)
{
    use_emulator("1");
    qs_backend b;
    assert_failed(qs_backend_open(&b, QS_DEVICE_CUDA, 0, 2, false), QS_ERR_ENVIRONMENT,
                  "2 ranks on this host see 1 GPU:");
    cr_assert(strstr(qs_error_text(), "--allow-shared-device") != NULL);
    qs_error_clear();
    cr_assert_eq(qs_backend_open(&b, QS_DEVICE_AUTO, 0, 2, false), QS_OK);
    cr_assert_str_eq(qs_device_name(b.device), "cpu");
    qs_backend_close(&b);
    cr_assert_eq(qs_backend_open(&b, QS_DEVICE_CUDA, 1, 2, true), QS_OK, "%s", qs_error_text());
    cr_assert_str_eq(qs_device_name(b.device), "cuda");
    qs_backend_close(&b);
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
    cr_assert_eq(qs_backend_open(&b, QS_DEVICE_AUTO, 0, 1, false), QS_OK, "%s", qs_error_text());
    cr_assert_str_eq(qs_device_name(b.device), "cpu");
    qs_backend_close(&b);
    assert_failed(qs_backend_open(&b, QS_DEVICE_CUDA, 0, 1, false), QS_ERR_ENVIRONMENT, m->text);
    cr_assert(strstr(qs_backend_cuda_missing(), m->text) != NULL);
    qs_backend_close(&b);
    cr_assert_eq(qs_backend_open(&b, QS_DEVICE_CPU, 0, 1, false), QS_OK);
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

/* The communicator: the host's own on the CPU. */
Test(backend, the_cpu_talks_over_the_hosts_communicator)
{
    qs_backend b;
    qs_comm *host = NULL, *comm = NULL;
    cr_assert_eq(qs_comm_self_create(&host), QS_OK);
    cr_assert_eq(qs_backend_open(&b, QS_DEVICE_CPU, 0, 1, false), QS_OK);
    cr_assert_eq(qs_backend_comm(&comm, &b, host), QS_OK);
    cr_assert_eq(comm, host);
    qs_backend_comm_destroy(comm, host);
    cr_assert_eq(qs_comm_nranks(host), 1, "still there");
    qs_comm_destroy(host);
    qs_backend_close(&b);
    qs_backend_close(&b);
}
