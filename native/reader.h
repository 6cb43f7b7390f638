/* Worker threads that bring pieces of files into memory.
 *
 * A job is a set of pieces that arrive together (the matrices of one expert). The caller owns the job and its
 * destination memory; from hb_reader_submit until hb_reader_next returns it, both belong to the reader. Jobs are
 * cut into blocks so that all threads work on the oldest job; jobs finish in about the order submitted. Knows
 * nothing of experts. One thread submits and collects; the workers do the rest.
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

struct hb_job {
    struct hb_piece pieces[HB_JOB_PIECES];
    int32_t n_pieces;
    void *owner;            /* the caller's */
    void (*finish)(struct hb_job *job); /* called by a worker when all pieces are there, before it counts as done */
    int error;              /* 0, an errno value, HB_SHORT_READ or HB_FORKED */
    int32_t error_file;     /* file_index of the piece that failed */
    uint64_t error_offset;  /* where */
    struct hb_job *next;    /* the rest is the reader's */
    int32_t piece;
    size_t position;
    int32_t blocks_pending;
};

#define HB_SHORT_READ (-1) /* the file ended before the piece did */
#define HB_FORKED (-2)     /* submitted in a process forked from the reader's: its threads are not there */

struct hb_reader;

/* `threads` > 0. Returns 0 or an errno value. */
int hb_reader_open(struct hb_reader **out, int threads);
/* Waits for submitted jobs, joins the threads. NULL is fine. */
void hb_reader_close(struct hb_reader *reader);

/* A job has at least one piece, and no piece is empty. */
void hb_reader_submit(struct hb_reader *reader, struct hb_job *job);
/* The next finished job; NULL when none has finished (and `wait` is false) or none is under way. */
struct hb_job *hb_reader_next(struct hb_reader *reader, bool wait);

/* Jobs of which nothing was read yet finish at once, with the error ECANCELED. */
void hb_reader_withdraw(struct hb_reader *reader);

void hb_reader_counters(struct hb_reader *reader, uint64_t *bytes, uint64_t *calls);

#endif
