/* A thread that runs tasks one after another: what talks to a device. Libraries for devices end the process when
 * something is wrong, where a hook can keep the thread that they do it in from ever returning; the worker is then lost
 * with its thread, the task that it was in and those behind it, and its owner is told instead of waiting for ever. */
#ifndef HB_WORKER_H
#define HB_WORKER_H

#include <stdbool.h>

struct hb_worker;

/* The caller's, as what `context` points at, until it is done. Of a lost worker, `context` stays as it is for ever. */
struct hb_task {
    void (*run)(void *context);
    void *context;
    bool done; /* the rest is the worker's */
    struct hb_task *next;
};

#define HB_WORKER_FOREVER (-1)

struct hb_worker *hb_worker_new(void); /* NULL when memory is short, or no thread can be had */
/* After those submitted before; or, if it is urgent, before all that have not begun. */
void hb_worker_submit(struct hb_worker *worker, struct hb_task *task, bool urgent);
/* Whether the task is done, after so many milliseconds at most. False at once when the worker is lost. */
bool hb_worker_done(struct hb_worker *worker, struct hb_task *task, int timeout_ms);
/* Run the task and wait for it; false: the worker is lost. */
bool hb_worker_call(struct hb_worker *worker, void (*run)(void *context), void *context);
bool hb_worker_is_lost(struct hb_worker *worker);
bool hb_worker_is_busy(struct hb_worker *worker); /* in a task */
/* From any thread: the task that runs will never end, and no other will begin. `why` is kept. */
void hb_worker_lose(struct hb_worker *worker, const char *why);
/* Why it is lost, else "". */
void hb_worker_reason(struct hb_worker *worker, char *text, unsigned long length);
struct hb_worker *hb_worker_current(void); /* whose thread this is, or NULL */
/* Does what was submitted, and ends; NULL is fine. A lost worker is left as it is, and false returned: its thread still
 * has it. */
bool hb_worker_close(struct hb_worker *worker);

#endif
