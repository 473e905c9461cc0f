/* status, log, memory, dtypes, cores. What is printed is read back through a pipe or a
 * pseudo-terminal. */
#define _GNU_SOURCE /* sched_setaffinity, RTLD_NEXT */
#include <criterion/criterion.h>
#include <criterion/parameterized.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <math.h>
#include <pthread.h>
#include <pty.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "base/cores_impl.h"
#include "base/dtype.h"
#include "base/log.h"
#include "base/mem.h"
#include "base/proc.h"
#include "base/status.h"
#include "base/timer.h"

Test(proc, the_longest_name_of_a_host_is_taken_whole_and_zeros_follow_a_short_one)
{
    char name[QS_HOST_NAME_BYTES], longest[QS_HOST_NAME_BYTES] = "";
    if (unshare(CLONE_NEWUTS) != 0) {
        cr_skip_test("no host name of our own: %s", strerror(errno));
    }
    memset(longest, 'h', sizeof longest - 1);
    cr_assert_eq(sethostname(longest, sizeof longest - 1), 0);
    qs_host_name(name);
    cr_assert_str_eq(name, longest);
    cr_assert_eq(sethostname("h", 1), 0);
    memset(longest + 1, 0, sizeof longest - 1);
    qs_host_name(name);
    cr_assert_arr_eq(name, longest, sizeof name);
    cr_assert_eq(sethostname("", 0), 0);
    qs_host_name(name);
    cr_assert_str_eq(name, "(unknown)");
}

/* ---- what a function writes to stderr ---- */

static char captured[16384];

static void read_all(int fd)
{
    size_t end = 0;
    for (;;) {
        ssize_t got = read(fd, captured + end, sizeof captured - 1 - end);
        if (got <= 0) { /* a pseudo-terminal ends with EIO */
            break;
        }
        end += (size_t)got;
    }
    captured[end] = '\0';
}

static void in_child(int write_fd, void (*body)(void))
{
    dup2(write_fd, STDERR_FILENO);
    body();
    _exit(0);
}

static const char *stderr_of(void (*body)(void))
{
    int ends[2];
    cr_assert_eq(pipe(ends), 0);
    pid_t child = fork();
    cr_assert_geq(child, 0);
    if (child == 0) {
        in_child(ends[1], body);
    }
    close(ends[1]);
    read_all(ends[0]);
    close(ends[0]);
    waitpid(child, NULL, 0);
    return captured;
}

static const char *terminal_of(void (*body)(void))
{
    int main_fd, terminal_fd;
    struct winsize size = {.ws_row = 24, .ws_col = 60};
    cr_assert_eq(openpty(&main_fd, &terminal_fd, NULL, NULL, &size), 0);
    setenv("TERM", "xterm", 1);
    pid_t child = fork();
    cr_assert_geq(child, 0);
    if (child == 0) {
        in_child(terminal_fd, body);
    }
    close(terminal_fd);
    read_all(main_fd);
    close(main_fd);
    waitpid(child, NULL, 0);
    return captured;
}

/* ---- status ---- */

Test(status, exit_code_is_the_hundreds)
{
    cr_assert_eq(qs_exit_code(QS_OK), 0);
    cr_assert_eq(qs_exit_code(QS_ERR_CONFIG_PAIR), 2);
    cr_assert_eq(qs_exit_code(QS_ERR_DEVICE), 9);
    cr_assert_eq(qs_exit_code(QS_ERR_BUG), 70);
    cr_assert_eq(qs_exit_code(QS_REQUEUE), 75);
}

static void print_twice(void)
{
    (void)QS_FAIL(QS_ERR_CONFIG_PAIR, "run.yaml: a\nb\033 %d\n", 3);
    qs_error_print(QS_ERR_CONFIG_PAIR);
    qs_error_print(QS_ERR_CONFIG_PAIR);
}

Test(status, print_gives_exactly_one_line_once)
{
    cr_assert_str_eq(stderr_of(print_twice), "error[E203] run.yaml: a b  3\n");
}

static void print_first(void)
{
    (void)QS_FAIL(QS_ERR_INPUT_VALUE, "the cause");
    (void)QS_FAIL(QS_ERR_CHECKPOINT, "a consequence");
    qs_error_print(QS_ERR_INPUT_VALUE);
}

Test(status, first_error_is_kept)
{
    cr_assert_str_eq(stderr_of(print_first), "error[E302] the cause\n");
}

static void print_silent(void)
{
    qs_error_adopt(QS_ERR_IO, "another rank speaks", true);
    qs_error_print(QS_ERR_IO);
    qs_error_print(QS_REQUEUE);
    qs_error_print(QS_OK);
}

Test(status, silent_record_and_requeue_print_nothing)
{
    cr_assert_str_eq(stderr_of(print_silent), "");
}

static void print_unrecorded(void)
{
    qs_error_print(QS_ERR_PEER);
    qs_error_print(QS_ERR_PEER);
}

Test(status, unrecorded_error_still_prints_one_line)
{
    const char *text = stderr_of(print_unrecorded);
    cr_assert_eq(strncmp(text, "error[E600] ", 12), 0, "%s", text);
    cr_assert_eq(strchr(text, '\n')[1], '\0', "%s", text);
}

static void print_long(void)
{
    char text[9000];
    memset(text, 'x', sizeof text);
    text[sizeof text - 1] = '\0';
    (void)QS_FAIL(QS_ERR_IO, "%s", text);
    qs_error_print(QS_ERR_IO);
}

Test(status, overlong_text_is_cut_and_still_ends_its_line)
{
    const char *text = stderr_of(print_long);
    size_t length = strlen(text);
    cr_assert(length > 1000 && length < 3000);
    cr_assert_eq(text[length - 1], '\n');
}

Test(status, clear_and_adopt_replace_the_record)
{
    (void)QS_FAIL(QS_ERR_IO, "old");
    qs_error_clear();
    cr_assert_str_eq(qs_error_text(), "");
    (void)QS_FAIL(QS_ERR_IO_FULL, "new");
    cr_assert_str_eq(qs_error_text(), "new");
    qs_error_adopt(QS_ERR_IO_FULL, qs_error_text(), false); /* its own text */
    cr_assert_str_eq(qs_error_text(), "new");
}

Test(status, names_in_the_record_are_replaced)
{
    static const struct {
        const char *text, *from, *to, *expected;
    } rows[] = {{"a.tmp-7/b: x", "a.tmp-7", "a", "a/b: x"},
                {"a.tmp-7/b.tmp-7", ".tmp-7", "", "a/b"},
                {"nothing of it", ".tmp-7", "", "nothing of it"},
                {".tmp-7", ".tmp-7", "", ""},
                {"xxxx", "xx", "x", "xx"},
                {"x", "x", "longer", "x"},
                {"x", "", "", "x"}};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        qs_error_clear();
        (void)QS_FAIL(QS_ERR_IO, "%s", rows[i].text);
        qs_error_rename(rows[i].from, rows[i].to);
        cr_assert_str_eq(qs_error_text(), rows[i].expected, "%s", rows[i].text);
    }
    qs_error_clear();
}

static void *fail_in_thread(void *text)
{
    (void)QS_FAIL(QS_ERR_IO, "in a thread");
    snprintf(text, 64, "%s", qs_error_text());
    return NULL;
}

Test(status, record_belongs_to_its_thread)
{
    char text[64];
    pthread_t thread;
    (void)QS_FAIL(QS_ERR_BUG, "mine");
    cr_assert_eq(pthread_create(&thread, NULL, fail_in_thread, text), 0);
    pthread_join(thread, NULL);
    cr_assert_str_eq(text, "in a thread");
    cr_assert_not_null(strstr(qs_error_text(), "mine"));
    cr_assert_not_null(strstr(qs_error_text(), "test_base.c:"), "a bug names its place");
}

/* ---- log ---- */

static void log_all_levels(void)
{
    qs_log_warn("w %d", 1);
    qs_log_info("i");
    qs_log_debug("d");
}

Test(log, info_level_hides_debug)
{
    cr_assert_str_eq(stderr_of(log_all_levels), "warning: w 1\ni\n");
}

Test(log, levels_nest)
{
    qs_log_init(0, 1, QS_LOG_QUIET, false);
    cr_assert_str_eq(stderr_of(log_all_levels), "");
    qs_log_init(0, 1, QS_LOG_WARN, false);
    cr_assert_str_eq(stderr_of(log_all_levels), "warning: w 1\n");
    qs_log_init(0, 1, QS_LOG_DEBUG, false);
    cr_assert_str_eq(stderr_of(log_all_levels), "warning: w 1\ni\ndebug: d\n");
}

Test(log, other_ranks_speak_only_when_asked)
{
    qs_log_init(2, 4, QS_LOG_INFO, false);
    cr_assert_str_eq(stderr_of(log_all_levels), "");
    qs_log_init(2, 4, QS_LOG_INFO, true);
    cr_assert_str_eq(stderr_of(log_all_levels), "[rank 2] warning: w 1\n[rank 2] i\n");
}

static void show_progress(void)
{
    qs_progress("train", 1, 200, "loss 2.31");
    qs_progress("train", 100, 200, "loss 2.30");
    qs_log_info("saved");
    qs_progress("train", 200, 200, NULL);
    qs_progress_end();
    qs_log_info("done");
}

Test(log, progress_in_a_file_is_plain_lines)
{
    const char *text = stderr_of(show_progress);
    cr_assert_null(strchr(text, '\r'));
    cr_assert_null(strchr(text, '\033'));
    cr_assert_eq(
        strncmp(text, "train  1/200  0%  loss 2.31\ntrain  100/200  50%  left 0:00  loss", 63), 0,
        "%s", text);
    cr_assert_not_null(strstr(text, "\nsaved\ntrain  200/200  100%\ndone\n"), "%s", text);
}

Test(log, progress_on_a_terminal_is_redrawn_in_place)
{
    const char *text = terminal_of(show_progress);
    cr_assert_eq(strncmp(text, "\rtrain  1/200  0%  loss 2.31\033[K\rtrain  100/200", 46), 0, "%s",
                 text);
    cr_assert_not_null(strstr(text, "\r\033[Ksaved\r\n\rtrain  200/200  100%\033[K\r\ndone\r\n"),
                       "%s", text);
}

static void show_long_progress(void)
{
    char text[300];
    memset(text, 'y', sizeof text);
    text[sizeof text - 1] = '\0';
    qs_progress("train", 1, 2, text);
    qs_progress_end();
}

Test(log, progress_never_wraps_the_terminal)
{
    const char *text = terminal_of(show_long_progress);
    const char *end = strstr(text, "\033[K");
    cr_assert_not_null(end);
    cr_assert_eq(end - text, 1 + 59, "carriage return and columns - 1");
}

static void fail_during_progress(void)
{
    qs_progress("train", 1, 2, "x");
    (void)QS_FAIL(QS_ERR_NUMERIC, "loss is nan");
    qs_error_print(QS_ERR_NUMERIC);
}

Test(log, error_line_starts_on_its_own_line)
{
    cr_assert_not_null(
        strstr(terminal_of(fail_during_progress), "\r\nerror[E500] loss is nan\r\n"));
}

Test(log, colour_only_on_terminals_and_not_with_no_color)
{
    unsetenv("NO_COLOR");
    cr_assert_not_null(strstr(terminal_of(log_all_levels), "\033[33mwarning: \033[0mw 1\r\n"));
    setenv("NO_COLOR", "1", 1);
    cr_assert_null(strchr(terminal_of(log_all_levels), '\033'));
}

static void progress_restarts(void)
{
    qs_progress("train", 5, 10, "");
    qs_progress("eval", 1, 0, "open end");
    qs_progress("train", 6, 10, "");
}

Test(log, another_activity_starts_its_own_clock)
{
    cr_assert_str_eq(stderr_of(progress_restarts),
                     "train  5/10  50%\neval  1  open end\ntrain  6/10  60%\n");
}

/* ---- memory ---- */

Test(mem, blocks_are_zeroed_aligned_and_counted)
{
    static const size_t sizes[] = {1, 63, 64, 65, 4096, 1 << 20};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        unsigned char *p;
        cr_assert_eq(QS_ALLOC(&p, sizes[i], QS_MEM_WORK), QS_OK);
        cr_assert_eq((uintptr_t)p % 64, 0);
        cr_assert_eq(qs_mem_now_bytes(QS_MEM_HOST, QS_MEM_WORK), sizes[i]);
        for (size_t j = 0; j < sizes[i]; j++) {
            cr_assert_eq(p[j], 0);
        }
        memset(p, 0xff, sizes[i]);
        qs_mem_free(p);
        cr_assert_eq(qs_mem_now_bytes(QS_MEM_HOST, QS_MEM_WORK), 0);
        cr_assert_eq(qs_mem_peak_bytes(QS_MEM_HOST, QS_MEM_WORK), sizes[i]);
    }
}

Test(mem, peak_total_is_of_the_sum_not_the_sum_of_peaks)
{
    void *a, *b;
    cr_assert_eq(qs_mem_alloc(&a, 1000, QS_MEM_DATA), QS_OK);
    qs_mem_free(a);
    cr_assert_eq(qs_mem_alloc(&b, 700, QS_MEM_LORA), QS_OK);
    cr_assert_eq(qs_mem_peak_total_bytes(QS_MEM_HOST), 1000);
    cr_assert_eq(qs_mem_peak_bytes(QS_MEM_HOST, QS_MEM_DATA), 1000);
    qs_mem_free(b);
}

Test(mem, nothing_is_null)
{
    void *p = &p;
    cr_assert_eq(qs_mem_alloc(&p, 0, QS_MEM_DATA), QS_OK);
    cr_assert_null(p);
    qs_mem_free(NULL);
}

Test(mem, impossible_size_is_an_error_that_names_it)
{
    void *p = &p;
    volatile size_t bytes = SIZE_MAX - 50; /* the header would wrap around */
    cr_assert_eq(qs_mem_alloc(&p, bytes, QS_MEM_OPTIM), QS_ERR_MEMORY);
    cr_assert_null(p);
    cr_assert_not_null(strstr(qs_error_text(), "optimizer state"), "%s", qs_error_text());
    cr_assert_eq(qs_mem_now_bytes(QS_MEM_HOST, QS_MEM_OPTIM), 0);
}

Test(mem, foreign_pointer_stops_the_program, .signal = SIGABRT)
{
    static _Alignas(64) char block[256];
    qs_mem_free(block + 128);
}

static void *alloc_and_free(void *arg)
{
    (void)arg;
    for (int i = 0; i < 2000; i++) {
        void *p;
        if (qs_mem_alloc(&p, 64, QS_MEM_ACTIVATION) == QS_OK) {
            qs_mem_free(p);
        }
    }
    return NULL;
}

Test(mem, counters_survive_threads)
{
    pthread_t threads[4];
    for (int i = 0; i < 4; i++) {
        pthread_create(&threads[i], NULL, alloc_and_free, NULL);
    }
    for (int i = 0; i < 4; i++) {
        pthread_join(threads[i], NULL);
    }
    cr_assert_eq(qs_mem_now_bytes(QS_MEM_HOST, QS_MEM_ACTIVATION), 0);
    cr_assert(qs_mem_peak_bytes(QS_MEM_HOST, QS_MEM_ACTIVATION) >= 64 &&
              qs_mem_peak_bytes(QS_MEM_HOST, QS_MEM_ACTIVATION) <= 4 * 64);
}

Test(mem, peak_rss_grows_with_touched_memory)
{
    size_t before = qs_mem_peak_rss_bytes();
    const size_t bytes = 64 << 20;
    char *p;
    cr_assert_eq(QS_ALLOC(&p, bytes, QS_MEM_DATA), QS_OK);
    memset(p, 1, bytes);
    cr_assert_geq(qs_mem_peak_rss_bytes(), before + bytes / 2);
    qs_mem_free(p);
}

Test(mem, size_arithmetic_sees_overflow)
{
    size_t out = 0;
    cr_assert(qs_size_mul_add(3, 5, 7, &out) && out == 22);
    cr_assert(qs_size_mul_add(SIZE_MAX, 1, 0, &out) && out == SIZE_MAX);
    cr_assert(!qs_size_mul_add(SIZE_MAX, 1, 1, &out));
    cr_assert(!qs_size_mul_add(SIZE_MAX / 2 + 1, 2, 0, &out));
}

/* ---- dtypes ---- */

static float float_of(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

Test(dtype, names_parse_back)
{
    for (int d = QS_F32; d <= QS_I64; d++) {
        cr_assert_eq(qs_dtype_parse(qs_dtype_name((qs_dtype)d)), d);
    }
    cr_assert_eq(qs_dtype_parse("BF16"), QS_BF16);
    cr_assert_eq(qs_dtype_parse("bfloat16"), QS_BF16);
    cr_assert_eq(qs_dtype_parse("F16"), QS_F16);
    cr_assert_eq(qs_dtype_parse("f8"), -1);
    cr_assert_eq(qs_dtype_bytes(QS_F16), 2);
    cr_assert_eq(qs_dtype_bytes(QS_I64), 8);
}

Test(dtype, all_16_bit_values_survive_a_round_trip)
{
    for (uint32_t b = 0; b <= 0xffff; b++) {
        float wide = qs_f32_from_bf16((uint16_t)b);
        uint16_t back = qs_bf16_from_f32(wide);
        cr_assert(isnan(wide) ? (b | 0x40) == back : b == back, "bf16 %04x -> %04x", b, back);
        wide = qs_f32_from_f16((uint16_t)b);
        back = qs_f16_from_f32(wide);
        cr_assert(isnan(wide) ? (b | 0x200) == back : b == back, "f16 %04x -> %04x", b, back);
    }
}

/* The definition: the nearest of the two neighbours, the even one at a tie. */
Test(dtype, bf16_rounds_to_nearest_even)
{
    for (uint32_t high = 0; high < 0x7f80; high += 37) {
        uint32_t base = high << 16;
        cr_assert_eq(qs_bf16_from_f32(float_of(base | 0x7fff)), high);
        cr_assert_eq(qs_bf16_from_f32(float_of(base | 0x8000)), high + (high & 1));
        cr_assert_eq(qs_bf16_from_f32(float_of(base | 0x8001)), high + 1);
        cr_assert_eq(qs_bf16_from_f32(float_of(base | 0x80008001)), 0x8000 | (high + 1));
    }
    cr_assert_eq(qs_bf16_from_f32(float_of(0x7f7fffff)), 0x7f80, "the largest float overflows");
}

Test(dtype, f16_rounds_to_nearest_even_between_all_neighbours)
{
    for (uint16_t b = 0; b < 0x7bff; b++) { /* up to the largest finite pair */
        double low = (double)qs_f32_from_f16(b), high = (double)qs_f32_from_f16((uint16_t)(b + 1));
        float middle = (float)((low + high) / 2); /* exact: 12 bits */
        cr_assert_eq(qs_f16_from_f32(middle), b + (b & 1), "tie above %04x", b);
        cr_assert_eq(qs_f16_from_f32(nextafterf(middle, 0)), b, "below the tie above %04x", b);
        cr_assert_eq(qs_f16_from_f32(nextafterf(middle, INFINITY)), b + 1);
        cr_assert_eq(qs_f16_from_f32(-middle), 0x8000 | (b + (b & 1)));
    }
    cr_assert_eq(qs_f16_from_f32(65519.996f), 0x7bff);
    cr_assert_eq(qs_f16_from_f32(65520.0f), 0x7c00, "overflow is infinity");
    cr_assert_eq(qs_f16_from_f32(3e38f), 0x7c00);
    cr_assert_eq(qs_f16_from_f32(-INFINITY), 0xfc00);
}

#if defined(__FLT16_MAX__) && defined(__x86_64__)
/* All 16-bit patterns, one at a time between others, and the borders of float. */
Test(dtype, not_finite_is_seen_in_every_type_and_place)
{
    for (int bits = 0; bits < 65536; bits++) {
        uint16_t values[3] = {0, 0, 0};
        values[bits % 3] = (uint16_t)bits;
        cr_assert_eq(qs_all_finite(values, QS_BF16, 3),
                     isfinite(qs_f32_from_bf16((uint16_t)bits)) != 0, "bf16 %04x", (unsigned)bits);
        cr_assert_eq(qs_all_finite(values, QS_F16, 3),
                     isfinite(qs_f32_from_f16((uint16_t)bits)) != 0, "f16 %04x", (unsigned)bits);
    }
    const float good[] = {0.0f, -0.0f, FLT_MAX, -FLT_MAX, FLT_MIN / 2, 1.0f};
    cr_assert(qs_all_finite(good, QS_F32, 6));
    const float bad[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < 3; i++) {
        float values[67] = {0};
        values[22 * (i + 1)] = bad[i];
        cr_assert(!qs_all_finite(values, QS_F32, 67));
        cr_assert(qs_all_finite(values, QS_F32, 22 * (i + 1)));
    }
    cr_assert(qs_all_finite(bad, QS_F32, 0));
}

Test(dtype, f16_agrees_with_the_compiler)
{
    for (uint64_t bits = 0; bits <= UINT32_MAX; bits += 1013) {
        float value = float_of((uint32_t)bits);
        if (isnan(value)) {
            continue;
        }
        _Float16 half = (_Float16)value;
        uint16_t expected;
        memcpy(&expected, &half, sizeof expected);
        cr_assert_eq(qs_f16_from_f32(value), expected, "%08lx", (unsigned long)bits);
    }
}
#endif

ParameterizedTestParameters(dtype, arrays_load_and_store_at_any_alignment)
{
    static int counts[] = {0, 1, 3, 16, 1001};
    return cr_make_param_array(int, counts, sizeof counts / sizeof *counts);
}
ParameterizedTest(int *count, dtype, arrays_load_and_store_at_any_alignment)
{
    static const qs_dtype types[] = {QS_F32, QS_BF16, QS_F16};
    float x[1001], y[1002];
    for (int i = 0; i < *count; i++) {
        x[i] = sinf((float)i) * 3.0f;
    }
    for (int t = 0; t < 3; t++) {
        char bytes[4 * 1001 + 2] = {0};
        y[*count] = -1.0f;
        qs_f32_store(bytes + 1, types[t], x, *count);
        qs_f32_load(y, bytes + 1, types[t], *count);
        for (int i = 0; i < *count; i++) {
            cr_assert_eq(y[i], qs_f32_round(x[i], types[t]));
        }
        cr_assert_eq(y[*count], -1.0f, "nothing past the end");
        cr_assert_eq(bytes[1 + (size_t)*count * qs_dtype_bytes(types[t])], 0);
    }
}

/* ---- timer, cores ---- */

Test(timer, time_does_not_run_backwards)
{
    double last = qs_time_s();
    for (int i = 0; i < 1000; i++) {
        double next = qs_time_s();
        cr_assert_geq(next, last);
        last = next;
    }
}

Test(cores, threads_follow_the_request_then_the_environment)
{
    unsetenv("OMP_NUM_THREADS");
    cr_assert_geq(qs_cores_available(), 1);
    cr_assert_eq(qs_threads_for_rank(1, 0, 0), qs_cores_available());
    cr_assert_geq(qs_threads_for_rank(1000000, 999999, 0), 1);
    setenv("OMP_NUM_THREADS", "5,2", 1);
    cr_assert_eq(qs_threads_for_rank(4, 0, 0), 5);
    cr_assert_eq(qs_threads_for_rank(4, 0, 3), 3);
    setenv("OMP_NUM_THREADS", "many", 1);
    cr_assert_eq(qs_threads_for_rank(1, 0, 0), qs_cores_available());
}

Test(cores, unbound_ranks_share_all_cores)
{
    unsetenv("OMP_NUM_THREADS");
    if (qs_cores_bound()) {
        cr_skip_test("this process is bound to a part of the cores");
    }
    int cores = qs_cores_available();
    for (int nranks = 1; nranks <= cores; nranks++) {
        int sum = 0;
        for (int r = 0; r < nranks; r++) {
            sum += qs_threads_for_rank(nranks, r, 0);
        }
        cr_assert_eq(sum, cores, "%d ranks", nranks);
    }
}

Test(cores, bound_rank_uses_its_binding)
{
    unsetenv("OMP_NUM_THREADS");
    cpu_set_t all, one;
    cr_assert_eq(sched_getaffinity(0, sizeof all, &all), 0);
    if (CPU_COUNT(&all) < 2) {
        cr_skip_test("one core only");
    }
    size_t cpu = 0;
    while (!CPU_ISSET(cpu, &all)) {
        cpu++;
    }
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    cr_assert_eq(sched_setaffinity(0, sizeof one, &one), 0);
    cr_assert_eq(qs_cores_available(), 1);
    cr_assert_eq(qs_threads_for_rank(8, 3, 0), 1);
}

static int machine_loads;

/* In place of the library's, to count. */
int hwloc_topology_load(hwloc_topology_t topology)
{
    int (*load)(hwloc_topology_t) = NULL;
    *(void **)&load = dlsym(RTLD_NEXT, "hwloc_topology_load");
    machine_loads++;
    return load(topology);
}

/* What qs_comm_threads asks of a rank at its start, and the same again on one core: to look at the
 * machine takes milliseconds, and a binding may be changed. */
Test(cores, machine_is_looked_at_once_and_the_binding_each_time)
{
    unsetenv("OMP_NUM_THREADS");
    cpu_set_t all, one;
    cr_assert_eq(sched_getaffinity(0, sizeof all, &all), 0);
    qs_cores_binding before, after;
    qs_cores_get_binding(&before);
    qs_cores_place(qs_threads_for_share(1, 0, 0));
    cr_expect_eq(machine_loads, 1, "loaded %d times", machine_loads);
    if (CPU_COUNT(&all) < 2) {
        cr_skip_test("one core only");
    }
    for (size_t cpu = 0; cpu < 64; cpu++) {
        if (CPU_ISSET(cpu, &all)) {
            CPU_ZERO(&one);
            CPU_SET(cpu, &one);
            cr_assert_eq(sched_setaffinity(0, sizeof one, &one), 0);
            qs_cores_get_binding(&after);
            cr_expect_eq(qs_cores_available(), 1);
            cr_expect_eq(after.mask[0], UINT64_C(1) << cpu, "hardware thread %zu", cpu);
            cr_expect(qs_cores_overlap(&before, &after));
        }
    }
    cr_expect_eq(machine_loads, 1, "loaded %d times", machine_loads);
}

/* Masks of two ranks on the machine of the test below; cores count on host 7. */
Test(cores, cores_that_a_rank_reaches_are_counted)
{
    static const struct {
        uint64_t first, second, host; /* the second's */
        int reached;
    } cases[] = {{0x3, 0xc, 7, 2}, {0x1, 0x2, 7, 1},    {0x3, 0xffff, 7, 8}, {0x3, 0xffff, 8, 1},
                 {0x3, 0x0, 7, 8}, {0x3, 0xf0000, 7, 1}}; /* 0: not known, so anywhere */
    hwloc_topology_t topology;
    hwloc_bitmap_t job = hwloc_bitmap_alloc();
    cr_assert_eq(hwloc_topology_init(&topology), 0);
    cr_assert_eq(hwloc_topology_set_synthetic(topology, "pack:2 [numa] core:4 pu:2"), 0);
    cr_assert_eq(hwloc_topology_load(topology), 0);
    hwloc_bitmap_set_range(job, 0, 15);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const qs_cores_binding bindings[2] = {{.host = 7, .mask = {cases[i].first}},
                                              {.host = cases[i].host, .mask = {cases[i].second}}};
        cr_expect_eq(qs_cores_reached(topology, job, bindings, 2, 7), cases[i].reached, "case %zu",
                     i);
    }
    hwloc_bitmap_clr_range(job, 4, 15);
    const qs_cores_binding all = {.host = 7, .mask = {0xffff}};
    cr_expect_eq(qs_cores_reached(topology, job, &all, 1, 7), 2, "of a job with two cores");
    hwloc_bitmap_free(job);
    hwloc_topology_destroy(topology);
}

Test(cores, slurm_may_give_a_job_fewer_cores_than_it_sees)
{
    qs_cores_binding mine;
    qs_cores_get_binding(&mine);
    unsetenv("SLURM_CPUS_ON_NODE");
    const qs_cores_use whole = qs_cores_count_use(&mine, 1);
    cr_expect_geq(whole.used, 1);
    cr_expect_leq(whole.used, whole.all);
    setenv("SLURM_CPUS_ON_NODE", "1", 1);
    cr_expect_eq(qs_cores_count_use(&mine, 1).all, 1);
    setenv("SLURM_CPUS_ON_NODE", "1000000", 1);
    cr_expect_eq(qs_cores_count_use(&mine, 1).all, whole.all);
}

/* A machine of two sockets with four cores each, two hardware threads a core: 2 i and 2 i + 1. */
Test(cores, a_thread_gets_a_core_and_memory_the_nodes_next_to_them)
{
    static const struct {
        unsigned begin, end; /* hardware threads of the binding */
        int cores, first, last, nodes;
    } cases[] = {
        {0, 15, 8, 0, 14, 2}, {0, 7, 4, 0, 6, 1}, {8, 15, 4, 8, 14, 1}, {5, 9, 3, 5, 8, 2}};
    hwloc_topology_t topology;
    cr_assert_eq(hwloc_topology_init(&topology), 0);
    cr_assert_eq(hwloc_topology_set_synthetic(topology, "pack:2 [numa] core:4 pu:2"), 0);
    cr_assert_eq(hwloc_topology_load(topology), 0);
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        hwloc_bitmap_t set = hwloc_bitmap_alloc(), nodes = hwloc_bitmap_alloc();
        hwloc_bitmap_set_range(set, cases[i].begin, (int)cases[i].end);
        int cpus[16];
        cr_assert_eq(qs_cores_list(topology, set, cpus, 16), cases[i].cores, "case %zu", i);
        cr_expect_eq(cpus[0], cases[i].first, "case %zu", i);
        cr_expect_eq(cpus[cases[i].cores - 1], cases[i].last, "case %zu", i);
        cr_expect_eq(qs_cores_list(topology, set, cpus, 2), 2);
        cr_expect_eq(qs_cores_nodes(topology, set, nodes), cases[i].nodes, "case %zu", i);
        hwloc_bitmap_free(set);
        hwloc_bitmap_free(nodes);
    }
    hwloc_topology_destroy(topology);
}
