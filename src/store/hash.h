/* Hashes: XXH3 for what is read on every start, SHA-256 for provenance and manifests. */
#ifndef QS_STORE_HASH_H
#define QS_STORE_HASH_H

#include <stddef.h>
#include <stdint.h>

enum { QS_SHA256_HEX = 65, QS_XXH128_HEX = 33 };

uint64_t qs_xxh3_64(const void *data, size_t bytes);

/** XXH3-64 over several pieces as if they were one; at most 4 pieces. */
typedef struct {
    const void *data;
    size_t bytes;
} qs_piece;
uint64_t qs_xxh3_64_pieces(const qs_piece *pieces, int count);

/** XXH3-128, canonical, as 32 hex digits and NUL. */
void qs_xxh3_128_hex(const void *data, size_t bytes, char out[QS_XXH128_HEX]);

typedef struct qs_xxh3_128 qs_xxh3_128; /* streaming */
qs_xxh3_128 *qs_xxh3_128_begin(void);   /* NULL without memory */
void qs_xxh3_128_add(qs_xxh3_128 *s, const void *data, size_t bytes);
void qs_xxh3_128_end(qs_xxh3_128 *s, char out[QS_XXH128_HEX]); /* frees s */

/** SHA-256 as 64 hex digits and NUL. */
void qs_sha256_hex(const void *data, size_t bytes, char out[QS_SHA256_HEX]);

typedef struct qs_sha256 qs_sha256; /* streaming */
qs_sha256 *qs_sha256_begin(void);   /* NULL without memory */
void qs_sha256_add(qs_sha256 *s, const void *data, size_t bytes);
void qs_sha256_end(qs_sha256 *s, char out[QS_SHA256_HEX]); /* frees s */

#endif
