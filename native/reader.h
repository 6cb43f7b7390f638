/* Worker threads that bring pieces of files into memory: first what somebody waits for, then what may be of use.
 *
 * A job is a set of pieces that arrive together (the matrices of one expert). The caller owns the job and its
 * destination memory; from hb_reader_submit until hb_reader_next returns it, both belong to the reader. Jobs are
 * cut into blocks, and the workers always take the next block of the oldest demand job; only while there is none, of
 * the oldest job ahead. So all threads work on one job, jobs of one urgency finish in about the order submitted, and
 * a demand waits for at most one block a thread of what was begun ahead. Knows nothing of experts. One thread at a
 * time submits, promotes, cancels and collects; the workers do the rest. Nothing is allocated after hb_reader_open.
 */
#ifndef HB_READER_H
#define HB_READER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "os.h"

#define HB_JOB_PIECES 8

/* With `bounce`, the bytes pass through a worker's aligned buffer because `dst` and `offset` disagree modulo the
 * file's alignment; without it a direct read may write the aligned superset of [dst, dst + length). */
struct hb_piece {
    const struct hb_file *file;
    int32_t file_index; /* for messages */
    bool bounce;
    uint64_t offset;
    size_t length;
    char *dst;
};

enum hb_urgency {
    HB_DEMAND, /* somebody waits for it, or soon will */
    HB_AHEAD,  /* a guess: read while the disk has nothing better to do */
};

struct hb_job {
    struct hb_piece pieces[HB_JOB_PIECES];
    int32_t n_pieces;
    void *owner;            /* the caller's */
    void (*finish)(struct hb_job *job); /* called by a worker when all pieces are there, before it counts as done */
    int error;              /* 0, an errno value (ECANCELED: see below), HB_SHORT_READ or HB_FORKED */
    int32_t error_file;     /* file_index of the piece that failed */
    uint64_t error_offset;  /* where */
    struct hb_job *next, *previous; /* the rest is the reader's */
    enum hb_urgency urgency;
    int32_t piece;          /* with `position`, where the next block begins; n_pieces: all are taken, or dropped */
    size_t position;
    size_t done;            /* bytes read */
    int32_t blocks_pending; /* taken and not yet read */
};

#define HB_SHORT_READ (-1) /* the file ended before the piece did */
#define HB_FORKED (-2)     /* submitted in a process forked from the reader's: its threads are not there */

struct hb_reader;

/* `threads` > 0. Returns 0 or an errno value. */
int hb_reader_open(struct hb_reader **out, int threads);
/* Waits for submitted jobs, joins the threads. NULL is fine. */
void hb_reader_close(struct hb_reader *reader);

/* A job has at least one piece, and no piece is empty. */
void hb_reader_submit(struct hb_reader *reader, struct hb_job *job, enum hb_urgency urgency);
/* The next finished job; NULL when none has finished (and `wait` is false) or none is under way. */
struct hb_job *hb_reader_next(struct hb_reader *reader, bool wait);

/* The next three are for jobs that were submitted and not yet collected. */

/* A job ahead becomes the last of the demand jobs, with what is left of it; others stay as they are. False when it was
 * cancelled: then it is not to be waited for, but to be submitted again when it has finished. */
bool hb_reader_promote(struct hb_reader *reader, struct hb_job *job);
/* The blocks that no worker has taken yet are dropped; the job finishes, with the error ECANCELED, when those under
 * way have ended: at once if there are none. A job of which all blocks are taken is not affected. */
void hb_reader_cancel(struct hb_reader *reader, struct hb_job *job);
/* Cancel all jobs ahead, and the demand jobs of which nothing was taken yet. */
void hb_reader_withdraw(struct hb_reader *reader);

void hb_reader_counters(struct hb_reader *reader, uint64_t *bytes, uint64_t *calls);

#endif
