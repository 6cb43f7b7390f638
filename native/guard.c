#include "guard.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "ggml.h"
#include "worker.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
struct guarded {
    struct hb_worker *worker;
    const char *what;
    bool remote, failed, silent; /* silent: failed as it does not answer, and its thread may come back */
};

/* Those that are lost stay. */
static struct guarded *guarded;
static int n_guarded, n_room;
static ggml_abort_callback_t before;

static _Noreturn void never_return(void) {
    for (;;) {
        pause();
    }
}

static bool uses(const struct guarded *g, const char *what) {
    return g->what != NULL && strcmp(g->what, what) == 0;
}

static bool has_failed(const char *what) {
    bool failed = false;
    for (int i = 0; i < n_guarded; i++) {
        failed = failed || (guarded[i].failed && uses(&guarded[i], what));
    }
    return failed;
}

static bool lose_if(bool (*is_meant)(const struct guarded *), const char *why) {
    bool any = false;
    for (int i = 0; i < n_guarded; i++) {
        if (is_meant(&guarded[i])) {
            hb_worker_lose(guarded[i].worker, why);
            guarded[i].failed = any = true;
            guarded[i].silent = false;
        }
    }
    pthread_cond_broadcast(&changed);
    return any;
}

static bool is_mine(const struct guarded *g) {
    return g->worker == hb_worker_current();
}

static bool is_remote(const struct guarded *g) {
    return g->remote && !g->failed;
}

static bool is_silent(const struct guarded *g) {
    return g->remote && g->silent;
}

static bool is_busy(const struct guarded *g) {
    return is_remote(g) && hb_worker_is_busy(g->worker);
}

static bool shares_one(const struct guarded *g) {
    return is_remote(g) && g->what != NULL && has_failed(g->what);
}

/* Whether it is a worker's failure, all of which are told. */
static bool lose(const char *why, bool remote) {
    pthread_mutex_lock(&lock);
    bool any = lose_if(is_mine, why);
    if (!any && remote && hb_worker_current() == NULL) {
        any = lose_if(is_busy, why) || lose_if(is_remote, why) || lose_if(is_silent, why);
        (void) lose_if(shares_one, why);
    }
    pthread_mutex_unlock(&lock);
    return any;
}

/* "path/ggml-rpc.cpp:566: what is wrong" */
static void on_abort(const char *message) {
    const char *text = strstr(message, ": ");
    text = text != NULL ? text + 2 : message;
    char why[256];
    snprintf(why, sizeof why, "%.*s", (int) strcspn(text, "\n"), text);
    if (lose(why, strstr(message, "ggml-rpc") != NULL)) {
        never_return();
    }
    if (before != NULL) {
        before(message);
    } else {
        fprintf(stderr, "%s\n", message);
    }
}

static bool grow(void) {
    int n = n_room > 0 ? 2 * n_room : 8;
    struct guarded *more = realloc(guarded, (size_t) n * sizeof *more);
    if (more != NULL) {
        guarded = more;
        n_room = n;
    }
    return more != NULL;
}

bool hb_guard_add(struct hb_worker *worker, const char *what, bool remote) {
    pthread_mutex_lock(&lock);
    bool room = n_guarded < n_room || grow();
    if (room) {
        guarded[n_guarded++] = (struct guarded) {.worker = worker, .what = what, .remote = remote};
        if (n_guarded == 1) {
            before = ggml_set_abort_callback(on_abort);
        }
    }
    pthread_mutex_unlock(&lock);
    return room;
}

void hb_guard_fail(struct hb_worker *worker) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < n_guarded; i++) {
        bool now = guarded[i].worker == worker && !guarded[i].failed;
        guarded[i].silent = guarded[i].silent || now;
        guarded[i].failed = guarded[i].failed || now;
    }
    pthread_mutex_unlock(&lock);
}

bool hb_guard_has_failed(const char *what) {
    pthread_mutex_lock(&lock);
    bool failed = has_failed(what);
    pthread_mutex_unlock(&lock);
    return failed;
}

bool hb_guard_has(const char *what) {
    bool any = false;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < n_guarded; i++) {
        any = any || (!guarded[i].failed && uses(&guarded[i], what));
    }
    pthread_mutex_unlock(&lock);
    return any;
}

static bool is_any_silent(const char *what) {
    bool any = false;
    for (int i = 0; i < n_guarded; i++) {
        any = any || (guarded[i].silent && uses(&guarded[i], what));
    }
    return any;
}

void hb_guard_wait_for_silent(const char *what, int seconds) {
    struct timespec end;
    clock_gettime(CLOCK_REALTIME, &end);
    end.tv_sec += seconds;
    pthread_mutex_lock(&lock);
    for (int error = 0; is_any_silent(what) && error == 0;) {
        error = pthread_cond_timedwait(&changed, &lock, &end);
    }
    pthread_mutex_unlock(&lock);
}

void hb_guard_remove(struct hb_worker *worker) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < n_guarded; i++) {
        if (guarded[i].worker == worker) {
            guarded[i] = guarded[--n_guarded];
            break;
        }
    }
    if (n_guarded == 0) {
        (void) ggml_set_abort_callback(before);
    }
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}
