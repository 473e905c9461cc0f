/* What manifest.c and manifest_parse.c share: the names and limits of the format. */
#ifndef QS_STORE_MANIFEST_IMPL_H
#define QS_STORE_MANIFEST_IMPL_H

#include "store/manifest.h"

#define QS_MANIFEST_NAME "manifest.json"
#define QS_MANIFEST_FORMAT "qshard-manifest"
#define QS_MANIFEST_ZEROS "0000000000000000000000000000000000000000000000000000000000000000"

enum {
    QS_MANIFEST_VERSION = 1,
    QS_MANIFEST_LIMIT = 64 << 20, /* longest text */
    QS_MANIFEST_TAIL = 64 + 4,    /* a manifest ends in 64 digits and `"\n}\n` */
    QS_MANIFEST_MAX_RANKS = 1 << 20,
};

/** A name that can only be a file of the manifest's own directory. */
bool qs_manifest_name_is_bare(const char *name);

/** One of the keys that the manifest itself uses. */
bool qs_manifest_key_is_ours(const char *key);

/** Blocks of a file of `bytes` bytes. */
int64_t qs_manifest_block_count(int64_t bytes);

#endif
