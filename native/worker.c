#include "worker.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#include "os.h"

struct thread {
    struct hb_worker *worker;
    pthread_t id;
    pthread_cond_t submitted;
    struct hb_task *first, *last; /* to be done; and the one that it is in, or was, which stays if the worker is lost */
    bool busy, stuck;
};

struct hb_worker {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct thread threads[HB_WORKER_THREADS];
    int n_threads, n_busy;
    uint64_t busy_since, busy_ns;
    atomic_uint_fast64_t n_ended;
    struct hb_task *last; /* see hb_worker_last */
    pid_t process;
    bool closing;
    atomic_bool lost;
    char why[256];
};

static _Thread_local struct thread *current;

static struct hb_task *take(struct thread *t) {
    struct hb_worker *w = t->worker;
    while (!w->closing && (t->first == NULL || w->lost)) {
        pthread_cond_wait(&t->submitted, &w->lock);
    }
    struct hb_task **from = !w->lost ? &t->first : t == w->threads ? &w->last : NULL;
    struct hb_task *task = from != NULL ? *from : NULL;
    if (task != NULL) {
        *from = task->next;
    }
    return task;
}

static void *work(void *argument) {
    struct thread *t = current = argument;
    struct hb_worker *w = t->worker;
    pthread_mutex_lock(&w->lock);
    for (struct hb_task *task = take(t); task != NULL; task = take(t)) {
        t->busy = true;
        t->last = task;
        w->busy_since = w->n_busy++ == 0 ? hb_now_ns() : w->busy_since;
        pthread_mutex_unlock(&w->lock);
        task->run(task->context);
        pthread_mutex_lock(&w->lock);
        t->busy = false;
        w->busy_ns += --w->n_busy == 0 ? hb_now_ns() - w->busy_since : 0;
        task->done = true;
        atomic_fetch_add(&w->n_ended, 1);
        pthread_cond_broadcast(&w->changed);
    }
    pthread_mutex_unlock(&w->lock);
    return NULL;
}

/* Signals are for the threads of the program. */
static int start(struct thread *t) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&t->id, NULL, work, t);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error;
}

struct hb_worker *hb_worker_new(int n_threads) {
    struct hb_worker *w = calloc(1, sizeof *w);
    if (w == NULL) {
        return NULL;
    }
    w->process = getpid();
    pthread_mutex_init(&w->lock, NULL);
    pthread_cond_init(&w->changed, NULL);
    for (int i = 0; i < HB_WORKER_THREADS; i++) {
        w->threads[i].worker = w;
        pthread_cond_init(&w->threads[i].submitted, NULL);
    }
    while (w->n_threads < n_threads) {
        if (start(&w->threads[w->n_threads]) != 0) {
            (void) hb_worker_close(w);
            return NULL;
        }
        w->n_threads++;
    }
    return w;
}

void hb_worker_submit(struct hb_worker *w, int thread, struct hb_task *task, bool urgent) {
    struct thread *t = &w->threads[thread];
    task->done = false;
    task->urgent = urgent;
    if (getpid() != w->process) {
        hb_worker_lose(w, "the process was forked after the model was loaded");
        return;
    }
    pthread_mutex_lock(&w->lock);
    struct hb_task **at = &t->first;
    while (*at != NULL && ((*at)->urgent || !urgent)) {
        at = &(*at)->next;
    }
    task->next = *at;
    *at = task;
    pthread_cond_signal(&t->submitted);
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

/* To be woken takes about as long: who waits has nothing else to do. */
#define SPIN_NS 50000

static void spin(const struct hb_worker *w, uint64_t ended) {
    uint64_t start = hb_now_ns();
    while (atomic_load(&w->n_ended) == ended && !atomic_load(&w->lost) && hb_now_ns() - start < SPIN_NS) {
    }
}

/* Until something changed; 0, if it may have. */
static int pause_until(struct hb_worker *w, int timeout_ms, const struct timespec *end) {
    return timeout_ms > 0 ? pthread_cond_timedwait(&w->changed, &w->lock, end) : pthread_cond_wait(&w->changed, &w->lock);
}

bool hb_worker_done(struct hb_worker *w, struct hb_task *task, int timeout_ms) {
    struct timespec end = after(timeout_ms > 0 ? timeout_ms : 0);
    uint64_t ended = atomic_load(&w->n_ended);
    pthread_mutex_lock(&w->lock);
    int error = timeout_ms == 0;
    bool spins = !task->done && error == 0;
    pthread_mutex_unlock(&w->lock);
    if (spins) {
        spin(w, ended);
    }
    pthread_mutex_lock(&w->lock);
    while (!task->done && !w->lost && error == 0) {
        error = pause_until(w, timeout_ms, &end);
    }
    bool done = task->done;
    pthread_mutex_unlock(&w->lock);
    return done;
}

uint64_t hb_worker_ended(const struct hb_worker *w) {
    return atomic_load(&w->n_ended);
}

bool hb_worker_wait(struct hb_worker *w, uint64_t ended, int timeout_ms) {
    struct timespec end = after(timeout_ms > 0 ? timeout_ms : 0);
    if (timeout_ms != 0) {
        spin(w, ended);
    }
    pthread_mutex_lock(&w->lock);
    int error = timeout_ms == 0;
    while (w->n_ended == ended && !w->lost && error == 0) {
        error = pause_until(w, timeout_ms, &end);
    }
    bool changed = w->n_ended != ended || w->lost;
    pthread_mutex_unlock(&w->lock);
    return changed;
}

uint64_t hb_worker_busy_ns(struct hb_worker *w) {
    pthread_mutex_lock(&w->lock);
    uint64_t ns = w->busy_ns + (w->n_busy > 0 ? hb_now_ns() - w->busy_since : 0);
    pthread_mutex_unlock(&w->lock);
    return ns;
}

bool hb_worker_call(struct hb_worker *w, struct hb_task *task, int timeout_ms) {
    hb_worker_submit(w, HB_COMPUTES, task, true);
    bool done = hb_worker_done(w, task, timeout_ms);
    if (!done) {
        hb_worker_lose(w, "it does not answer");
    }
    return done;
}

bool hb_worker_is_lost(const struct hb_worker *w) {
    return atomic_load(&w->lost);
}

bool hb_worker_is_busy(struct hb_worker *w) {
    pthread_mutex_lock(&w->lock);
    bool busy = w->n_busy > 0;
    pthread_mutex_unlock(&w->lock);
    return busy;
}

void hb_worker_lose(struct hb_worker *w, const char *why) {
    pthread_mutex_lock(&w->lock);
    if (!w->lost) {
        snprintf(w->why, sizeof w->why, "%s", why);
        w->lost = true;
    }
    if (current != NULL && current->worker == w) {
        current->stuck = true;
    }
    pthread_cond_broadcast(&w->changed);
    pthread_mutex_unlock(&w->lock);
}

void hb_worker_last(struct hb_worker *w, struct hb_task *task) {
    pthread_mutex_lock(&w->lock);
    task->next = NULL;
    w->last = task;
    pthread_mutex_unlock(&w->lock);
}

void hb_worker_reason(struct hb_worker *w, char *text, unsigned long length) {
    pthread_mutex_lock(&w->lock);
    snprintf(text, length, "%s", w->why);
    pthread_mutex_unlock(&w->lock);
}

void hb_worker_rest(struct hb_worker *w, int timeout_ms) {
    struct timespec end = after(timeout_ms);
    int error = 0;
    pthread_mutex_lock(&w->lock);
    for (int i = 0; i < w->n_threads; i++) {
        while (w->threads[i].busy && !w->threads[i].stuck && error == 0) {
            error = pause_until(w, timeout_ms, &end);
        }
    }
    pthread_mutex_unlock(&w->lock);
}

struct hb_worker *hb_worker_current(void) {
    return current != NULL ? current->worker : NULL;
}

static void destroy(struct hb_worker *w) {
    for (int i = 0; i < HB_WORKER_THREADS; i++) {
        pthread_cond_destroy(&w->threads[i].submitted);
    }
    pthread_cond_destroy(&w->changed);
    pthread_mutex_destroy(&w->lock);
    free(w);
}

bool hb_worker_close(struct hb_worker *w) {
    if (w == NULL) {
        return true;
    }
    pthread_mutex_lock(&w->lock);
    bool lost = w->lost;
    w->closing = true;
    for (int i = 0; i < w->n_threads; i++) {
        pthread_cond_signal(&w->threads[i].submitted);
    }
    pthread_mutex_unlock(&w->lock);
    for (int i = 0; i < w->n_threads; i++) {
        if (!lost) {
            pthread_join(w->threads[i].id, NULL);
        } else if (getpid() == w->process) {
            pthread_detach(w->threads[i].id);
        }
    }
    if (!lost) {
        destroy(w);
    }
    return !lost;
}
