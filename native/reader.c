#include "reader.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* Large enough for a disk's full speed, small enough that several threads share one expert. */
#define BLOCK ((size_t) 2 << 20)
#define BOUNCE_BYTES (BLOCK + 2 * HB_PAGE)

struct queue {
    struct hb_job *head, *tail;
};

struct hb_reader {
    pthread_mutex_t lock; /* guards everything below but the threads; never held over I/O */
    pthread_cond_t work, done;
    struct queue waiting[2]; /* by urgency: jobs with blocks not yet taken */
    struct queue finished;
    int32_t under_way; /* submitted and not yet collected */
    bool stopping;
    pid_t pid; /* of the process that has the threads */
    uint64_t bytes, calls;
    int32_t n_threads;
    pthread_t threads[];
};

struct block {
    struct hb_job *job;
    const struct hb_piece *piece;
    size_t position, length;
};

static void append(struct queue *queue, struct hb_job *job) {
    job->next = NULL;
    job->previous = queue->tail;
    *(queue->tail != NULL ? &queue->tail->next : &queue->head) = job;
    queue->tail = job;
}

static void take_out(struct queue *queue, struct hb_job *job) {
    *(job->previous != NULL ? &job->previous->next : &queue->head) = job->next;
    *(job->next != NULL ? &job->next->previous : &queue->tail) = job->previous;
}

static bool is_waiting(const struct hb_job *job) {
    return job->piece < job->n_pieces;
}

static struct hb_job *first_waiting(const struct hb_reader *r) {
    return r->waiting[HB_DEMAND].head != NULL ? r->waiting[HB_DEMAND].head : r->waiting[HB_AHEAD].head;
}

/* Caller holds the lock, and the job waits. Block boundaries fall on aligned file offsets, so that neighbouring
 * direct reads of one piece do not overlap in memory. */
static struct block take_block(struct hb_reader *r, struct hb_job *job) {
    const struct hb_piece *piece = &job->pieces[job->piece];
    size_t to_boundary = BLOCK - (size_t) ((piece->offset + job->position) % HB_PAGE);
    size_t left = piece->length - job->position;
    struct block block = {job, piece, job->position, left < to_boundary ? left : to_boundary};
    job->position += block.length;
    job->blocks_pending++;
    if (job->position == piece->length) {
        job->position = 0;
        job->piece++;
    }
    if (!is_waiting(job)) {
        take_out(&r->waiting[job->urgency], job);
    }
    return block;
}

/* Returns 0, an errno value or HB_SHORT_READ. */
static int read_block(const struct block *b, char *bounce) {
    const struct hb_piece *piece = b->piece;
    const struct hb_file *file = piece->file;
    uint64_t offset = piece->offset + b->position;
    char *dst = piece->dst + b->position;
    size_t lead = (size_t) (offset % file->align);
    size_t span = (lead + b->length + file->align - 1) / file->align * file->align;
    char *target = piece->bounce ? bounce : dst - lead;
    size_t got = 0;
    int error = hb_file_read(file, target, span, offset - lead, &got);
    if (error != 0) {
        return error;
    }
    if (got < lead + b->length) {
        return HB_SHORT_READ;
    }
    if (piece->bounce) {
        memcpy(dst, bounce + lead, b->length);
    }
    return 0;
}

/* True when it was the job's last. */
static bool finish_block(struct hb_reader *r, const struct block *b, int error) {
    struct hb_job *job = b->job;
    if (error != 0 && job->error == 0) {
        job->error = error;
        job->error_file = b->piece->file_index;
        job->error_offset = b->piece->offset + b->position;
    }
    job->done += error == 0 ? b->length : 0;
    r->bytes += error == 0 ? b->length : 0;
    r->calls++;
    return --job->blocks_pending == 0 && !is_waiting(job);
}

/* Caller holds the lock. */
static void finish_job(struct hb_reader *r, struct hb_job *job) {
    if (job->error == 0 && job->finish != NULL) {
        pthread_mutex_unlock(&r->lock);
        job->finish(job);
        pthread_mutex_lock(&r->lock);
    }
    append(&r->finished, job);
    pthread_cond_signal(&r->done);
}

static void *worker(void *argument) {
    struct hb_reader *r = argument;
    void *bounce = NULL;
    if (posix_memalign(&bounce, HB_PAGE, BOUNCE_BYTES) != 0) {
        bounce = NULL;
    }
    pthread_mutex_lock(&r->lock);
    for (;;) {
        struct hb_job *job;
        while ((job = first_waiting(r)) == NULL && !r->stopping) {
            pthread_cond_wait(&r->work, &r->lock);
        }
        if (job == NULL) {
            break;
        }
        struct block block = take_block(r, job);
        pthread_mutex_unlock(&r->lock);
        int error = block.piece->bounce && bounce == NULL ? ENOMEM : read_block(&block, bounce);
        pthread_mutex_lock(&r->lock);
        if (finish_block(r, &block, error)) {
            finish_job(r, job);
        }
    }
    pthread_mutex_unlock(&r->lock);
    free(bounce);
    return NULL;
}

int hb_reader_open(struct hb_reader **out, int threads) {
    struct hb_reader *r = calloc(1, sizeof *r + (size_t) threads * sizeof r->threads[0]);
    if (r == NULL) {
        return ENOMEM;
    }
    r->pid = getpid();
    pthread_mutex_init(&r->lock, NULL);
    pthread_cond_init(&r->work, NULL);
    pthread_cond_init(&r->done, NULL);
    while (r->n_threads < threads) {
        int error = pthread_create(&r->threads[r->n_threads], NULL, worker, r);
        if (error != 0) {
            hb_reader_close(r);
            return error;
        }
        r->n_threads++;
    }
    *out = r;
    return 0;
}

void hb_reader_close(struct hb_reader *r) {
    if (r == NULL) {
        return;
    }
    if (r->pid != getpid()) {
        free(r); /* nothing to join, and whether the lock was held is unknown */
        return;
    }
    pthread_mutex_lock(&r->lock);
    r->stopping = true;
    pthread_cond_broadcast(&r->work);
    pthread_mutex_unlock(&r->lock);
    for (int32_t i = 0; i < r->n_threads; i++) {
        pthread_join(r->threads[i], NULL);
    }
    pthread_cond_destroy(&r->done);
    pthread_cond_destroy(&r->work);
    pthread_mutex_destroy(&r->lock);
    free(r);
}

/* Not more threads than there are blocks. The caller has given the lock back: a thread that wakes up on the
 * submitter's core would take it only to wait for the lock. */
static void wake_workers(struct hb_reader *r, const struct hb_job *job) {
    size_t n_blocks = 0;
    for (int32_t i = 0; i < job->n_pieces; i++) {
        n_blocks += 1 + job->pieces[i].length / BLOCK;
    }
    if (n_blocks >= (size_t) r->n_threads) {
        pthread_cond_broadcast(&r->work);
        return;
    }
    for (; n_blocks > 0; n_blocks--) {
        pthread_cond_signal(&r->work);
    }
}

void hb_reader_submit(struct hb_reader *r, struct hb_job *job, enum hb_urgency urgency) {
    job->error = 0;
    job->urgency = urgency;
    job->piece = 0;
    job->position = 0;
    job->done = 0;
    job->blocks_pending = 0;
    bool forked = r->pid != getpid();
    if (forked) {
        job->error = HB_FORKED;
        job->piece = job->n_pieces;
    }
    pthread_mutex_lock(&r->lock);
    r->under_way++;
    append(forked ? &r->finished : &r->waiting[urgency], job);
    pthread_mutex_unlock(&r->lock);
    if (!forked) {
        wake_workers(r, job);
    }
}

struct hb_job *hb_reader_next(struct hb_reader *r, bool wait) {
    pthread_mutex_lock(&r->lock);
    while (wait && r->finished.head == NULL && r->under_way > 0) {
        pthread_cond_wait(&r->done, &r->lock);
    }
    struct hb_job *job = r->finished.head;
    if (job != NULL) {
        take_out(&r->finished, job);
        r->under_way--;
    }
    pthread_mutex_unlock(&r->lock);
    return job;
}

bool hb_reader_promote(struct hb_reader *r, struct hb_job *job) {
    pthread_mutex_lock(&r->lock);
    if (is_waiting(job) && job->urgency == HB_AHEAD) {
        take_out(&r->waiting[HB_AHEAD], job);
        job->urgency = HB_DEMAND;
        append(&r->waiting[HB_DEMAND], job);
    }
    bool good = job->error != ECANCELED;
    pthread_mutex_unlock(&r->lock);
    return good;
}

/* Caller holds the lock, and the job waits. An error that a block met before gives way: the job's end is of no
 * interest any more. */
static void cancel(struct hb_reader *r, struct hb_job *job) {
    take_out(&r->waiting[job->urgency], job);
    job->piece = job->n_pieces;
    job->error = ECANCELED;
    if (job->blocks_pending == 0) {
        append(&r->finished, job);
    }
}

void hb_reader_cancel(struct hb_reader *r, struct hb_job *job) {
    pthread_mutex_lock(&r->lock);
    if (is_waiting(job)) {
        cancel(r, job);
    }
    pthread_mutex_unlock(&r->lock);
}

void hb_reader_withdraw(struct hb_reader *r) {
    pthread_mutex_lock(&r->lock);
    for (int urgency = HB_DEMAND; urgency <= HB_AHEAD; urgency++) {
        for (struct hb_job *job = r->waiting[urgency].head, *next; job != NULL; job = next) {
            next = job->next;
            bool begun = job->piece > 0 || job->position > 0;
            if (urgency == HB_AHEAD || !begun) {
                cancel(r, job);
            }
        }
    }
    pthread_mutex_unlock(&r->lock);
}

void hb_reader_counters(struct hb_reader *r, uint64_t *bytes, uint64_t *calls) {
    pthread_mutex_lock(&r->lock);
    *bytes = r->bytes;
    *calls = r->calls;
    pthread_mutex_unlock(&r->lock);
}
