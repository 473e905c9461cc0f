/* Manifests: what verifies is exactly what was written, and nothing else does. */
#include <criterion/criterion.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/status.h"
#include "store/io.h"
#include "store/manifest.h"
#include "tests/scratch.h"

static char dir[SCRATCH_MAX];

static void make_dir(void)
{
    scratch_make(dir, NULL);
}

static void remove_dir(void)
{
    scratch_remove(dir);
}

#define CR_OK(expr) cr_assert_eq((expr), QS_OK, "%s", qs_error_text())

/** A directory like a checkpoint: two files, the second of three blocks, and a manifest. */
static void make_step(int64_t step, char path[128])
{
    char name[320];
    static char large[(2 << 20) + 100];
    qs_manifest_file files[2];
    qs_manifest m = {.step = step, .nranks = 2, .meta_json = NULL, .n_files = 2, .files = files};
    char meta[] = "{\"config\": \"seed: 42\\n\", \"lora\": {\"rank\": 16, \"alpha\": 0.1}}";
    m.meta_json = meta;
    strcpy(m.run_id, "run-7");
    for (size_t i = 0; i < sizeof large; i++) {
        large[i] = (char)(i * 31 + (size_t)step);
    }
    qs_manifest_step_dir(path, 128, dir, step);
    CR_OK(qs_io_mkdir(path));
    (void)snprintf(name, sizeof name, "%s/rank-00000.h5", path);
    CR_OK(qs_io_write_new(name, "small", 5));
    (void)snprintf(name, sizeof name, "%s/rank-00001.h5", path);
    CR_OK(qs_io_write_new(name, large, sizeof large));
    CR_OK(qs_manifest_hash_file(path, "rank-00000.h5", &files[0]));
    CR_OK(qs_manifest_hash_file(path, "rank-00001.h5", &files[1]));
    CR_OK(qs_manifest_write(path, &m));
}

static void flip(const char *path, const char *name, long at, int mask)
{
    char file[192];
    (void)snprintf(file, sizeof file, "%s/%s", path, name);
    FILE *f = fopen(file, "r+b");
    cr_assert_not_null(f);
    fseek(f, at, SEEK_SET);
    int c = fgetc(f);
    fseek(f, at, SEEK_SET);
    fputc(c ^ mask, f);
    fclose(f);
}

TestSuite(manifest, .init = make_dir, .fini = remove_dir);

Test(manifest, round_trip)
{
    char path[128];
    qs_manifest m;
    make_step(42, path);
    cr_assert_str_eq(path + strlen(dir), "/step-00000042");
    CR_OK(qs_manifest_verify(path, &m));
    cr_assert_eq(m.step, 42);
    cr_assert_eq(m.nranks, 2);
    cr_assert_str_eq(m.run_id, "run-7");
    cr_assert_eq(m.n_files, 2);
    cr_assert_str_eq(m.files[0].name, "rank-00000.h5");
    cr_assert_eq(m.files[0].bytes, 5);
    cr_assert_str_eq(m.files[0].sha256,
                     "81db8ebbbbc69c6c6ad4a6aa92b76e0c08af547da236b9e2c9dbe1d8285a8130");
    cr_assert_str_eq(m.meta_json, "{\"config\": \"seed: 42\\n\", \"lora\": {\"rank\": 16, "
                                  "\"alpha\": 0.10000000000000001}}");
    qs_manifest_free(&m);
    qs_manifest_free(&m);
}

Test(manifest, the_text_is_the_same_each_time_and_ends_in_its_own_hash)
{
    char path[2][128];
    char name[320];
    char *text[2];
    size_t bytes[2];
    char hash[QS_SHA256_HEX];
    for (int i = 0; i < 2; i++) {
        make_step(5, path[i]);
        (void)snprintf(name, sizeof name, "%s/manifest.json", path[i]);
        CR_OK(qs_io_read_file(name, 1 << 20, (void **)&text[i], &bytes[i]));
        CR_OK(qs_io_remove_dir(path[i]));
    }
    cr_assert_str_eq(text[0], text[1]);
    char *self = strstr(text[0], "\"self_sha256\": \"") + strlen("\"self_sha256\": \"");
    char stored[QS_SHA256_HEX] = "";
    memcpy(stored, self, 64);
    memset(self, '0', 64); /* as docs/file-formats.md says */
    qs_sha256_hex(text[0], bytes[0], hash);
    cr_assert_str_eq(hash, stored);
    free(text[0]);
    free(text[1]);
}

Test(manifest, every_flipped_bit_of_the_manifest_is_found)
{
    char path[128];
    char name[320];
    void *text = NULL;
    size_t bytes = 0;
    qs_manifest m;
    make_step(1, path);
    (void)snprintf(name, sizeof name, "%s/manifest.json", path);
    CR_OK(qs_io_read_file(name, 1 << 20, &text, &bytes));
    for (size_t bit = 0; bit < 8 * bytes; bit++) {
        ((unsigned char *)text)[bit / 8] ^= (unsigned char)(1u << (bit % 8));
        cr_assert_neq(qs_manifest_parse(text, bytes, name, &m), QS_OK, "bit %zu", bit);
        cr_assert(m.files == NULL && m.blocks == NULL && m.meta_json == NULL);
        qs_error_clear();
        ((unsigned char *)text)[bit / 8] ^= (unsigned char)(1u << (bit % 8));
    }
    for (size_t cut = 0; cut < bytes; cut++) {
        cr_assert_neq(qs_manifest_parse(text, cut, name, &m), QS_OK, "cut at %zu", cut);
        qs_error_clear();
    }
    CR_OK(qs_manifest_parse(text, bytes, name, &m));
    qs_manifest_free(&m);
    free(text);
}

static void expect_damage(const char *path, qs_status status, const char *words)
{
    qs_manifest m;
    cr_assert_eq(qs_manifest_verify(path, &m), status, "%s", qs_error_text());
    cr_assert_not_null(strstr(qs_error_text(), words), "%s", qs_error_text());
    cr_assert_null(m.files);
    qs_error_clear();
}

Test(manifest, damage_names_file_and_block)
{
    char path[128];
    char name[320];
    qs_manifest m;
    make_step(1, path);
    flip(path, "rank-00001.h5", (1 << 20) + 17, 0x40);
    expect_damage(path, QS_ERR_INPUT_HASH, "rank-00001.h5: block 1 (from byte 1048576)");
    flip(path, "rank-00001.h5", (1 << 20) + 17, 0x40);
    CR_OK(qs_manifest_verify(path, &m));
    qs_manifest_free(&m);
    flip(path, "rank-00000.h5", 0, 1);
    expect_damage(path, QS_ERR_INPUT_HASH, "rank-00000.h5: block 0");
    flip(path, "rank-00000.h5", 0, 1);
    (void)snprintf(name, sizeof name, "%s/rank-00000.h5", path);
    cr_assert_eq(truncate(name, 4), 0);
    expect_damage(path, QS_ERR_INPUT_HASH, "size=4, but the manifest says 5");
    cr_assert_eq(unlink(name), 0);
    expect_damage(path, QS_ERR_INPUT_MISSING, "rank-00000.h5");
    cr_assert_eq(mkfifo(name, 0666), 0);
    expect_damage(path, QS_ERR_INPUT_FORMAT, "plain file");
}

Test(manifest, a_file_that_differs_from_what_was_hashed_is_not_published)
{
    char path[128];
    char name[320];
    qs_manifest_file file;
    qs_manifest m = {.step = 3, .nranks = 1, .n_files = 1, .files = &file};
    strcpy(m.run_id, "r");
    qs_manifest_step_dir(path, sizeof path, dir, 3);
    CR_OK(qs_io_mkdir(path));
    (void)snprintf(name, sizeof name, "%s/a", path);
    CR_OK(qs_io_write_new(name, "abc", 3));
    CR_OK(qs_manifest_hash_file(path, "a", &file));
    flip(path, "a", 1, 1);
    cr_assert_eq(qs_manifest_write(path, &m), QS_ERR_IO_VERIFY);
    cr_assert_not_null(strstr(qs_error_text(), file.sha256), "%s", qs_error_text());
    (void)snprintf(name, sizeof name, "%s/manifest.json", path);
    cr_assert_neq(access(name, F_OK), 0);
}

Test(manifest, what_cannot_be_in_a_manifest_is_not_written)
{
    qs_manifest_file file = {.bytes = 0};
    qs_manifest m = {.step = 3,
                     .nranks = 1,
                     .n_files = 1,
                     .files = &file,
                     .meta_json = (char[]){"{\"step\": 4}"}};
    cr_assert_eq(qs_manifest_write(dir, &m), QS_ERR_BUG, "a reserved key");
    qs_error_clear();
    m.meta_json = NULL;
    strcpy(file.name, "../x");
    cr_assert_eq(qs_manifest_write(dir, &m), QS_ERR_BUG, "a name with a path");
    qs_error_clear();
    m.n_files = 0;
    cr_assert_neq(qs_manifest_write(dir, &m), QS_OK, "no file at all");
    qs_error_clear();
    cr_assert_eq(qs_manifest_hash_file(dir, "manifest.json", &file), QS_ERR_BUG);
}

/** A manifest with a right hash around any fields. */
static size_t sealed(char *text, const char *fields)
{
    char hash[QS_SHA256_HEX];
    int bytes = sprintf(text, "{%s,\n \"self_sha256\": \"%064d\"\n}\n", fields, 0);
    qs_sha256_hex(text, (size_t)bytes, hash);
    memcpy(text + bytes - 68, hash, 64);
    return (size_t)bytes;
}

#define HEAD                                                                                       \
    "\"format\":\"qshard-manifest\",\"format_version\":1,\"step\":1,\"nranks\":1,\"run_id\":\"r\""
#define SHA "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
#define ENTRY(name) "{\"name\":\"" name "\",\"size\":0,\"sha256\":\"" SHA "\",\"xxh3\":[]}"

Test(manifest, forged_fields_are_refused_by_name)
{
    static const struct {
        const char *fields, *words;
    } cases[] = {
        {"\"format\":\"other\"", "format="},
        {"\"format\":\"qshard-manifest\",\"format_version\":2", "format_version=2"},
        {"\"format\":\"qshard-manifest\",\"format_version\":1,\"step\":-1", "step=-1"},
        {"\"format\":\"qshard-manifest\",\"format_version\":1,\"step\":1.5", "\"step\""},
        {"\"format\":\"qshard-manifest\",\"format_version\":1,\"step\":1,\"nranks\":0", "nranks=0"},
        {"\"format\":\"qshard-manifest\",\"format\":\"qshard-manifest\"", "duplicate"},
        {HEAD, "files"},
        {HEAD ",\"files\":[]", "files"},
        {HEAD ",\"files\":{}", "files"},
        {HEAD ",\"files\":[7]", "name"},
        {HEAD ",\"files\":[" ENTRY("") "]", "name="},
        {HEAD ",\"files\":[" ENTRY("..") "]", "name="},
        {HEAD ",\"files\":[" ENTRY("../etc/passwd") "]", "name="},
        {HEAD ",\"files\":[" ENTRY("/etc/passwd") "]", "name="},
        {HEAD ",\"files\":[" ENTRY("a\\\\b") "]", "name="},
        {HEAD ",\"files\":[" ENTRY("a\\nb") "]", "name="},
        {HEAD ",\"files\":[" ENTRY("a\\u0000b") "]", "NUL"},
        {HEAD ",\"files\":[" ENTRY("manifest.json") "]", "name="},
        {HEAD ",\"files\":[" ENTRY("a") "," ENTRY("b") "," ENTRY("a") "]", "twice"},
        {HEAD ",\"files\":[{\"name\":\"a\",\"size\":-1}]", "size=-1"},
        {HEAD ",\"files\":[{\"name\":\"a\",\"size\":9223372036854775807}]", "size="},
        {HEAD ",\"files\":[{\"name\":\"a\",\"size\":1,\"sha256\":\"" SHA "\",\"xxh3\":[]}]",
         "xxh3"},
        {HEAD ",\"files\":[{\"name\":\"a\",\"size\":1,\"sha256\":\"" SHA "\",\"xxh3\":[\"zz\"]}]",
         "xxh3[0]"},
        {HEAD ",\"files\":[{\"name\":\"a\",\"size\":0,\"sha256\":\"0\",\"xxh3\":[]}]", "sha256"},
    };
    static char text[4096];
    qs_manifest m;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        size_t bytes = sealed(text, cases[i].fields);
        cr_assert_neq(qs_manifest_parse(text, bytes, "M", &m), QS_OK, "%s", cases[i].fields);
        cr_assert_not_null(strstr(qs_error_text(), cases[i].words), "%s: %s", cases[i].fields,
                           qs_error_text());
        qs_error_clear();
    }
    size_t bytes = sealed(text, HEAD ",\"files\":[" ENTRY("a") "],\"x\":[1]");
    CR_OK(qs_manifest_parse(text, bytes, "M", &m));
    cr_assert_str_eq(m.meta_json, "{\"x\": [1]}");
    qs_manifest_free(&m);
}

/* It then counts as one no longer. */
Test(manifest, a_removal_that_is_cut_short_leaves_no_manifest)
{
    char path[128], inner[160], name[160];
    make_step(5, path);
    (void)snprintf(inner, sizeof inner, "%s/by_hand", path);
    (void)snprintf(name, sizeof name, "%s/manifest.json", path);
    cr_assert_eq(mkdir(inner, 0777), 0); /* which is not ours to remove */
    cr_assert_eq(qs_manifest_remove_dir(path), QS_ERR_IO);
    cr_assert_neq(access(name, F_OK), 0);
    cr_assert_eq(access(inner, F_OK), 0);
    qs_error_clear();
    cr_assert_eq(rmdir(inner), 0);
    CR_OK(qs_manifest_remove_dir(path));
    CR_OK(qs_manifest_remove_dir(path)); /* missing is fine */
}

Test(manifest, listing_takes_checkpoints_only_newest_first)
{
    char path[128];
    char name[320];
    int64_t steps[8];
    int count = -1;
    static const int64_t made[] = {7, 100, 12, 123456789};
    for (int i = 0; i < 4; i++) {
        make_step(made[i], path);
    }
    (void)snprintf(name, sizeof name, "%s/step-00000200", dir); /* no manifest */
    CR_OK(qs_io_mkdir(name));
    (void)snprintf(name, sizeof name, "%s/step-00000100.tmp-run", dir);
    CR_OK(qs_io_mkdir(name));
    (void)snprintf(name, sizeof name, "%s/step-12", dir); /* not eight digits */
    CR_OK(qs_io_mkdir(name));
    make_step(300, path);
    flip(path, "manifest.json", 30, 1);
    make_step(400, path);
    (void)snprintf(name, sizeof name, "%s/step-00000401", dir); /* renamed by hand */
    CR_OK(qs_io_rename(path, name));
    CR_OK(qs_manifest_list(dir, steps, 8, &count));
    cr_assert_eq(count, 4);
    cr_assert_eq(steps[0], 123456789);
    cr_assert_eq(steps[1], 100);
    cr_assert_eq(steps[2], 12);
    cr_assert_eq(steps[3], 7);
    CR_OK(qs_manifest_list(dir, steps, 2, &count));
    cr_assert_eq(count, 2);
    cr_assert_eq(steps[1], 100);
    cr_assert_str_eq(qs_error_text(), "", "what is no checkpoint is no error");
    (void)snprintf(name, sizeof name, "%s/none", dir);
    CR_OK(qs_manifest_list(name, steps, 8, &count));
    cr_assert_eq(count, 0);
}
