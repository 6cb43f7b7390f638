/* Description: a simulation worked out by hand, what it refuses, and that every failed allocation is one error. That it
 * counts what the engine counts is tested in Python, with models. */
#include "hobbit.h"

#include <math.h>

#include "check.h"
#include "faults.h"

enum { MOST = 16, L = HOBBIT_EVENT_LAYER, P = HOBBIT_EVENT_PREDICTED, S = HOBBIT_EVENT_SEQUENCE,
       F = HOBBIT_EVENT_FORGET };

/* Two groups of four experts of 90 bytes, in slots of 100; low copies have 30. */
static const int32_t n_expert[] = {4, 4}, pool_of_group[] = {0, 0};
static const uint64_t expert_bytes[] = {90, 30, 90, 30};
static struct hobbit_pool pool = {.bytes = 300, .slot_bytes = {100, 40}, .n_slots = {3, 7}};

static uint8_t kind[MOST], has_weights[MOST];
static int32_t group[MOST], n_rows[MOST], n_used[MOST], experts[2 * MOST];
static int64_t pair_at[MOST];
static float weights[2 * MOST];
static struct hobbit_routing trace = {.kind = kind, .group = group, .n_rows = n_rows, .n_used = n_used,
                                      .pair_at = pair_at, .has_weights = has_weights, .experts = experts,
                                      .weights = weights};

static uint32_t hits[MOST], misses[MOST], evictions[MOST];
static uint64_t read_bytes[MOST], read_low_bytes[MOST];
static double seconds[MOST];
static struct hobbit_simulated out = {.hits = hits, .misses = misses, .evictions = evictions,
                                      .read_bytes = read_bytes, .read_low_bytes = read_low_bytes, .seconds = seconds};
static char err[256];

static struct hobbit_simulation cache(int32_t policy) {
    return (struct hobbit_simulation) {.n_groups = 2, .n_pools = 1, .n_expert = n_expert,
                                       .pool_of_group = pool_of_group, .expert_bytes = expert_bytes, .pools = &pool,
                                       .policy = {.kind = policy}};
}

static void begin(void) {
    trace.n_events = trace.n_pairs = 0;
}

/* An event of one row with two experts, of which the first has weight 0.75. */
static void add(int32_t what, int32_t of, int32_t a, int32_t b) {
    int64_t i = trace.n_events++;
    bool pairs = what == L || what == P;
    kind[i] = (uint8_t) what;
    group[i] = of;
    n_rows[i] = 1;
    n_used[i] = pairs ? 2 : 0;
    has_weights[i] = 1;
    pair_at[i] = trace.n_pairs;
    if (pairs) {
        experts[trace.n_pairs] = a, experts[trace.n_pairs + 1] = b;
        weights[trace.n_pairs] = 0.75f, weights[trace.n_pairs + 1] = 0.25f;
        trace.n_pairs += 2;
    }
}

static int32_t run(const struct hobbit_simulation *simulation) {
    err[0] = '\0';
    return hobbit_simulate(&trace, simulation, &out, err, sizeof err);
}

static void each_layer_is_counted_at_its_event(void) {
    struct hobbit_simulation s = cache(HOBBIT_POLICY_LRU);
    s.disk_bytes_s = 900, s.compute_s = 0.15;
    begin();
    add(L, 0, 0, 1);
    add(L, 1, 2, 3); /* two look-ups, three slots: 0.0 goes */
    add(S, -1, 0, 0);
    add(L, 0, 1, 0); /* 0.1 is there; 0.0 takes 1.2's place */
    add(L, 1, 3, 2);
    add(F, -1, 0, 0);
    add(L, 0, 0, 1);
    CHECK_EQUAL(run(&s), HOBBIT_OK);
    const uint32_t hit[] = {0, 0, 0, 1, 1, 0, 0}, gone[] = {0, 1, 0, 1, 1, 0, 0};
    for (int i = 0; i < 7; i++) {
        bool layer = kind[i] == L;
        CHECK_EQUAL(hits[i], hit[i]);
        CHECK_EQUAL(misses[i], layer ? 2 - hit[i] : 0);
        CHECK_EQUAL(evictions[i], gone[i]);
        CHECK_EQUAL(read_bytes[i], 90 * misses[i]);
        double expected = !layer ? 0 : misses[i] == 2 ? 0.2 : 0.15; /* 180 / 900, or the computation */
        CHECK(fabs(seconds[i] - expected) < 1e-12);
    }
    CHECK(out.pairs[HOBBIT_HIGH] == 10 && out.crowded == 0 && out.ahead == 0);
}

static void belady_knows_the_future(void) {
    struct hobbit_simulation s = cache(HOBBIT_POLICY_FARTHEST);
    begin();
    add(L, 0, 0, 1);
    add(L, 1, 0, 1); /* one of group 0 has to go: 0.1 is used later than 0.0 */
    add(L, 0, 0, 2);
    CHECK_EQUAL(run(&s), HOBBIT_OK);
    CHECK(hits[2] == 1 && misses[2] == 1);
}

static void thresholds_choose_copies(void) {
    struct hobbit_simulation s = cache(HOBBIT_POLICY_LRU);
    const float t1[] = {0.5f, 0.5f}, t2[] = {0.9f, 0.7f};
    s.rule.t1 = t1, s.rule.t2 = t2;
    begin();
    add(L, 0, 0, 1); /* score 0 is high, 0.75 low */
    add(L, 1, 0, 1); /* or skipped */
    add(L, 0, 1, 0); /* 1 is promoted; 0's high copy does for the low one */
    CHECK_EQUAL(run(&s), HOBBIT_OK);
    CHECK(out.pairs[HOBBIT_HIGH] == 4 && out.pairs[HOBBIT_LOW] == 1 && out.pairs[HOBBIT_SKIP] == 1);
    CHECK(read_bytes[0] == 120 && read_low_bytes[0] == 30 && read_bytes[1] == 90);
    CHECK(hits[2] == 1 && misses[2] == 1 && out.promotions == 1);
    struct hobbit_pool larger = {.bytes = 340, .slot_bytes = {100, 40}, .n_slots = {3, 8}};
    s.pools = &larger;
    add(L, 0, 0, 2); /* where 1's low copy was, which nobody had to evict, is room for 2's */
    CHECK_EQUAL(run(&s), HOBBIT_OK);
    CHECK(evictions[2] == 0 && evictions[3] == 0 && misses[3] == 1);
    has_weights[1] = 0;
    CHECK_EQUAL(run(&s), HOBBIT_ARG);
    CHECK_TEXT(err, "no gate weights");
}

static void predictions_use_the_disks_idle_time(void) {
    struct hobbit_simulation s = cache(HOBBIT_POLICY_LRU);
    struct hobbit_pool large = {.bytes = 800, .slot_bytes = {100, 40}, .n_slots = {8, 8}};
    s.pools = &large, s.predicted = 1, s.disk_bytes_s = 900, s.compute_s = 0.25;
    begin();
    add(L, 0, 0, 1); /* 0.2 s of reading leave 0.05: 45 bytes */
    add(P, 1, 0, 1);
    add(L, 1, 0, 1);
    CHECK_EQUAL(run(&s), HOBBIT_OK);
    CHECK(out.ahead == 2 && out.ahead_used == 2 && out.ahead_wasted_bytes == 0);
    CHECK(misses[2] == 2 && read_bytes[2] == 180); /* under way, and waited for */
    CHECK(fabs(seconds[0] - 0.25) < 1e-12 && fabs(seconds[2] - 0.25) < 1e-12);
    s.compute_s = 0.1; /* nothing is left for them: all of it is waited for */
    CHECK_EQUAL(run(&s), HOBBIT_OK);
    CHECK(fabs(seconds[2] - 0.2) < 1e-12);
    s.compute_s = 0.4;
    experts[4] = 2, experts[5] = 3; /* both in vain: read whole */
    CHECK_EQUAL(run(&s), HOBBIT_OK);
    CHECK(out.ahead_used == 0 && misses[2] == 2 && read_bytes[0] == 360 && read_bytes[2] == 180);
    s.compute_s = 0.25; /* or given up after 45 bytes */
    CHECK_EQUAL(run(&s), HOBBIT_OK);
    CHECK(out.ahead_wasted_bytes == 45 && read_bytes[2] == 225);
    s.disk_bytes_s = 0;
    experts[4] = 0, experts[5] = 1;
    CHECK_EQUAL(run(&s), HOBBIT_OK);
    CHECK(hits[2] == 2 && misses[2] == 0);
    s.least_odds = 0.5; /* the first has 0.75, the second 0.25 */
    CHECK_EQUAL(run(&s), HOBBIT_OK);
    CHECK(hits[2] == 1 && out.ahead == 1);
    s.predicted = 0;
    CHECK_EQUAL(run(&s), HOBBIT_OK);
    CHECK(hits[2] == 0 && out.ahead == 0);
}

static void what_is_read_ahead_again_was_read_in_vain(void) {
    struct hobbit_simulation s = cache(HOBBIT_POLICY_LRU);
    struct hobbit_pool four = {.bytes = 400, .slot_bytes = {100, 40}, .n_slots = {4, 0}};
    s.pools = &four, s.predicted = 1;
    begin();
    add(L, 0, 0, 1);
    add(P, 1, 2, 3); /* 2 is read, of a quarter of the slots */
    add(L, 1, 0, 1);
    add(L, 0, 2, 3); /* evicts it */
    add(P, 1, 2, 3);
    add(L, 1, 2, 1);
    CHECK_EQUAL(run(&s), HOBBIT_OK);
    CHECK(out.ahead == 2 && out.ahead_used == 1 && hits[5] == 2);
    CHECK_EQUAL(out.ahead_wasted_bytes, 90);
}

static void what_is_predicted_is_protected(void) {
    struct hobbit_simulation s = cache(HOBBIT_POLICY_LRU);
    struct hobbit_pool larger = {.bytes = 400, .slot_bytes = {100, 0}, .n_slots = {4, 0}};
    s.pools = &larger;
    begin();
    add(L, 1, 0, 1);
    add(L, 0, 0, 1);
    add(P, 1, 0, 2); /* 1.0 is the oldest */
    add(L, 0, 2, 1); /* a second piece of the layer */
    add(L, 1, 0, 3);
    add(L, 0, 0, 1);
    add(L, 0, 2, 3);
    add(L, 1, 0, 1); /* no longer */
    for (s.predicted = 0; s.predicted < 2; s.predicted++) {
        CHECK_EQUAL(run(&s), HOBBIT_OK);
        CHECK_EQUAL(hits[4], s.predicted);
        CHECK_EQUAL(hits[7], 0);
    }
}

/* While the layer is computed for which it is predicted again. */
static void what_is_protected_may_be_promoted(void) {
    struct hobbit_simulation s = cache(HOBBIT_POLICY_LRU);
    struct hobbit_pool large = {.bytes = 800, .slot_bytes = {100, 40}, .n_slots = {8, 8}};
    const float t1[] = {0.5f, 0.5f}, t2[] = {0.9f, 0.9f};
    s.rule.t1 = t1, s.rule.t2 = t2, s.pools = &large, s.predicted = 1;
    begin();
    add(L, 0, 0, 1); /* 1 is low */
    add(L, 0, 1, 0); /* and high now */
    add(P, 0, 0, 1); /* its low copy is there still */
    add(L, 0, 0, 1);
    CHECK_EQUAL(run(&s), HOBBIT_OK);
    CHECK(out.promotions == 1 && hits[3] == 2);
}

static void more_than_fits_is_computed_in_waves(void) {
    struct hobbit_simulation s = cache(HOBBIT_POLICY_LRU);
    begin();
    add(L, 0, 0, 1);
    add(L, 0, 2, 3);
    trace.n_events = 1; /* as two rows */
    n_rows[0] = 2;
    CHECK_EQUAL(run(&s), HOBBIT_OK);
    CHECK(misses[0] == 4 && evictions[0] == 1 && out.crowded == 1 && read_bytes[0] == 360);
}

static void refused(const struct hobbit_simulation *s, const char *words) {
    CHECK_EQUAL(run(s), HOBBIT_ARG);
    CHECK_TEXT(err, words);
}

static void nonsense_is_refused(void) {
    begin();
    add(L, 0, 0, 1);
    struct hobbit_simulation s = cache(HOBBIT_POLICY_LRU);
    struct hobbit_pool small = pool;
    s.pools = &small;
    small.bytes = 99;
    refused(&s, "size");
    small = pool, small.n_slots[HOBBIT_HIGH] = 0;
    refused(&s, "size");
    s = cache(HOBBIT_POLICY_FARTHEST + 1);
    refused(&s, "policy");
    s = cache(HOBBIT_POLICY_LRU), s.disk_bytes_s = -1;
    refused(&s, "speed");
    s = cache(HOBBIT_POLICY_LRU), s.compute_s = NAN;
    refused(&s, "time");
    s = cache(HOBBIT_POLICY_LRU), s.pool_of_group = (int32_t[]) {0, 1};
    refused(&s, "size");
    s = cache(HOBBIT_POLICY_LRU);
    experts[1] = 4;
    refused(&s, "event");
    experts[1] = 1, group[0] = 2;
    refused(&s, "event");
    group[0] = 0, n_rows[0] = 2;
    refused(&s, "event");
    n_rows[0] = 1;
    CHECK_EQUAL(run(&s), HOBBIT_OK);
    const float all[] = {-1, -1}, ones[] = {1, 1}; /* a low copy where there is no room for any */
    struct hobbit_pool high_only = {.bytes = 300, .slot_bytes = {100, 0}, .n_slots = {3, 0}};
    s.rule.t1 = all, s.rule.t2 = ones, s.pools = &high_only;
    refused(&s, "too small");
}

static void every_failed_allocation_is_one_error(void) {
    begin();
    add(L, 0, 0, 1);
    add(L, 1, 0, 1);
    struct hobbit_simulation s = cache(HOBBIT_POLICY_FARTHEST);
    const float t1[] = {0.5f, 0.5f}, t2[] = {0.9f, 0.9f};
    s.rule.t1 = t1, s.rule.t2 = t2;
    int n = 0;
    for (int32_t status = HOBBIT_NOMEM; status != HOBBIT_OK;) {
        atomic_store(&faults_allocation, ++n);
        status = run(&s);
        CHECK(status == HOBBIT_OK || strstr(err, "memory") != NULL);
    }
    atomic_store(&faults_allocation, 0);
    CHECK(n > 10);
}

int main(void) {
    RUN(each_layer_is_counted_at_its_event);
    RUN(belady_knows_the_future);
    RUN(thresholds_choose_copies);
    RUN(predictions_use_the_disks_idle_time);
    RUN(what_is_read_ahead_again_was_read_in_vain);
    RUN(what_is_predicted_is_protected);
    RUN(what_is_protected_may_be_promoted);
    RUN(more_than_fits_is_computed_in_waves);
    RUN(nonsense_is_refused);
    RUN(every_failed_allocation_is_one_error);
    return 0;
}
