/* Description: who is told when ggml ends the process over a device, and from which thread it does. */
#include "guard.h"

#include <pthread.h>
#include <unistd.h>

#include "check.h"
#include "ggml.h"
#include "os.h"
#include "worker.h"

#define THERE "10.0.0.1:50052"
#define ELSEWHERE "10.0.0.2:50052"
#define THIRD "10.0.0.3:50052"
#define FOURTH "10.0.0.4:50052"
#define MS UINT64_C(1000000)

static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;

static void wait_at_the_gate(void *context) {
    (void) context;
    pthread_mutex_lock(&gate);
    pthread_mutex_unlock(&gate);
}

static void fail(void *context) {
    ggml_abort("ggml-rpc.cpp", 5, "%s", (const char *) context);
}

static void *fail_elsewhere(void *context) {
    fail(context);
    return NULL;
}

/* As the RPC client's own thread fails, which nobody waits for and which never ends. */
static void fail_in_a_thread(char *why) {
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, fail_elsewhere, why) == 0);
    CHECK(pthread_detach(thread) == 0);
}

static void wait_until_lost(struct hb_worker *w, const char *why) {
    char text[64];
    while (!hb_worker_is_lost(w)) {
        usleep(100);
    }
    hb_worker_reason(w, text, sizeof text);
    CHECK_TEXT(text, why);
    CHECK_EQUAL(strlen(text), strlen(why));
}

/* Kept for ever, with their threads, by design. */
static struct hb_worker *workers[8];
static struct hb_task tasks[8];

static struct hb_worker *guarded(int i, const char *what, bool remote) {
    struct hb_worker *w = workers[i] = hb_worker_new(1);
    CHECK(w != NULL && hb_guard_add(w, what, remote));
    return w;
}

static void occupy(int i) {
    tasks[i] = (struct hb_task) {.run = wait_at_the_gate};
    hb_worker_submit(workers[i], HB_COMPUTES, &tasks[i], false);
    while (!hb_worker_is_busy(workers[i])) {
        usleep(100);
    }
}

static void end(struct hb_worker *w) {
    hb_guard_remove(w);
    CHECK(hb_worker_close(w));
}

static void its_own_thread_is_the_worker_s(void) {
    struct hb_worker *w = guarded(0, ELSEWHERE, true), *other = guarded(1, THERE, true);
    tasks[0] = (struct hb_task) {.run = fail, .context = "the cable is cut"};
    CHECK(!hb_guard_has_failed(ELSEWHERE));
    CHECK(!hb_worker_call(w, &tasks[0], HB_WORKER_FOREVER));
    CHECK(hb_guard_has_failed(ELSEWHERE) && !hb_guard_has_failed(THERE));
    CHECK(!hb_worker_is_lost(other));
    CHECK(hb_guard_has(THERE) && !hb_guard_has(ELSEWHERE));
    CHECK(!hb_worker_close(w));
    hb_guard_fail(other);
    CHECK(hb_guard_has_failed(THERE) && !hb_worker_is_lost(other)); /* what it has may still be of use to it */
    end(other);
    CHECK(!hb_guard_has_failed(THERE));
}

/* Those that wait for an answer are told, and whoever else has the same device; the others are not. */
static void a_thread_of_the_client_is_that_of_who_waits(void) {
    static char text[] = "the server is gone\n";
    static char same[] = THERE; /* a device more of the same server */
    struct hb_worker *busy = guarded(2, THERE, true), *idle = guarded(3, same, true);
    struct hb_worker *other = guarded(0, NULL, true), *here = guarded(1, NULL, false);
    pthread_mutex_lock(&gate);
    occupy(2);
    occupy(1);
    fail_in_a_thread(text);
    wait_until_lost(busy, "the server is gone");
    wait_until_lost(idle, "the server is gone");
    CHECK(hb_guard_has_failed(THERE) && !hb_guard_has(THERE));
    CHECK(!hb_worker_is_lost(other) && !hb_worker_is_lost(here));
    pthread_mutex_unlock(&gate);
    end(other);
    end(here);
}

/* What was sent without waiting for an answer: whoever uses the connection next would wait for ever. */
static void when_nobody_waits_all_are_lost(void) {
    static char text[] = "the server is gone";
    struct hb_worker *first = guarded(4, NULL, true), *second = guarded(5, NULL, true), *here = guarded(1, NULL, false);
    fail_in_a_thread(text);
    wait_until_lost(first, text);
    wait_until_lost(second, text);
    CHECK(!hb_worker_is_lost(here));
    end(here);
}

static void *come_back(void *worker) {
    usleep(50000);
    hb_guard_remove(worker);
    return NULL;
}

/* A thread that was given up and waits for an answer gets one, or its connection fails. */
static void who_is_silent_is_waited_for(void) {
    static char text[] = "the server is gone too";
    struct hb_worker *returns = guarded(6, THIRD, true), *never = guarded(7, FOURTH, true);
    pthread_t thread;
    hb_guard_fail(returns);
    hb_guard_fail(never);
    uint64_t start = hb_now_ns();
    hb_guard_wait_for_silent(FOURTH, 1);
    CHECK(hb_now_ns() - start > 900 * MS); /* the clocks are not the same */
    start = hb_now_ns();
    CHECK(pthread_create(&thread, NULL, come_back, returns) == 0);
    hb_guard_wait_for_silent(THIRD, 60);
    uint64_t waited = hb_now_ns() - start;
    CHECK(waited > 40 * MS && waited < 30000 * MS);
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK(hb_worker_close(returns) && !hb_guard_has_failed(THIRD));
    fail_in_a_thread(text); /* nobody else is there: it does not end the process */
    wait_until_lost(never, text);
    hb_guard_wait_for_silent(FOURTH, 3600); /* not any more */
    CHECK(hb_guard_has_failed(FOURTH));
}

int main(void) {
    RUN(its_own_thread_is_the_worker_s);
    RUN(a_thread_of_the_client_is_that_of_who_waits);
    RUN(when_nobody_waits_all_are_lost);
    RUN(who_is_silent_is_waited_for);
    return 0;
}
