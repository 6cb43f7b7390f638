/* Description: expert layers computed on streamed weights equal, bit for bit, those of the CPU on weights in memory:
 * whatever the cache holds and however the pairs are grouped, and again after every failure. */
#include <errno.h>
#include <pthread.h>

#include "faults.h"
#include "layers.h"
#include "model.h"

static struct hobbit_stats stats_of(const struct arm *arm) {
    struct hobbit_stats stats;
    hobbit_model_stats(arm->model, &stats);
    return stats;
}

/* For a single token, every division of its experts into those that are cached, computed first in one batch, and
 * those that arrive. */
static void single_tokens_do_not_depend_on_what_was_cached(void) {
    struct arm *reference = open_arm(0, 0);
    uint64_t seed = 21;
    struct input in, warm;
    int n_used = file.variant->n_used;
    for (int subset = 0; subset < 1 << n_used; subset++) {
        struct arm *arm = open_arm(LAYERS * EXPERTS - 1, HOBBIT_IO_AUTO);
        random_input(&in, 1, &seed);
        random_input(&warm, 1, &seed);
        for (int i = 0, k = 0; i < n_used && subset != 0; i++, k++) {
            while (((subset >> (k % n_used)) & 1) == 0) {
                k++;
            }
            warm.table[i] = in.table[k % n_used]; /* the subset's experts, again and again */
        }
        if (subset != 0) {
            check_same(arm, reference, &warm);
        }
        uint64_t hits = stats_of(arm).hits;
        check_same(arm, reference, &in);
        CHECK_EQUAL(stats_of(arm).hits - hits, LAYERS * __builtin_popcount((unsigned) subset));
        check_same(arm, reference, &in); /* all cached */
        close_arm(arm);
    }
    close_arm(reference);
}

static void results_do_not_depend_on_the_cache(void) {
    struct arm *reference = open_arm(0, 0);
    struct input in;
    for (int32_t slots = 1; slots <= LAYERS * EXPERTS; slots += slots < 4 ? 1 : 3) {
        struct arm *arm = open_arm(slots, slots % 2 == 0 ? HOBBIT_IO_AUTO : HOBBIT_IO_BUFFERED);
        uint64_t seed = 33;
        for (int i = 0; i < 8; i++) {
            random_input(&in, i % 4 == 0 ? MAX_TOKENS - i : 1 + i % 3, &seed);
            check_same(arm, reference, &in);
        }
        CHECK_EQUAL(stats_of(arm).n_slots, slots);
        CHECK(stats_of(arm).splits >= 8 * LAYERS);
        CHECK((stats_of(arm).evictions == 0) == (slots == LAYERS * EXPERTS));
        close_arm(arm);
    }
    close_arm(reference);
}

static void results_do_not_depend_on_the_threads(void) {
#ifndef __SANITIZE_THREAD__ /* which cannot see how ggml's threads wait for one another */
    struct arm *reference = open_arm(0, 0), *arm = open_arm(3, HOBBIT_IO_AUTO);
    uint64_t seed = 39;
    struct input in;
    set_threads(arm, 2);
    for (int i = 0; i < 3; i++) {
        random_input(&in, 1 + 8 * i, &seed);
        check_same(arm, reference, &in);
    }
    close_arm(arm);
    close_arm(reference);
#endif
}

static void all_tokens_may_use_the_same_experts(void) {
    struct arm *reference = open_arm(0, 0), *arm = open_arm(1, HOBBIT_IO_AUTO);
    uint64_t seed = 45;
    struct input in;
    random_input(&in, MAX_TOKENS, &seed);
    for (int t = 1; t < MAX_TOKENS; t++) {
        memcpy(&in.table[t * EXPERTS], in.table, EXPERTS * sizeof in.table[0]);
    }
    check_same(arm, reference, &in);
    close_arm(arm);
    close_arm(reference);
}

static bool ask_for_all(struct ggml_tensor *t, bool ask, void *data) {
    (void) t, (void) ask, (void) data;
    return true;
}

static void nodes_may_be_asked_for_one_by_one(void) {
    struct arm *reference = open_arm(0, 0), *arm = open_arm(2, HOBBIT_IO_AUTO);
    uint64_t seed = 57;
    struct input in;
    ggml_backend_sched_set_eval_callback(arm->sched, ask_for_all, NULL);
    for (int n_tokens = 1; n_tokens < 6; n_tokens += 2) {
        random_input(&in, n_tokens, &seed);
        check_same(arm, reference, &in);
    }
    close_arm(arm);
    close_arm(reference);
}

/* --- failures --- */

static atomic_int reads_until_failure;

static ssize_t fail_later(int fd, void *dst, size_t length, off_t offset) {
    if (atomic_fetch_sub(&reads_until_failure, 1) <= 0) {
        errno = EIO;
        return -1;
    }
    return faults_real_pread(fd, dst, length, offset);
}

static void failed_reads_fail_the_computation_and_no_more(void) {
    struct arm *reference = open_arm(0, 0);
    uint64_t seed = 61;
    struct input in;
    float out[EMBD * MAX_TOKENS];
    char err[256];
    for (int32_t slots = 1; slots <= LAYERS * EXPERTS; slots += 5) {
        struct arm *arm = open_arm(slots, HOBBIT_IO_BUFFERED);
        for (int n = 0; n < 8; n++) {
            random_input(&in, 4, &seed);
            atomic_store(&reads_until_failure, n);
            faults_pread = fail_later;
            enum ggml_status status = compute(arm, &in, out);
            faults_pread = NULL;
            hobbit_model_take_error(arm->model, err, sizeof err);
            CHECK((status == GGML_STATUS_FAILED) == (strstr(err, file.copies[HOBBIT_HIGH].path) != NULL));
            CHECK(status == GGML_STATUS_FAILED || status == GGML_STATUS_SUCCESS);
            check_same(arm, reference, &in);
        }
        close_arm(arm);
    }
    close_arm(reference);
}

static ssize_t slow_after_one_expert(int fd, void *dst, size_t length, off_t offset) {
    if (atomic_load(&faults_pread_calls) > 3) {
        usleep(50000);
    }
    return faults_real_pread(fd, dst, length, offset);
}

static void a_cancelled_computation_stops_and_can_be_repeated(void) {
    struct arm *reference = open_arm(0, 0), *arm = open_arm(LAYERS * EXPERTS, HOBBIT_IO_BUFFERED);
    uint64_t seed = 71;
    struct input in;
    float out[EMBD * MAX_TOKENS];
    random_input(&in, MAX_TOKENS, &seed);
    arm->cancelled = 1;
    atomic_store(&faults_pread_calls, 0);
    faults_pread = slow_after_one_expert;
    CHECK_EQUAL(compute(arm, &in, out), GGML_STATUS_ABORTED);
    faults_pread = NULL;
    CHECK(stats_of(arm).read_calls <= 3 * EXPERTS / 2); /* not all of the layer's reads */
    arm->cancelled = 0;
    check_same(arm, reference, &in);
    close_arm(arm);
    close_arm(reference);
}

static void unknown_experts_fail_the_computation(void) {
    struct arm *reference = open_arm(0, 0), *arm = open_arm(3, HOBBIT_IO_AUTO);
    uint64_t seed = 81;
    struct input in;
    float out[EMBD * MAX_TOKENS];
    char err[256];
    random_input(&in, 2, &seed);
    int32_t good = in.table[0];
    in.table[0] = EXPERTS;
    CHECK_EQUAL(compute(arm, &in, out), GGML_STATUS_FAILED);
    hobbit_model_take_error(arm->model, err, sizeof err);
    CHECK_TEXT(err, "does not exist");
    in.table[0] = good;
    check_same(arm, reference, &in);
    close_arm(arm);
    close_arm(reference);
}

/* So that what its threads allocate is not counted below. */
static void start_threads(struct hobbit_model *m) {
    hb_model_lock(m);
    struct hb_key key = {0, 0, HOBBIT_HIGH};
    int32_t slot;
    CHECK_EQUAL(hb_model_fetch(m, key, &slot), HB_FETCH_STARTED);
    CHECK(!hb_model_arrival(m, true).failed);
    hb_model_release(m, key);
    hb_model_unlock(m);
}

static void every_failed_allocation_is_survived(void) {
    struct arm *reference = open_arm(0, 0);
    uint64_t seed = 91;
    struct input in;
    float out[EMBD * MAX_TOKENS];
    random_input(&in, 4, &seed);
    for (int32_t slots = 2; slots <= LAYERS * EXPERTS; slots += LAYERS * EXPERTS - 2) {
        bool failed = true;
        int n = 0;
        while (failed) {
            struct arm *arm = open_arm(slots, HOBBIT_IO_BUFFERED);
            start_threads(arm->model);
            atomic_store(&faults_allocation, ++n);
            enum ggml_status status = compute(arm, &in, out);
            failed = atomic_exchange(&faults_allocation, 0) <= 0;
            CHECK(failed || status == GGML_STATUS_SUCCESS);
            check_same(arm, reference, &in);
            close_arm(arm);
        }
        CHECK(n > 4);
    }
    close_arm(reference);
}

/* --- two contexts on one model --- */

struct context_thread {
    struct arm arm; /* another's weights, its own scheduler */
    struct arm *reference;
    uint64_t seed;
};

static void *run_context(void *argument) {
    struct context_thread *t = argument;
    struct input in;
    for (int i = 0; i < 10; i++) {
        random_input(&in, 1 + i % 4, &t->seed);
        check_same(&t->arm, t->reference, &in);
    }
    return NULL;
}

static void contexts_on_one_model_take_turns(void) {
    enum { N = 2 };
    struct arm *shared = open_arm(5, HOBBIT_IO_AUTO);
    struct context_thread threads[N];
    pthread_t ids[N];
    for (int i = 0; i < N; i++) {
        threads[i] = (struct context_thread) {.arm = *shared, .reference = open_arm(0, 0), .seed = (uint64_t) i};
        threads[i].arm.backends[1] = NULL;
        add_backends(&threads[i].arm);
    }
    for (int i = 0; i < N; i++) {
        CHECK_EQUAL(pthread_create(&ids[i], NULL, run_context, &threads[i]), 0);
    }
    for (int i = 0; i < N; i++) {
        CHECK_EQUAL(pthread_join(ids[i], NULL), 0);
        ggml_backend_sched_free(threads[i].arm.sched);
        ggml_backend_free(threads[i].arm.backends[0]);
        ggml_backend_free(threads[i].arm.backends[1]);
        close_arm(threads[i].reference);
    }
    close_arm(shared);
}

/* One row for each of these sequences, which uses the three experts from `first` on; returns the misses. */
static uint64_t decode_rows(struct arm *arm, int n_rows, const int32_t *sequences, const int32_t *first) {
    static float out[EMBD * MAX_TOKENS];
    const int32_t ones[MAX_TOKENS] = {1, 1};
    char err[256];
    uint64_t seed = 5, misses = stats_of(arm).misses;
    struct input in;
    random_input(&in, n_rows, &seed);
    for (int i = 0; i < n_rows * EXPERTS; i++) {
        in.table[i] = (first[i / EXPERTS] + i % EXPERTS) % EXPERTS;
    }
    struct hobbit_rows rows = {.sequences = sequences, .tokens = sequences, .outputs = ones, .ubatches = &n_rows,
                               .n_rows = n_rows, .n_ubatches = 1};
    CHECK_EQUAL(hobbit_model_rows(arm->model, &rows, err, sizeof err), HOBBIT_OK);
    CHECK_EQUAL(compute(arm, &in, out), GGML_STATUS_SUCCESS);
    CHECK_EQUAL(hobbit_model_rows(arm->model, NULL, err, sizeof err), HOBBIT_OK);
    return stats_of(arm).misses - misses;
}

/* By LFU, with room for what both use. Sequence 1 used its experts more often; once it has ended, they go first. */
static void an_ended_sequence_makes_room(bool ends) {
    struct arm *arm = open_arm(LAYERS * 6, HOBBIT_IO_AUTO);
    const struct hobbit_policy policy = {.kind = HOBBIT_POLICY_LFU};
    char err[256];
    CHECK_EQUAL(hobbit_model_set_policy(arm->model, &policy, err, sizeof err), HOBBIT_OK);
    for (int i = 0; i < 2; i++) {
        CHECK_EQUAL(decode_rows(arm, 2, (int32_t[]) {0, 1}, (int32_t[]) {0, 3}), i == 0 ? LAYERS * 6 : 0);
    }
    CHECK_EQUAL(decode_rows(arm, 1, (int32_t[]) {1}, (int32_t[]) {3}), 0);
    if (ends) {
        hobbit_model_end_sequence(arm->model, 1);
        hobbit_model_end_sequence(arm->model, -1); /* no sequence: nothing happens */
    }
    CHECK(decode_rows(arm, 1, (int32_t[]) {2}, (int32_t[]) {6}) > 0); /* 6, 7 and 0 */
    CHECK_EQUAL(decode_rows(arm, 1, (int32_t[]) {0}, (int32_t[]) {0}) == 0, ends);
    close_arm(arm);
}

static void sequences_have_records_of_their_own(void) {
    char err[256];
    an_ended_sequence_makes_room(true);
    an_ended_sequence_makes_room(false);
    struct arm *arm = open_arm(LAYERS * 6, HOBBIT_IO_AUTO);
    struct hobbit_rows rows = {.sequences = (int32_t[]) {-1}, .tokens = (int32_t[]) {0}, .outputs = (int32_t[]) {0},
                               .ubatches = (int32_t[]) {1}, .n_rows = 1, .n_ubatches = 1};
    CHECK_EQUAL(hobbit_model_rows(arm->model, &rows, err, sizeof err), HOBBIT_ARG);
    CHECK_TEXT(err, "make no sense");
    rows.sequences = (int32_t[]) {7};
    int n = 1;
    for (int32_t status = HOBBIT_NOMEM; status != HOBBIT_OK; n++) {
        atomic_store(&faults_allocation, n);
        status = hobbit_model_rows(arm->model, &rows, err, sizeof err);
        atomic_store(&faults_allocation, 0);
        CHECK(status == HOBBIT_OK || status == HOBBIT_NOMEM);
    }
    CHECK(n > 4); /* its record, and the lists of rows */
    close_arm(arm);
}

int main(void) {
    for (int i = 0; i < N_VARIANTS; i++) {
        printf("%s\n", variants[i].name);
        make_weights(&variants[i]);
        RUN(single_tokens_do_not_depend_on_what_was_cached);
        RUN(results_do_not_depend_on_the_cache);
        RUN(all_tokens_may_use_the_same_experts);
        RUN(nodes_may_be_asked_for_one_by_one);
        if (i == 0) {
            RUN(results_do_not_depend_on_the_threads);
            RUN(failed_reads_fail_the_computation_and_no_more);
            RUN(a_cancelled_computation_stops_and_can_be_repeated);
            RUN(unknown_experts_fail_the_computation);
            RUN(every_failed_allocation_is_survived);
            RUN(contexts_on_one_model_take_turns);
            RUN(sequences_have_records_of_their_own);
        }
        free_weights();
    }
    return 0;
}
