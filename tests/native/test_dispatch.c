/* Description: a division is about as good as the best of all, never worse than to give one side everything, and what
 * was too slow is tried again. */
#include "dispatch.h"

#include <math.h>

#include "check.h"

#define MOST 12
#define MIB (1u << 20)

static struct hb_costs costs_of(double cpu, double device, double copy, double read, double device_fixed) {
    struct hb_costs c = {.copies_overlap = false};
    const double ns[HB_LANES] = {cpu, device, copy, read};
    for (int lane = 0; lane < HB_LANES; lane++) {
        struct hb_curve curve = {1, {{1, ns[lane] / MIB}}};
        if (lane == HB_LANE_CPU) { /* what the CPU needs grows with the pairs */
            curve = (struct hb_curve) {2, {{1, ns[lane] / MIB}, {101, 26 * ns[lane] / MIB}}};
        }
        hb_costs_set(&c, lane, lane == HB_LANE_DEVICE ? device_fixed : 0, &curve);
    }
    return c;
}

static struct hb_dispatcher dispatcher_of(int32_t mode) {
    struct hb_dispatcher d;
    hb_dispatcher_set(&d, mode);
    return d;
}

static double end(const struct hb_division *t) {
    return t->cpu > t->device ? t->cpu : t->device;
}

/* Those in the set are the device's. */
static double end_of(const struct hb_costs *c, const struct hb_item *items, int32_t n, uint32_t set) {
    struct hb_item divided[MOST];
    for (int32_t i = 0; i < n; i++) {
        divided[i] = items[i];
        divided[i].to_device = set >> i & 1;
        if (divided[i].to_device && !items[i].may_be_there) {
            return INFINITY;
        }
    }
    struct hb_division t = hb_dispatch_time(c, divided, n);
    return end(&t);
}

static double best_of_all(const struct hb_costs *c, const struct hb_item *items, int32_t n) {
    double best = INFINITY;
    for (uint32_t set = 0; set < 1u << n; set++) {
        double t = end_of(c, items, n, set);
        best = t < best ? t : best;
    }
    return best;
}

static int32_t random_items(struct hb_item *items, uint64_t *seed) {
    int32_t n = 1 + (int32_t) check_random(seed, MOST);
    for (int32_t i = 0; i < n; i++) {
        items[i] = (struct hb_item) {
            .index = i, .n_pairs = 1 + (int32_t) check_random(seed, 3) * (int32_t) check_random(seed, 60),
            .bytes = MIB * (1 + check_random(seed, 2)), .here = check_random(seed, 3) > 0,
            .there = check_random(seed, 2) == 0, .may_be_there = check_random(seed, 8) > 0};
        items[i].there = items[i].there && items[i].may_be_there;
    }
    return n;
}

static void it_is_about_the_best_of_all(void) {
    struct hb_item items[MOST];
    uint64_t seed = 5;
    double sum = 0;
    const int trials = 400;
    for (int trial = 0; trial < trials; trial++) {
        int32_t n = random_items(items, &seed);
        struct hb_costs c = costs_of(1e6, 1e4 + check_random(&seed, 2000000), check_random(&seed, 3000000),
                                     check_random(&seed, 5000000), check_random(&seed, 3000000));
        struct hb_dispatcher d = dispatcher_of(HOBBIT_DISPATCH_AUTO);
        c.copies_overlap = trial % 2 > 0;
        struct hb_division t = hb_dispatch(&d, &c, items, n);
        double best = best_of_all(&c, items, n), ratio = end(&t) / best;
        CHECK(ratio > 0.9999 && ratio < 1.3);
        sum += ratio;
        for (int32_t i = 0; i < n; i++) {
            CHECK(!items[i].to_device || items[i].may_be_there);
        }
        CHECK(end(&t) <= 1.02 * end_of(&c, items, n, 0));
        CHECK(end(&t) <= 1.02 * end_of(&c, items, n, (1u << n) - 1));
    }
    CHECK(sum / trials < 1.03);
}

static void fill(struct hb_item *items, int32_t n, int32_t n_pairs, int32_t n_there) {
    for (int32_t i = 0; i < n; i++) {
        items[i] = (struct hb_item) {.index = i, .n_pairs = n_pairs, .bytes = MIB, .here = true, .there = i < n_there,
                                     .may_be_there = true};
    }
}

/* r_c / (r_c + r_p) of the experts stay here while the others are copied and computed there. */
static void shares_are_as_the_rates(void) {
    struct hb_item items[100];
    struct hb_costs c = costs_of(3e6, 1e5, 9e5, 1, 0); /* an expert takes 3 ms here, and 1 ms there with its copy */
    struct hb_dispatcher d = dispatcher_of(HOBBIT_DISPATCH_AUTO);
    fill(items, 100, 1, 0);
    struct hb_division t = hb_dispatch(&d, &c, items, 100);
    CHECK(t.n_device >= 74 && t.n_device <= 76);
    CHECK(fabs(t.cpu - t.device) < 0.05 * t.cpu);
}

/* Of two experts that are there and two that are not, each of which takes 1 ms there and 1 ms or 3 ms to copy: a batch
 * at the end of the copies, or two, one of them during the copies. */
static void copies_and_computing_overlap(void) {
    const struct {
        double copy, fixed, turns, overlapped;
    } cases[] = {{1e6, 1e5, 6.1e6, 4.2e6}, {3e6, 1e5, 10.1e6, 7.2e6}, {1e6, 4e6, 10e6, 10e6}};
    for (int i = 0; i < 3; i++) {
        struct hb_item items[4];
        struct hb_costs c = costs_of(1e9, 1e6, cases[i].copy, 1, cases[i].fixed);
        struct hb_dispatcher d = dispatcher_of(HOBBIT_DISPATCH_AUTO);
        fill(items, 4, 1, 2);
        CHECK(fabs(hb_dispatch(&d, &c, items, 4).device - cases[i].turns) < 1e4);
        c.copies_overlap = true;
        CHECK(fabs(hb_dispatch(&d, &c, items, 4).device - cases[i].overlapped) < 1e4);
    }
    struct hb_item items[100];
    struct hb_costs c = costs_of(3e6, 1e6, 1e6, 1, 0);
    for (int overlap = 0; overlap < 2; overlap++) { /* shares of 3 to 2, and 3 to 1 */
        struct hb_dispatcher d = dispatcher_of(HOBBIT_DISPATCH_AUTO);
        c.copies_overlap = overlap;
        fill(items, 100, 1, 0);
        int32_t n = hb_dispatch(&d, &c, items, 100).n_device, share = overlap ? 75 : 60;
        CHECK(n >= share - 1 && n <= share + 1);
    }
}

/* A copy pays when an expert has many pairs, as Fiddler has it. */
static void many_pairs_pay_for_a_copy(void) {
    struct hb_item items[2];
    struct hb_costs c = costs_of(1e6, 1e5, 8e6, 1, 0);
    for (int32_t n_pairs = 1; n_pairs < 100; n_pairs += 49) {
        struct hb_dispatcher d = dispatcher_of(HOBBIT_DISPATCH_AUTO);
        fill(items, 2, 1, 0);
        items[1].n_pairs = n_pairs;
        (void) hb_dispatch(&d, &c, items, 2);
        bool any = items[0].to_device || items[1].to_device;
        CHECK_EQUAL(any, n_pairs >= 50);
        CHECK(!any || items[0].n_pairs == n_pairs);
    }
}

static void each_mode_does_what_it_says(void) {
    struct hb_item items[4];
    struct hb_costs c = costs_of(1e6, 1e9, 1e9, 1, 1e9);
    const struct {
        int32_t mode, wanted;
    } cases[] = {{HOBBIT_DISPATCH_SPLIT, 2}, {HOBBIT_DISPATCH_DEVICE, 4}, {HOBBIT_DISPATCH_AUTO, 0}};
    for (int i = 0; i < 3; i++) {
        struct hb_dispatcher d = dispatcher_of(cases[i].mode);
        fill(items, 4, 1, 2);
        CHECK_EQUAL(hb_dispatch(&d, &c, items, 4).n_device, cases[i].wanted);
    }
}

static void what_is_on_no_memory_here_may_be_worth_a_slow_device(void) {
    struct hb_item items[2];
    struct hb_costs c = costs_of(1e6, 5e6, 1e6, 9e6, 0);
    struct hb_dispatcher d = dispatcher_of(HOBBIT_DISPATCH_AUTO);
    fill(items, 2, 1, 2);
    items[1].here = false;
    (void) hb_dispatch(&d, &c, items, 2);
    for (int i = 0; i < 2; i++) {
        CHECK_EQUAL(items[i].to_device, items[i].index == 1);
    }
}

/* An idle side is tried after about 256 layers if it is not much slower, and in no more than a hundredth of the time. */
static void a_slow_side_is_tried_again_as_far_as_there_is_time(void) {
    const double slow[] = {5e6, 1e7, 1e8};
    for (int i = 0; i < 6; i++) {
        struct hb_item items[4];
        double cpu = i < 3 ? 1e6 : slow[i - 3], device = i < 3 ? slow[i] : 1e5;
        struct hb_costs c = costs_of(cpu, device, 1e6, 1, 0);
        struct hb_dispatcher d = dispatcher_of(HOBBIT_DISPATCH_AUTO);
        int layers = 200000, tried = 0, first = -1;
        double least = 0, all = 0;
        for (int layer = 0; layer < layers; layer++) {
            fill(items, 4, 1, 4);
            struct hb_division t = hb_dispatch(&d, &c, items, 4);
            bool tries = t.n_device == (i < 3 ? 1 : 3);
            least = layer == 0 ? end(&t) : least;
            CHECK(tries || t.n_device == (i < 3 ? 0 : 4));
            CHECK(i >= 3 || !d.more);
            first = first < 0 && tries ? layer : first;
            tried += tries;
            all += end(&t);
        }
        CHECK(first >= 255 && tried >= 2 && tried < layers / 255);
        CHECK(all <= 1.01 * least * layers);
        CHECK(all > 1.001 * least * layers || tried > 700); /* not in vain */
    }
}

static void a_side_that_is_fast_again_is_used(void) {
    struct hb_item items[4];
    struct hb_costs c = costs_of(1e6, 1e8, 1e6, 1, 0);
    struct hb_dispatcher d = dispatcher_of(HOBBIT_DISPATCH_AUTO);
    fill(items, 4, 1, 2);
    CHECK_EQUAL(hb_dispatch(&d, &c, items, 4).n_device, 0);
    c = costs_of(1e6, 1e5, 1e6, 1, 0);
    fill(items, 4, 1, 2);
    CHECK(hb_dispatch(&d, &c, items, 4).n_device >= 2);
    CHECK(d.more);
}

int main(void) {
    RUN(it_is_about_the_best_of_all);
    RUN(shares_are_as_the_rates);
    RUN(copies_and_computing_overlap);
    RUN(many_pairs_pay_for_a_copy);
    RUN(each_mode_does_what_it_says);
    RUN(what_is_on_no_memory_here_may_be_worth_a_slow_device);
    RUN(a_slow_side_is_tried_again_as_far_as_there_is_time);
    RUN(a_side_that_is_fast_again_is_used);
    return 0;
}
