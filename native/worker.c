#include "worker.h"

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

struct hb_worker {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t submitted, changed;
    struct hb_task *first, *last;
    bool busy, closing, lost;
    char why[256];
};

static _Thread_local struct hb_worker *current;

static struct hb_task *take(struct hb_worker *w) {
    while (w->first == NULL && !w->closing) {
        pthread_cond_wait(&w->submitted, &w->lock);
    }
    struct hb_task *task = w->lost ? NULL : w->first;
    if (task != NULL) {
        w->first = task->next;
        w->last = w->first == NULL ? NULL : w->last;
    }
    return task;
}

static void *work(void *argument) {
    struct hb_worker *w = current = argument;
    pthread_mutex_lock(&w->lock);
    for (struct hb_task *task = take(w); task != NULL; task = take(w)) {
        w->busy = true;
        pthread_mutex_unlock(&w->lock);
        task->run(task->context);
        pthread_mutex_lock(&w->lock);
        w->busy = false;
        task->done = true;
        pthread_cond_broadcast(&w->changed);
    }
    pthread_mutex_unlock(&w->lock);
    return NULL;
}

/* Signals are for the threads of the program. */
static int start(struct hb_worker *w) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&w->thread, NULL, work, w);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error;
}

static void destroy(struct hb_worker *w) {
    pthread_cond_destroy(&w->changed);
    pthread_cond_destroy(&w->submitted);
    pthread_mutex_destroy(&w->lock);
    free(w);
}

struct hb_worker *hb_worker_new(void) {
    struct hb_worker *w = calloc(1, sizeof *w);
    if (w == NULL) {
        return NULL;
    }
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->submitted, NULL);
    pthread_cond_init(&w->changed, NULL);
    if (start(w) != 0) {
        destroy(w);
        return NULL;
    }
    return w;
}

void hb_worker_submit(struct hb_worker *w, struct hb_task *task, bool urgent) {
    task->done = false;
    pthread_mutex_lock(&w->lock);
    task->next = urgent ? w->first : NULL;
    if (w->first == NULL || urgent) {
        w->last = w->first == NULL ? task : w->last;
        w->first = task;
    } else {
        w->last->next = task;
        w->last = task;
    }
    pthread_cond_signal(&w->submitted);
    pthread_mutex_unlock(&w->lock);
}

static struct timespec after(int timeout_ms) {
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    t.tv_sec += timeout_ms / 1000;
    t.tv_nsec += (long) (timeout_ms % 1000) * 1000000;
    t.tv_sec += t.tv_nsec / 1000000000;
    t.tv_nsec %= 1000000000;
    return t;
}

bool hb_worker_done(struct hb_worker *w, struct hb_task *task, int timeout_ms) {
    struct timespec end = after(timeout_ms > 0 ? timeout_ms : 0);
    pthread_mutex_lock(&w->lock);
    int error = timeout_ms == 0;
    while (!task->done && !w->lost && error == 0) {
        error = timeout_ms > 0 ? pthread_cond_timedwait(&w->changed, &w->lock, &end)
                               : pthread_cond_wait(&w->changed, &w->lock);
    }
    bool done = task->done;
    pthread_mutex_unlock(&w->lock);
    return done;
}

bool hb_worker_call(struct hb_worker *w, void (*run)(void *context), void *context) {
    struct hb_task task = {.run = run, .context = context};
    if (hb_worker_is_lost(w)) {
        return false;
    }
    hb_worker_submit(w, &task, true);
    return hb_worker_done(w, &task, HB_WORKER_FOREVER);
}

bool hb_worker_is_lost(struct hb_worker *w) {
    pthread_mutex_lock(&w->lock);
    bool lost = w->lost;
    pthread_mutex_unlock(&w->lock);
    return lost;
}

bool hb_worker_is_busy(struct hb_worker *w) {
    pthread_mutex_lock(&w->lock);
    bool busy = w->busy;
    pthread_mutex_unlock(&w->lock);
    return busy;
}

void hb_worker_lose(struct hb_worker *w, const char *why) {
    pthread_mutex_lock(&w->lock);
    if (!w->lost) {
        snprintf(w->why, sizeof w->why, "%s", why);
        w->lost = true;
    }
    pthread_cond_broadcast(&w->changed);
    pthread_mutex_unlock(&w->lock);
}

void hb_worker_reason(struct hb_worker *w, char *text, unsigned long length) {
    pthread_mutex_lock(&w->lock);
    snprintf(text, length, "%s", w->why);
    pthread_mutex_unlock(&w->lock);
}

struct hb_worker *hb_worker_current(void) {
    return current;
}

bool hb_worker_close(struct hb_worker *w) {
    if (w == NULL) {
        return true;
    }
    pthread_mutex_lock(&w->lock);
    bool lost = w->lost;
    w->closing = true;
    pthread_cond_signal(&w->submitted);
    pthread_mutex_unlock(&w->lock);
    if (lost) {
        pthread_detach(w->thread);
        return false;
    }
    pthread_join(w->thread, NULL);
    destroy(w);
    return true;
}
