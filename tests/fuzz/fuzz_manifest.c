/* Fuzz target of the manifest parser. The input is parsed as it is, which nearly always ends at the
 * self hash; and once more with a right hash put behind it, as a forger would, which reaches every
 * field. What is accepted must keep the promises that the readers of a checkpoint rely on. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/status.h"
#include "store/manifest.h"

static void require(int condition)
{
    if (!condition) {
        abort();
    }
}

/** A bare file name: nothing that leaves the directory. */
static void require_bare(const char *name)
{
    require(name[0] != '\0' && name[0] != '.' && strlen(name) < 64);
    require(strpbrk(name, "/\\\n") == NULL && strcmp(name, "manifest.json") != 0);
}

static void parse(const char *text, size_t bytes)
{
    qs_manifest m;
    int64_t blocks = 0;
    if (qs_manifest_parse(text, bytes, "fuzz", &m) == QS_OK) {
        require(m.step >= 0 && m.nranks >= 1 && m.n_files >= 1 && m.meta_json != NULL);
        for (int i = 0; i < m.n_files; i++) {
            require_bare(m.files[i].name);
            require(m.files[i].bytes >= 0 && strlen(m.files[i].sha256) == 64);
            blocks += (m.files[i].bytes + QS_MANIFEST_BLOCK_BYTES - 1) / QS_MANIFEST_BLOCK_BYTES;
        }
        for (int64_t b = 0; b < blocks; b++) {
            require(strlen(m.blocks[b]) == 32);
        }
        qs_manifest_free(&m);
    } else {
        require(m.files == NULL && m.blocks == NULL && m.meta_json == NULL);
        require(qs_error_text()[0] != '\0');
    }
    qs_error_clear();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    static const char before[] = ",\n \"self_sha256\": \"";
    static const char after[] = "\"\n}\n";
    char hash[QS_SHA256_HEX];
    char *text = calloc(bytes + sizeof before + sizeof after + 64, 1);
    if (text == NULL) {
        return 0;
    }
    if (bytes > 0) {
        memcpy(text, data, bytes);
    }
    parse(text, bytes);
    int length = (int)bytes + sprintf(text + bytes, "%s%064d%s", before, 0, after);
    qs_sha256_hex(text, (size_t)length, hash);
    memcpy(text + length - 68, hash, 64);
    parse(text, (size_t)length);
    free(text);
    return 0;
}
