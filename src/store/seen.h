/* Which ranks see a file. Hosts may have file systems of their own: two workstations, or a cluster
 * whose nodes read from local disks. What a rank's host does not have comes from another rank. */
#ifndef QS_STORE_SEEN_H
#define QS_STORE_SEEN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "comm/comm.h"

typedef struct {
    qs_comm *comm;   /* the ranks that were asked; borrowed. NULL: nobody was, all see the file */
    bool everywhere; /* all ranks see it */
    bool simple;     /* and they are on one host: there is nothing to compare or to send */
    bool mine;       /* this rank does */
    bool compares;   /* this rank has to look at its host's copy: see qs_seen_compare */
    int root;        /* the lowest rank that sees it; 0 where none does */
    int server;      /* the rank that reads for this one; itself where it sees the file */
    size_t piece_bytes; /* of a message, so that no server holds more than 16 MiB */
} qs_seen;

/** Whether qs_seen_read needs no other rank. */
bool qs_seen_by_all(const qs_seen *seen);

/** Find out which ranks can open the file `path`, as it is named on each. Where some cannot, a line
 * of the log says on which hosts and why, and what happens `instead`: a sentence that the name of
 * the root's host ends ("its ranks are sent their shares by").
 * Collective. No error where no rank sees it: `root` then says what is wrong. */
qs_status qs_seen_find(qs_seen *out, const char *path, const char *instead, qs_comm *comm);

/** The same where each rank knows for itself: `error` is 0, or the errno that says why not. */
qs_status qs_seen_agree(qs_seen *out, const char *path, int error, const char *instead,
                        qs_comm *comm);

/** Refuse two files of one name. `mark` says what this rank's file holds in a few words, without
 * the file's name; it counts on `root` and where `compares` is set, after `looked`, which is how
 * looking went. Collective. \return QS_ERR_DISAGREE naming both hosts. */
qs_status qs_seen_compare(const qs_seen *seen, const char *path, qs_status looked,
                          const char *mark);

/** A stretch of a file, and where it goes. */
typedef struct {
    int64_t offset;
    size_t bytes;
    void *to;
} qs_stretch;

/** Read stretches of the file: from `fd` where this rank sees it, else from its server.
 * Collective, unless qs_seen_by_all. `so_far` and what is returned: as in qs_relay. */
qs_status qs_seen_read(const qs_seen *seen, qs_status so_far, int fd, const char *path,
                       const qs_stretch *stretches, int count);

#endif
