/* Description: a device that holds low copies too. Whatever is where, in which precision, the result is that of a model
 * without a device in which each expert has the same precision; what is there is taken into account where the rule goes
 * by what is cached. */
#include "faults.h"
#include "on_device.h"

#define ALL (LAYERS * EXPERTS)

static const uint64_t much = (uint64_t) 1 << 30, batch = 4 << 20;

struct there {
    int32_t n_slots[HOBBIT_PRECISIONS];
    uint64_t batch_bytes;
};

static int32_t use_device(struct arm *arm, struct hobbit_device *device, struct there there, char *err, size_t err_len) {
    const struct hobbit_device_pool pool = {{whole_expert(HOBBIT_HIGH), whole_expert(HOBBIT_LOW)},
                                            {there.n_slots[HOBBIT_HIGH], there.n_slots[HOBBIT_LOW]}};
    const int32_t pool_of_group[LAYERS] = {0};
    const struct hobbit_device_plan plan = {&pool, pool_of_group, 1, there.batch_bytes, much,
                                            .dispatch = HOBBIT_DISPATCH_SPLIT, .n_threads = 1};
    return hobbit_model_use_device(arm->model, device, &plan, err, err_len);
}

static struct hobbit_device *with_device(struct arm *arm, struct there there) {
    struct hobbit_device *device = open_device();
    char err[256];
    CHECK_EQUAL(use_device(arm, device, there, err, sizeof err), HOBBIT_OK);
    return device;
}

static void set_rule(const struct arm *arm, float t1, float t2, bool deterministic) {
    const float t1s[LAYERS] = {t1, t1}, t2s[LAYERS] = {t2, t2};
    const struct hobbit_rule rule = {.t1 = t1s, .t2 = t2s, .deterministic = deterministic, .per_token = deterministic};
    char err[256];
    CHECK_EQUAL(hobbit_model_set_rule(arm->model, &rule, err, sizeof err), HOBBIT_OK);
}

/* What every pair needs, whatever its score. */
static void need(const struct arm *arm, int32_t precision) {
    set_rule(arm, precision == HOBBIT_HIGH ? 1 : -1, precision == HOBBIT_SKIP ? -1 : 1, false);
}

static void run(struct arm *arm, const struct input *in) {
    static float out[EMBD * MAX_TOKENS];
    CHECK_EQUAL(compute(arm, in, out), GGML_STATUS_SUCCESS);
}

/* --- */

static void compare(struct room host, struct there there) {
    struct arm *reference = open_mixed_arm((struct room) {ALL, ALL}, HOBBIT_IO_AUTO);
    struct arm *arm = open_mixed_arm(host, HOBBIT_IO_AUTO);
    struct hobbit_device *device = with_device(arm, there);
    struct input in;
    uint64_t seed = 91;
    for (int i = 0; i < 12; i++) {
        float t1 = i % 3 == 0 ? -1 : 0.4f, t2 = i % 3 == 1 ? 0.7f : 1;
        set_rule(arm, t1, t2, true);
        set_rule(reference, t1, t2, true);
        random_input(&in, i % 4 == 0 ? MAX_TOKENS - i : 1 + i % 3, &seed);
        check_same(arm, reference, &in);
        if (i % 2 == 0) {
            settle(arm);
        }
    }
    settle(arm);
    struct hobbit_stats stats = stats_of(arm);
    bool useful = there.batch_bytes == batch;
    CHECK((stats.device_low_pairs > 0) == (there.n_slots[HOBBIT_LOW] > 0) || !useful);
    CHECK((stats.device_pairs > stats.device_low_pairs) == (there.n_slots[HOBBIT_HIGH] > 0) || !useful);
    CHECK(stats.device_low_pairs <= stats.pairs_low);
    CHECK(stats.device_pairs - stats.device_low_pairs <= stats.pairs_high);
    CHECK_EQUAL(stats.device_declined, 0);
    close_arm(arm);
    hobbit_device_close(device);
    close_arm(reference);
}

static void results_do_not_depend_on_what_is_where(void) {
    static const struct room hosts[] = {{1, 0}, {2, 1}, {ALL, ALL}};
    for (int i = 0; i < 3; i++) {
        for (int32_t high = 0; high <= ALL; high += 8) {
            for (int32_t low = 0; low <= ALL; low += 8) {
                compare(hosts[i], (struct there) {{high, low}, batch});
            }
        }
    }
    compare((struct room) {2, 1}, (struct there) {{3, 5}, batch});
    compare((struct room) {2, 1}, (struct there) {{ALL, ALL}, 160000}); /* several batches of each precision */
}

/* Where what is cached decides, the device's arm records and the other computes the same without one; and then the other
 * way about. */
static void what_was_decided_can_be_replayed(void) {
    const char *path = file_make(1);
    char err[256];
    float out[2][6][EMBD * MAX_TOKENS];
    for (int recorder = 0; recorder < 2; recorder++) {
        struct input in;
        struct hobbit_stats stats[2];
        for (int k = 0; k < 2; k++) {
            bool is_there = k == recorder;
            struct arm *arm = open_mixed_arm((struct room) {3, 2}, HOBBIT_IO_AUTO);
            struct hobbit_device *device = is_there ? with_device(arm, (struct there) {{4, 6}, batch}) : NULL;
            uint64_t seed = 93;
            set_rule(arm, 0.3f, 0.8f, false);
            CHECK_EQUAL(k == 0 ? hobbit_model_record(arm->model, path, "", err, sizeof err)
                               : hobbit_model_replay(arm->model, path, err, sizeof err), HOBBIT_OK);
            for (int i = 0; i < 6; i++) {
                random_input(&in, 1 + i, &seed);
                memset(out[k][i], 0, sizeof out[k][i]);
                CHECK_EQUAL(compute(arm, &in, out[k][i]), GGML_STATUS_SUCCESS);
                settle(arm);
            }
            CHECK_EQUAL(hobbit_model_schedule_end(arm->model, err, sizeof err), HOBBIT_OK);
            stats[is_there] = stats_of(arm);
            close_arm(arm);
            hobbit_device_close(device);
        }
        CHECK(memcmp(out[0], out[1], sizeof out[0]) == 0);
        CHECK(stats[1].device_low_pairs > 0 && stats[1].device_pairs > stats[1].device_low_pairs);
        CHECK(stats[0].pairs_high == stats[1].pairs_high && stats[0].pairs_low == stats[1].pairs_low);
    }
}

/* What nobody needs is computed when it costs nothing. */
static void a_copy_there_is_a_copy_at_hand(void) {
    struct arm *arm = open_mixed_arm((struct room) {ALL, ALL}, HOBBIT_IO_AUTO);
    struct hobbit_device *device = with_device(arm, (struct there) {{ALL, ALL}, batch});
    struct input in;
    uint64_t seed = 95;
    random_input(&in, 1, &seed);
    uint64_t pairs = (uint64_t) (LAYERS * file.variant->n_used);
    need(arm, HOBBIT_LOW);
    run(arm, &in);
    settle(arm);
    CHECK_EQUAL(stats_of(arm).device_bytes, pairs * whole_expert(HOBBIT_LOW));
    allocate(arm->model, (struct room) {ALL, ALL}); /* nothing is here any more */
    uint64_t read = stats_of(arm).read_bytes;
    need(arm, HOBBIT_SKIP);
    run(arm, &in);
    struct hobbit_stats stats = stats_of(arm);
    CHECK(stats.pairs_skip == 0 && stats.pairs_low == 2 * pairs && stats.device_low_pairs == pairs);
    CHECK_EQUAL(stats.read_bytes, read);
    need(arm, HOBBIT_HIGH);
    run(arm, &in); /* a promotion, from the disk */
    CHECK_EQUAL(stats_of(arm).promotions, pairs);
    settle(arm);
    CHECK_EQUAL(stats_of(arm).device_bytes, pairs * (whole_expert(HOBBIT_LOW) + whole_expert(HOBBIT_HIGH)));
    allocate(arm->model, (struct room) {ALL, ALL});
    need(arm, HOBBIT_LOW);
    run(arm, &in); /* the better one is used */
    stats = stats_of(arm);
    CHECK(stats.device_low_pairs == pairs && stats.device_pairs == 2 * pairs && stats.pairs_low == 2 * pairs);
    for (int layer = 0; layer < LAYERS; layer++) { /* and the other one is gone */
        struct hb_key low = {layer, in.table[0], HOBBIT_LOW};
        CHECK(!hb_model_is_there(arm->model, low) && hb_model_is_there(arm->model, hb_key_in(low, HOBBIT_HIGH)));
    }
    close_arm(arm);
    hobbit_device_close(device);
}

/* With a deterministic rule both copies are used, and both stay. */
static void a_deterministic_rule_keeps_both(void) {
    struct arm *arm = open_mixed_arm((struct room) {ALL, ALL}, HOBBIT_IO_AUTO);
    struct hobbit_device *device = with_device(arm, (struct there) {{ALL, ALL}, batch});
    struct input in;
    uint64_t seed = 97;
    random_input(&in, 1, &seed);
    for (int i = 0; i < 2; i++) {
        set_rule(arm, -1, 1, true);
        run(arm, &in);
        settle(arm);
        set_rule(arm, 1, 1, true);
        run(arm, &in);
        settle(arm);
    }
    uint64_t pairs = (uint64_t) (LAYERS * file.variant->n_used);
    CHECK(stats_of(arm).device_low_pairs == pairs && stats_of(arm).device_pairs == 2 * pairs);
    close_arm(arm);
    hobbit_device_close(device);
}

/* While a low copy is copied there its high one is read here: it stays until it is copied, and goes then. */
static void a_copy_that_is_replaced_on_its_way(void) {
    struct arm *arm = open_mixed_arm((struct room) {ALL, ALL}, HOBBIT_IO_AUTO);
    struct hobbit_device *device = with_device(arm, (struct there) {{0, ALL}, batch});
    struct hb_task waits;
    struct input in;
    uint64_t seed = 99;
    random_input(&in, 1, &seed);
    struct hb_key low = {0, in.table[0], HOBBIT_LOW};
    hold(device, HB_COPIES, &waits);
    need(arm, HOBBIT_LOW);
    run(arm, &in);
    need(arm, HOBBIT_HIGH);
    run(arm, &in);
    CHECK(hb_cache_peek(arm->model->cache, low) >= 0);
    CHECK(hb_cache_peek(arm->model->cache, hb_key_in(low, HOBBIT_HIGH)) >= 0);
    pthread_mutex_unlock(&gate);
    settle(arm);
    CHECK(hb_cache_peek(arm->model->cache, low) < 0 && hb_model_is_there(arm->model, low));
    CHECK(hb_cache_peek(arm->model->cache, hb_key_in(low, HOBBIT_HIGH)) >= 0);
    close_arm(arm);
    hobbit_device_close(device);
}

static void every_failed_allocation_is_survived(void) {
    struct arm *reference = open_mixed_arm((struct room) {ALL, ALL}, HOBBIT_IO_AUTO);
    struct input in;
    char err[256];
    uint64_t seed = 79;
    random_input(&in, 4, &seed);
    set_rule(reference, 0.3f, 1, true);
    bool failed = true;
    for (int n = 1; failed; n++) {
        struct arm *arm = open_mixed_arm((struct room) {3, 2}, HOBBIT_IO_AUTO);
        struct hobbit_device *device = open_device();
        set_rule(arm, 0.3f, 1, true);
        atomic_store(&faults_allocation, n);
        int32_t status = use_device(arm, device, (struct there) {{ALL, ALL}, batch}, err, sizeof err);
        failed = atomic_exchange(&faults_allocation, 0) <= 0;
        CHECK(status == HOBBIT_OK || (failed && (status == HOBBIT_NOMEM || status == HOBBIT_DEVICE)));
        check_same(arm, reference, &in);
        check_same(arm, reference, &in);
        close_arm(arm);
        hobbit_device_close(device);
        CHECK(n < 1000);
    }
    close_arm(reference);
}

static void what_does_not_fit_is_refused(void) {
    struct arm *arm = open_mixed_arm((struct room) {3, 2}, HOBBIT_IO_AUTO), *without = open_arm(3, HOBBIT_IO_AUTO);
    struct hobbit_device *device = open_device();
    char err[256];
    uint64_t high = whole_expert(HOBBIT_HIGH), low = whole_expert(HOBBIT_LOW);
    const struct hobbit_device_pool pools[] = {{{high, low + 1}, {2, 1}}, {{high, low}, {2, -1}}, {{high, 0}, {2, 1}}};
    const int32_t first[LAYERS] = {0};
    for (int i = 0; i < 3; i++) {
        const struct hobbit_device_plan wrong = {.pools = &pools[i], .pool_of_group = first, .n_pools = 1,
                                                 .batch_bytes = batch};
        CHECK_EQUAL(hobbit_model_use_device(arm->model, device, &wrong, err, sizeof err), HOBBIT_ARG);
        CHECK_TEXT(err, "does not fit");
    }
    CHECK_EQUAL(use_device(without, device, (struct there) {{2, 1}, batch}, err, sizeof err), HOBBIT_ARG);
    CHECK_EQUAL(use_device(without, device, (struct there) {{2, 0}, batch}, err, sizeof err), HOBBIT_OK);
    close_arm(without);
    close_arm(arm);
    hobbit_device_close(device);
}

int main(void) {
    for (int i = 0; i < N_VARIANTS; i++) {
        if (variants[i].weights_first) {
            continue; /* what its pairs need is not seen */
        }
        printf("%s\n", variants[i].name);
        make_weights(&variants[i]);
        RUN(results_do_not_depend_on_what_is_where);
        RUN(what_was_decided_can_be_replayed);
        if (i == 0) {
            RUN(a_copy_there_is_a_copy_at_hand);
            RUN(a_deterministic_rule_keeps_both);
            RUN(a_copy_that_is_replaced_on_its_way);
            RUN(every_failed_allocation_is_survived);
            RUN(what_does_not_fit_is_refused);
        }
        free_weights();
    }
    return 0;
}
