/* Description: a call that a device's failure does not let return is told of, as is every one after it. */
#include <unistd.h>

#include "faults.h"
#include "on_device.h"

static const int32_t never = 0;

static void note_thread(void *context) {
    *(pthread_t *) context = pthread_self();
}

static void fail(void *context) {
    ggml_abort("there.cpp", 5, "%s", (const char *) context);
}

static struct hobbit_caller *open_caller(struct hobbit_device *device) {
    struct hobbit_caller *caller = NULL;
    CHECK_EQUAL(hobbit_caller_new(device, &never, &caller), HOBBIT_OK);
    return caller;
}

/* As Python does it; the tests have time. */
static int32_t call(struct hobbit_caller *caller, hobbit_function *function, void *context, char *err, size_t err_len) {
    struct hobbit_call *made;
    int32_t done = 0, status = hobbit_caller_start(caller, function, context, &made, err, err_len);
    while (status == HOBBIT_OK && !done) {
        status = hobbit_call_wait(made, 20, &done, err, err_len);
    }
    return status;
}

static void calls_are_on_one_other_thread(void) {
    struct hobbit_caller *caller = open_caller(NULL);
    pthread_t first, second;
    char err[256];
    CHECK_EQUAL(call(caller, note_thread, &first, err, sizeof err), HOBBIT_OK);
    CHECK_EQUAL(call(caller, note_thread, &second, err, sizeof err), HOBBIT_OK);
    CHECK(pthread_equal(first, second) && !pthread_equal(first, pthread_self()));
    hobbit_caller_close(caller);
    hobbit_caller_close(NULL);
}

/* Kept for ever, with its thread, by design. */
static struct hobbit_caller *lost[2];
static struct hobbit_device *device;

static void check_lost(struct hobbit_caller *caller, hobbit_function *function, void *context, const char *text) {
    char err[256];
    CHECK_EQUAL(call(caller, function, context, err, sizeof err), HOBBIT_DEVICE);
    CHECK_TEXT(err, text);
}

static void a_failure_does_not_end_the_process(void) {
    static char why[] = "the cable is cut";
    static pthread_t thread;
    lost[0] = open_caller(NULL);
    const char *told = "device of -ngl was lost: the cable is cut; the model had layers there (-ngl): load it again";
    check_lost(lost[0], fail, why, told);
    check_lost(lost[0], note_thread, &thread, told);
    hobbit_caller_close(lost[0]);
    calls_are_on_one_other_thread();
}

/* What failed did so while nothing was called: nobody would answer. */
static void nothing_is_called_after_a_device_was_lost(void) {
    static const pthread_t nobody;
    static pthread_t thread;
    char told[300];
    device = open_device();
    lost[1] = open_caller(device);
    snprintf(told, sizeof told, "device %s was lost: gone; the model had layers there (-ngl): load it again",
             device->full_name);
    hb_worker_lose(device->worker, "gone");
    check_lost(lost[1], note_thread, &thread, told);
    CHECK(memcmp(&thread, &nobody, sizeof thread) == 0);
    hobbit_caller_close(lost[1]);
}

static int32_t cancelled;
static struct hobbit_caller *hung;
static struct hobbit_device *silent;

static void wait_for_ever(void *context) {
    (void) context;
    for (;;) {
        pause();
    }
}

/* What computes experts on it, with the model's lock, learns of it too. */
static void a_device_that_hangs_is_given_up_when_cancelled(void) {
    char err[256];
    struct hobbit_call *made;
    int32_t done;
    silent = open_device();
    CHECK_EQUAL(hobbit_caller_new(silent, &cancelled, &hung), HOBBIT_OK);
    CHECK_EQUAL(hobbit_caller_start(hung, wait_for_ever, NULL, &made, err, sizeof err), HOBBIT_OK);
    CHECK_EQUAL(hobbit_call_wait(made, 6000, &done, err, sizeof err), HOBBIT_OK);
    CHECK(!done && !hb_worker_is_lost(silent->worker));
    __atomic_store_n(&cancelled, 1, __ATOMIC_RELAXED);
    for (int i = 0; i < 49; i++) {
        CHECK_EQUAL(hobbit_call_wait(made, 100, &done, err, sizeof err), HOBBIT_OK);
    }
    CHECK_EQUAL(hobbit_call_wait(made, 100, &done, err, sizeof err), HOBBIT_DEVICE);
    CHECK(!done && hb_worker_is_lost(silent->worker));
    hobbit_caller_close(hung);
}

static void failed_allocations_are_survived(void) {
    struct hobbit_caller *caller = NULL;
    char err[256];
    pthread_t thread;
    for (int n = 1; n <= 2; n++) {
        atomic_store(&faults_allocation, n);
        CHECK_EQUAL(hobbit_caller_new(NULL, &never, &caller), HOBBIT_NOMEM);
        atomic_store(&faults_allocation, 0);
    }
    caller = open_caller(NULL);
    atomic_store(&faults_allocation, 1);
    CHECK_EQUAL(call(caller, note_thread, &thread, err, sizeof err), HOBBIT_NOMEM);
    CHECK_TEXT(err, "out of memory");
    atomic_store(&faults_allocation, 0);
    hobbit_caller_close(caller);
}

int main(void) {
    RUN(calls_are_on_one_other_thread);
    RUN(failed_allocations_are_survived);
    RUN(a_failure_does_not_end_the_process);
    RUN(nothing_is_called_after_a_device_was_lost);
    RUN(a_device_that_hangs_is_given_up_when_cancelled);
    return 0;
}
