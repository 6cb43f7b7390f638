/* Description: tasks run in order, the urgent ones first; a lost worker is told of at once, and no task begins in it. */
#include "worker.h"

#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

#include "check.h"
#include "faults.h"

static atomic_int order;
static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;

static void note(void *context) {
    *(int *) context = atomic_fetch_add(&order, 1);
}

static void wait_at_the_gate(void *context) {
    pthread_mutex_lock(&gate);
    pthread_mutex_unlock(&gate);
    note(context);
}

static void never_end(void *context) {
    CHECK(hb_worker_current() != NULL);
    hb_worker_lose(hb_worker_current(), context);
    for (;;) {
        pause();
    }
}

static void tasks_run_in_order_and_the_urgent_first(void) {
    struct hb_worker *w = hb_worker_new();
    int at[4] = {-1, -1, -1, -1};
    struct hb_task tasks[4];
    atomic_store(&order, 0);
    pthread_mutex_lock(&gate);
    for (int i = 0; i < 4; i++) {
        tasks[i] = (struct hb_task) {.run = i == 0 ? wait_at_the_gate : note, .context = &at[i]};
        hb_worker_submit(w, &tasks[i], i == 3);
        while (i == 0 && !hb_worker_is_busy(w)) {
            usleep(100);
        }
    }
    CHECK(!hb_worker_done(w, &tasks[0], 0));
    CHECK(!hb_worker_done(w, &tasks[0], 2)); /* not within so long */
    pthread_mutex_unlock(&gate);
    CHECK(hb_worker_done(w, &tasks[2], HB_WORKER_FOREVER));
    CHECK(at[0] == 0 && at[3] == 1 && at[1] == 2 && at[2] == 3);
    int last = -1;
    CHECK(hb_worker_call(w, note, &last));
    CHECK_EQUAL(last, 4);
    CHECK(hb_worker_current() == NULL && !hb_worker_is_lost(w));
    CHECK(hb_worker_close(w));
}

static void a_close_does_what_was_submitted(void) {
    struct hb_worker *w = hb_worker_new();
    int at[3];
    struct hb_task tasks[3];
    atomic_store(&order, 0);
    for (int i = 0; i < 3; i++) {
        tasks[i] = (struct hb_task) {.run = note, .context = &at[i]};
        hb_worker_submit(w, &tasks[i], false);
    }
    CHECK(hb_worker_close(w));
    CHECK_EQUAL(atomic_load(&order), 3);
}

/* The thread and its worker stay for ever, by design: the sanitizers are told so by keeping a pointer. */
static struct hb_worker *lost;

static void a_lost_worker_is_told_of(void) {
    struct hb_worker *w = lost = hb_worker_new();
    static struct hb_task behind;
    static int at = -1;
    char why[64];
    behind = (struct hb_task) {.run = note, .context = &at};
    CHECK(!hb_worker_call(w, never_end, "the cable is cut"));
    CHECK(hb_worker_is_lost(w));
    hb_worker_reason(w, why, sizeof why);
    CHECK_TEXT(why, "the cable is cut");
    hb_worker_submit(w, &behind, false);
    CHECK(!hb_worker_done(w, &behind, HB_WORKER_FOREVER));
    CHECK(!hb_worker_call(w, note, &at));
    CHECK_EQUAL(at, -1);
    CHECK(!hb_worker_close(w));
}

static void failed_allocations_are_survived(void) {
    for (int n = 1; n < 3; n++) {
        atomic_store(&faults_allocation, n);
        struct hb_worker *w = hb_worker_new();
        atomic_store(&faults_allocation, 0);
        CHECK(w == NULL || n > 1);
        if (w != NULL) {
            CHECK(hb_worker_close(w));
        }
    }
}

int main(void) {
    RUN(tasks_run_in_order_and_the_urgent_first);
    RUN(a_close_does_what_was_submitted);
    RUN(failed_allocations_are_survived);
    RUN(a_lost_worker_is_told_of);
    return 0;
}
