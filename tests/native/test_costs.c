/* Description: costs follow what is measured, whether a batch has a fixed part, whether all batches are alike, and
 * whether one of them was interrupted. */
#include "costs.h"

#include <math.h>

#include "check.h"

#define BYTES 1000000u

static const struct hb_curve curve = {3, {{1, 0.5}, {4, 0.5}, {16, 2.0}}};

static struct hb_costs costs_of(double fixed) {
    struct hb_costs c;
    hb_costs_set(&c, HB_LANE_CPU, fixed, &curve);
    return c;
}

static bool close_to(double value, double wanted, double share) {
    return fabs(value - wanted) <= share * wanted;
}

static double batch(const struct hb_costs *c, int32_t n_experts, int32_t n_pairs) {
    return hb_costs_fixed(c, HB_LANE_CPU) + n_experts * hb_costs_expert(c, HB_LANE_CPU, n_pairs, BYTES);
}

static void between_points_it_is_interpolated(void) {
    struct hb_costs c = costs_of(1e5);
    CHECK(close_to(hb_costs_work(&c, HB_LANE_CPU, 1, BYTES), 0.5 * BYTES, 1e-9));
    CHECK(close_to(hb_costs_work(&c, HB_LANE_CPU, 3, BYTES), 0.5 * BYTES, 1e-9));
    CHECK(close_to(hb_costs_work(&c, HB_LANE_CPU, 10, BYTES), 1.25 * BYTES, 1e-9));
    CHECK(close_to(hb_costs_work(&c, HB_LANE_CPU, 28, BYTES), 3.5 * BYTES, 1e-9));
    CHECK(close_to(hb_costs_expert(&c, HB_LANE_CPU, 1, 2 * BYTES), 1.0 * BYTES, 1e-9));
    CHECK(close_to(hb_costs_fixed(&c, HB_LANE_CPU), 1e5, 1e-9));
}

/* Batches of different sizes by another truth than what was measured at start. */
static void both_parts_are_found(void) {
    const double fixed[] = {1e5, 2e6, 3e4}, scale[] = {3, 0.5, 1};
    for (int i = 0; i < 3; i++) {
        struct hb_costs c = costs_of(1e5);
        uint64_t seed = 3;
        for (int n = 0; n < 200; n++) {
            double work = (1 + check_random(&seed, 8)) * hb_costs_work(&c, HB_LANE_CPU, 1, BYTES);
            double noise = 1 + 0.05 * ((double) check_random(&seed, 2000) / 1000 - 1);
            hb_costs_learn(&c, HB_LANE_CPU, work, (fixed[i] + scale[i] * work) * noise);
        }
        for (int32_t n = 1; n <= 8; n++) {
            CHECK(close_to(batch(&c, n, 1), fixed[i] + scale[i] * n * 0.5 * BYTES, 0.15));
        }
    }
}

/* While a token is computed after another all batches are alike: what they take is known, and then again when it
 * changes; nothing grows beyond bounds meanwhile. */
static void batches_that_are_all_alike(void) {
    struct hb_costs c = costs_of(1e5);
    double work = 4 * hb_costs_work(&c, HB_LANE_CPU, 1, BYTES);
    for (int n = 0; n < 20000; n++) {
        hb_costs_learn(&c, HB_LANE_CPU, work, 5e6);
    }
    CHECK(close_to(batch(&c, 4, 1), 5e6, 0.02));
    CHECK(batch(&c, 1, 1) > 0.3e6 && batch(&c, 1, 1) < 5e6);
    for (int n = 0; n < 100; n++) {
        hb_costs_learn(&c, HB_LANE_CPU, work, 2e6);
    }
    CHECK(close_to(batch(&c, 4, 1), 2e6, 0.1));
}

static void an_interruption_is_forgotten(void) {
    struct hb_costs c = costs_of(1e5);
    double work = 4 * hb_costs_work(&c, HB_LANE_CPU, 1, BYTES), before = batch(&c, 4, 1);
    for (int n = 0; n < 50; n++) {
        hb_costs_learn(&c, HB_LANE_CPU, work, before);
    }
    hb_costs_learn(&c, HB_LANE_CPU, work, 1e12);
    CHECK(batch(&c, 4, 1) < 4 * before);
    for (int n = 0; n < 40; n++) {
        hb_costs_learn(&c, HB_LANE_CPU, work, before);
    }
    CHECK(close_to(batch(&c, 4, 1), before, 0.1));
}

static void nothing_is_free(void) {
    struct hb_costs c = costs_of(0);
    for (int n = 0; n < 1000; n++) {
        hb_costs_learn(&c, HB_LANE_CPU, hb_costs_work(&c, HB_LANE_CPU, 1, BYTES), 0);
        hb_costs_learn(&c, HB_LANE_CPU, 0, 0);
    }
    CHECK(hb_costs_fixed(&c, HB_LANE_CPU) > 0);
    CHECK(hb_costs_expert(&c, HB_LANE_CPU, 1, BYTES) > 0);
    CHECK(isfinite(batch(&c, 8, 300)));
}

/* What a copy takes is worth it from so many pairs on, whatever the sides cost, and never where the device is slower. */
static void a_copy_pays_from_so_many_pairs_on(void) {
    uint64_t seed = 11;
    for (int trial = 0; trial < 200; trial++) {
        struct hb_costs c;
        struct hb_curve here = {2, {{1, 1}, {101, 26}}}, there = {1, {{1, 0.1 + check_random(&seed, 100) / 50.0}}};
        struct hb_curve copy = {1, {{1, check_random(&seed, 100) / 5.0}}};
        hb_costs_set(&c, HB_LANE_CPU, 0, &here);
        hb_costs_set(&c, HB_LANE_DEVICE, check_random(&seed, 1000000), &there);
        hb_costs_set(&c, HB_LANE_UPLOAD, 0, &copy);
        int32_t n = hb_costs_break_even(&c, BYTES);
        CHECK(n > 0);
        for (int32_t pairs = n - 1; pairs <= n; pairs++) {
            double cpu = hb_costs_fixed(&c, HB_LANE_CPU) + hb_costs_expert(&c, HB_LANE_CPU, pairs, BYTES);
            double device = hb_costs_fixed(&c, HB_LANE_DEVICE) + hb_costs_expert(&c, HB_LANE_DEVICE, pairs, BYTES);
            double copies = hb_costs_fixed(&c, HB_LANE_UPLOAD) + hb_costs_expert(&c, HB_LANE_UPLOAD, 1, BYTES);
            CHECK(pairs == 0 || (copies + device < cpu) == (pairs == n));
        }
        hb_costs_set(&c, HB_LANE_DEVICE, 0, &here);
        CHECK_EQUAL(hb_costs_break_even(&c, BYTES), 0);
    }
}

int main(void) {
    RUN(between_points_it_is_interpolated);
    RUN(both_parts_are_found);
    RUN(batches_that_are_all_alike);
    RUN(an_interruption_is_forgotten);
    RUN(nothing_is_free);
    RUN(a_copy_pays_from_so_many_pairs_on);
    return 0;
}
