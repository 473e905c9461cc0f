/* Hashes: thin wrappers of xxHash and of OpenSSL's SHA-256.
 *
 * Should OpenSSL fail (no memory, a provider that forbids the algorithm), the text is left empty:
 * an empty text equals no hash, so the failure shows as a mismatch and never as a match. */
#include "store/hash.h"

#define XXH_STATIC_LINKING_ONLY /* the state on the stack */
#include <openssl/evp.h>
#include <stdlib.h>
#include <xxhash.h>

enum { SHA256_BYTES = 32, XXH128_BYTES = 16 };

struct qs_sha256 {
    EVP_MD_CTX *ctx;
    int failed;
};

static void to_hex(const unsigned char *bytes, size_t count, char *out)
{
    static const char digits[] = "0123456789abcdef";
    for (size_t i = 0; i < count; i++) {
        out[2 * i] = digits[bytes[i] >> 4];
        out[2 * i + 1] = digits[bytes[i] & 15];
    }
    out[2 * count] = '\0';
}

uint64_t qs_xxh3_64(const void *data, size_t bytes)
{
    return XXH3_64bits(data, bytes);
}

uint64_t qs_xxh3_64_pieces(const qs_piece *pieces, int count)
{
    XXH3_state_t state;
    XXH3_INITSTATE(&state);
    XXH3_64bits_reset(&state);
    for (int i = 0; i < count; i++) {
        if (pieces[i].bytes > 0) {
            XXH3_64bits_update(&state, pieces[i].data, pieces[i].bytes);
        }
    }
    return XXH3_64bits_digest(&state);
}

void qs_xxh3_128_hex(const void *data, size_t bytes, char out[QS_XXH128_HEX])
{
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, XXH3_128bits(data, bytes));
    to_hex(canonical.digest, XXH128_BYTES, out);
}

qs_xxh3_128 *qs_xxh3_128_begin(void)
{
    XXH3_state_t *state = XXH3_createState(); /* aligned as the library wants it */
    if (state != NULL) {
        XXH3_128bits_reset(state);
    }
    return (qs_xxh3_128 *)state;
}

void qs_xxh3_128_add(qs_xxh3_128 *s, const void *data, size_t bytes)
{
    if (bytes > 0) {
        XXH3_128bits_update((XXH3_state_t *)s, data, bytes);
    }
}

void qs_xxh3_128_end(qs_xxh3_128 *s, char out[QS_XXH128_HEX])
{
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest((XXH3_state_t *)s));
    to_hex(canonical.digest, XXH128_BYTES, out);
    XXH3_freeState((XXH3_state_t *)s);
}

void qs_sha256_hex(const void *data, size_t bytes, char out[QS_SHA256_HEX])
{
    unsigned char digest[SHA256_BYTES];
    out[0] = '\0';
    if (EVP_Digest(data, bytes, digest, NULL, EVP_sha256(), NULL) == 1) {
        to_hex(digest, SHA256_BYTES, out);
    }
}

qs_sha256 *qs_sha256_begin(void)
{
    qs_sha256 *s = calloc(1, sizeof *s);
    if (s == NULL) {
        return NULL;
    }
    s->ctx = EVP_MD_CTX_new();
    if (s->ctx == NULL) {
        free(s);
        return NULL;
    }
    s->failed = EVP_DigestInit_ex(s->ctx, EVP_sha256(), NULL) != 1;
    return s;
}

void qs_sha256_add(qs_sha256 *s, const void *data, size_t bytes)
{
    if (bytes > 0 && !s->failed) {
        s->failed = EVP_DigestUpdate(s->ctx, data, bytes) != 1;
    }
}

void qs_sha256_end(qs_sha256 *s, char out[QS_SHA256_HEX])
{
    unsigned char digest[SHA256_BYTES];
    out[0] = '\0';
    if (!s->failed && EVP_DigestFinal_ex(s->ctx, digest, NULL) == 1) {
        to_hex(digest, SHA256_BYTES, out);
    }
    EVP_MD_CTX_free(s->ctx);
    free(s);
}
