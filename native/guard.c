#include "guard.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "ggml.h"
#include "worker.h"

#define MOST 64

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct {
    struct hb_worker *worker;
    bool remote;
} guarded[MOST];
static int n_guarded;
static ggml_abort_callback_t before;

static _Noreturn void never_return(void) {
    for (;;) {
        pause();
    }
}

/* Whether it is a worker's failure, all of which are told. */
static bool lose(const char *why, bool remote) {
    bool any = false;
    struct hb_worker *mine = hb_worker_current();
    pthread_mutex_lock(&lock);
    for (int i = 0; i < n_guarded; i++) {
        struct hb_worker *w = guarded[i].worker;
        if (w == mine || (mine == NULL && remote && guarded[i].remote && hb_worker_is_busy(w))) {
            hb_worker_lose(w, why);
            any = true;
        }
    }
    pthread_mutex_unlock(&lock);
    return any;
}

/* "path/ggml-rpc.cpp:566: what is wrong" */
static void on_abort(const char *message) {
    const char *text = strstr(message, ": ");
    if (lose(text != NULL ? text + 2 : message, strstr(message, "ggml-rpc") != NULL)) {
        never_return();
    }
    if (before != NULL) {
        before(message);
    } else {
        fprintf(stderr, "%s\n", message);
    }
}

bool hb_guard_add(struct hb_worker *worker, bool remote) {
    pthread_mutex_lock(&lock);
    bool room = n_guarded < MOST;
    if (room) {
        guarded[n_guarded].worker = worker;
        guarded[n_guarded++].remote = remote;
        if (n_guarded == 1) {
            before = ggml_set_abort_callback(on_abort);
        }
    }
    pthread_mutex_unlock(&lock);
    return room;
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
    pthread_mutex_unlock(&lock);
}
