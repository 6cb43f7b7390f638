/* Description: tasks run in order, the urgent ones first; a lost worker is told of at once, and no task begins in it. */
#include "worker.h"

#include <pthread.h>
#include <stdatomic.h>
#include <sys/wait.h>
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
    struct hb_worker *w = hb_worker_new(1);
    int at[5] = {-1, -1, -1, -1, -1};
    struct hb_task tasks[5];
    atomic_store(&order, 0);
    pthread_mutex_lock(&gate);
    for (int i = 0; i < 5; i++) {
        tasks[i] = (struct hb_task) {.run = i == 0 ? wait_at_the_gate : note, .context = &at[i]};
        hb_worker_submit(w, HB_COMPUTES, &tasks[i], i >= 3);
        while (i == 0 && !hb_worker_is_busy(w)) {
            usleep(100);
        }
    }
    CHECK(!hb_worker_done(w, &tasks[0], 0));
    CHECK(!hb_worker_done(w, &tasks[0], 2)); /* not within so long */
    pthread_mutex_unlock(&gate);
    CHECK(hb_worker_done(w, &tasks[2], HB_WORKER_FOREVER));
    CHECK(at[0] == 0 && at[3] == 1 && at[4] == 2 && at[1] == 3 && at[2] == 4);
    int last = -1;
    struct hb_task call = {.run = note, .context = &last};
    CHECK(hb_worker_call(w, &call, HB_WORKER_FOREVER));
    CHECK_EQUAL(last, 5);
    CHECK(hb_worker_current() == NULL && !hb_worker_is_lost(w));
    CHECK(hb_worker_close(w));
}

static void a_close_does_what_was_submitted(void) {
    struct hb_worker *w = hb_worker_new(1);
    int at[3];
    struct hb_task tasks[3];
    atomic_store(&order, 0);
    for (int i = 0; i < 3; i++) {
        tasks[i] = (struct hb_task) {.run = note, .context = &at[i]};
        hb_worker_submit(w, HB_COMPUTES, &tasks[i], false);
    }
    CHECK(hb_worker_close(w));
    CHECK_EQUAL(atomic_load(&order), 3);
}

static void the_second_thread_works_meanwhile(void) {
    struct hb_worker *w = hb_worker_new(2);
    int at[2] = {-1, -1};
    struct hb_task waits = {.run = wait_at_the_gate, .context = &at[0]}, other = {.run = note, .context = &at[1]};
    atomic_store(&order, 0);
    pthread_mutex_lock(&gate);
    uint64_t ended = hb_worker_ended(w);
    CHECK(!hb_worker_wait(w, ended, 0));
    hb_worker_submit(w, HB_COMPUTES, &waits, false);
    while (!hb_worker_is_busy(w)) {
        usleep(100);
    }
    CHECK(!hb_worker_wait(w, ended, 2));
    hb_worker_submit(w, HB_COPIES, &other, false);
    CHECK(hb_worker_wait(w, ended, HB_WORKER_FOREVER)); /* for whichever is the first to end */
    CHECK_EQUAL(hb_worker_ended(w), ended + 1);
    uint64_t busy = hb_worker_busy_ns(w);
    CHECK(busy >= 2000000); /* the first task waits since then */
    CHECK(other.done && !hb_worker_done(w, &waits, 0));
    pthread_mutex_unlock(&gate);
    CHECK(hb_worker_done(w, &waits, HB_WORKER_FOREVER));
    CHECK(at[1] == 0 && at[0] == 1);
    busy = hb_worker_busy_ns(w);
    usleep(1000);
    CHECK_EQUAL(hb_worker_busy_ns(w), busy);
    CHECK(hb_worker_close(w));
}

/* The thread and its worker stay for ever, by design: the sanitizers are told so by keeping a pointer. */
static struct hb_worker *lost;

static void a_lost_worker_is_told_of(void) {
    struct hb_worker *w = lost = hb_worker_new(1);
    static struct hb_task fails, behind, call;
    static int at = -1;
    char why[64];
    fails = (struct hb_task) {.run = never_end, .context = "the cable is cut"};
    behind = call = (struct hb_task) {.run = note, .context = &at};
    CHECK(!hb_worker_call(w, &fails, HB_WORKER_FOREVER));
    CHECK(hb_worker_is_lost(w));
    hb_worker_reason(w, why, sizeof why);
    CHECK_TEXT(why, "the cable is cut");
    hb_worker_submit(w, HB_COMPUTES, &behind, false);
    CHECK(!hb_worker_done(w, &behind, HB_WORKER_FOREVER));
    CHECK(!hb_worker_call(w, &call, HB_WORKER_FOREVER));
    CHECK_EQUAL(at, -1);
    CHECK(!hb_worker_close(w));
}

static struct hb_worker *half_lost;

/* What the other thread is in the middle of may still end, and it is given time. */
static void with_one_thread_both_are_lost(void) {
    struct hb_worker *w = half_lost = hb_worker_new(2);
    static struct hb_task copies, fails, behind;
    static int at = -1;
    fails = (struct hb_task) {.run = never_end, .context = "the cable is cut"};
    copies = behind = (struct hb_task) {.run = wait_at_the_gate, .context = &at};
    pthread_mutex_lock(&gate);
    hb_worker_submit(w, HB_COPIES, &copies, false);
    while (!hb_worker_is_busy(w)) {
        usleep(100);
    }
    CHECK(!hb_worker_call(w, &fails, HB_WORKER_FOREVER));
    hb_worker_submit(w, HB_COPIES, &behind, false);
    CHECK(!hb_worker_done(w, &copies, HB_WORKER_FOREVER));
    hb_worker_rest(w, 2); /* not for ever */
    CHECK(!hb_worker_done(w, &copies, 0));
    pthread_mutex_unlock(&gate);
    hb_worker_rest(w, HB_WORKER_FOREVER);
    CHECK(hb_worker_done(w, &copies, 0) && !hb_worker_done(w, &behind, 0));
    CHECK(!hb_worker_close(w));
}

static struct hb_worker *slow;

static void who_does_not_answer_in_time_is_lost(void) {
    struct hb_worker *w = slow = hb_worker_new(1);
    static struct hb_task waits;
    static int at = -1;
    char why[64];
    waits = (struct hb_task) {.run = wait_at_the_gate, .context = &at};
    pthread_mutex_lock(&gate);
    CHECK(!hb_worker_call(w, &waits, 5));
    CHECK(hb_worker_is_lost(w));
    hb_worker_reason(w, why, sizeof why);
    CHECK_TEXT(why, "it does not answer");
    pthread_mutex_unlock(&gate);
    hb_worker_rest(w, HB_WORKER_FOREVER);
    CHECK(hb_worker_done(w, &waits, 0)); /* too late, and nobody minds */
    static struct hb_task last;
    static int after = -1;
    last = (struct hb_task) {.run = note, .context = &after};
    hb_worker_last(w, &last);
    CHECK(!hb_worker_close(w));
    while (!hb_worker_done(w, &last, 0)) { /* it has come back, so it does this too */
        usleep(100);
    }
    CHECK(after > at);
}

/* It has none of the threads. */
static void a_forked_process_has_lost_it(void) {
    struct hb_worker *w = hb_worker_new(2);
    static struct hb_task task;
    static int at = -1;
    char why[64];
    task = (struct hb_task) {.run = note, .context = &at};
    pid_t child = fork();
    if (child == 0) {
        bool called = hb_worker_call(w, &task, HB_WORKER_FOREVER);
        hb_worker_reason(w, why, sizeof why);
        _exit(called || strcmp(why, "the process was forked after the model was loaded") != 0 || hb_worker_close(w));
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    CHECK(hb_worker_call(w, &task, HB_WORKER_FOREVER));
    CHECK(hb_worker_close(w));
}

static void failed_allocations_are_survived(void) {
    for (int n = 1; n < 3; n++) {
        atomic_store(&faults_allocation, n);
        struct hb_worker *w = hb_worker_new(1);
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
    RUN(the_second_thread_works_meanwhile);
    RUN(a_lost_worker_is_told_of);
    RUN(with_one_thread_both_are_lost);
    RUN(who_does_not_answer_in_time_is_lost);
    RUN(a_forked_process_has_lost_it);
    return 0;
}
