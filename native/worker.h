/* Threads that run tasks, each of them one after another: what talks to a device, one computing and one copying where
 * it can do both at the same time. Libraries for devices end the process when something is wrong, where a hook can keep
 * the thread that they do it in from ever returning; the worker is then lost with all its threads, the tasks that they
 * were in and those behind them, and its owner is told instead of waiting for ever. */
#ifndef HB_WORKER_H
#define HB_WORKER_H

#include <stdbool.h>
#include <stdint.h>

struct hb_worker;

/* A process that was forked has none of the threads: in it a worker is lost. */

/* Which thread runs a task. */
enum { HB_COMPUTES, HB_COPIES, HB_WORKER_THREADS };

/* The caller's, as what `context` points at, until it is done. Of a lost worker, `context` stays as it is for ever. */
struct hb_task {
    void (*run)(void *context);
    void *context;
    bool done; /* the rest is the worker's */
    bool urgent;
    struct hb_task *next;
};

#define HB_WORKER_FOREVER (-1)

struct hb_worker *hb_worker_new(int n_threads); /* NULL when memory is short, or a thread cannot be had */
/* After those submitted before; or, if it is urgent, before those that are not and have not begun. */
void hb_worker_submit(struct hb_worker *worker, int thread, struct hb_task *task, bool urgent);
/* Whether the task is done, after so many milliseconds at most. False at once when the worker is lost. */
bool hb_worker_done(struct hb_worker *worker, struct hb_task *task, int timeout_ms);
/* How many tasks have ended; and wait until that is another number, or the worker is lost: false, if for so long it is
 * not. */
uint64_t hb_worker_ended(const struct hb_worker *worker);
bool hb_worker_wait(struct hb_worker *worker, uint64_t ended, int timeout_ms);
uint64_t hb_worker_busy_ns(struct hb_worker *worker); /* in which a thread was in a task, or both were */
/* Have the first thread run the task before all others, and wait for it so many milliseconds, after which the worker is
 * lost: it does not answer. False: it is lost. */
bool hb_worker_call(struct hb_worker *worker, struct hb_task *task, int timeout_ms);
bool hb_worker_is_lost(const struct hb_worker *worker);
bool hb_worker_is_busy(struct hb_worker *worker); /* in a task */
/* From any thread: the tasks that run will perhaps never end, that of this thread for sure, and no other will begin.
 * `why` is kept. */
void hb_worker_lose(struct hb_worker *worker, const char *why);
/* Of a lost worker: what its first thread does once it comes back and the worker is closed, if ever. */
void hb_worker_last(struct hb_worker *worker, struct hb_task *task);
/* Of a lost worker: give the tasks that may still end so many milliseconds. */
void hb_worker_rest(struct hb_worker *worker, int timeout_ms);
/* Why it is lost, else "". */
void hb_worker_reason(struct hb_worker *worker, char *text, unsigned long length);
struct hb_worker *hb_worker_current(void); /* whose thread this is, or NULL */
/* Does what was submitted, and ends; NULL is fine. A lost worker is left as it is, and false returned: its threads still
 * have it. */
bool hb_worker_close(struct hb_worker *worker);

#endif
