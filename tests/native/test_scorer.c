/* Description: scores are what the paper says, for gate weights of any order, sign and sum, and so are the needs. */
#include "scorer.h"

#include <float.h>
#include <math.h>

#include "check.h"
#include "hobbit.h"

#define MAX HB_SCORER_EXPERTS

/* Of each expert on its own: what comes before it, of everything. */
static double naive_score(const float *weights, int n, int of) {
    long double before = 0, all = 0;
    for (int i = 0; i < n; i++) {
        long double w = fabsl((long double) weights[i]), own = fabsl((long double) weights[of]);
        all += w;
        before += w > own || (w == own && i < of) ? w : 0;
    }
    return all > 0 ? (double) (before / all) : 0;
}

static void check_scores(const float *weights, int n) {
    float scores[MAX + 1];
    scores[n] = -7;
    hb_scorer_scores(weights, n, scores);
    CHECK(scores[n] == -7); /* no more than n */
    int best = 0;
    for (int i = 0; i < n; i++) {
        CHECK(scores[i] >= 0 && scores[i] <= 1);
        CHECK(fabs((double) scores[i] - naive_score(weights, n, i)) < 1e-6);
        best = fabsf(weights[i]) > fabsf(weights[best]) ? i : best;
    }
    CHECK(scores[best] == 0); /* not nearly: T1 = 0 is the most important expert alone */
}

static void small_cases_are_exact(void) {
    float s[4];
    hb_scorer_scores((float[]) {0.5f, 0.25f, 0.125f, 0.125f}, 4, s);
    CHECK(s[0] == 0 && s[1] == 0.5f && s[2] == 0.75f && s[3] == 0.875f); /* equal ones count in their order */
    hb_scorer_scores((float[]) {1, 4, 2, 1}, 4, s); /* not sorted, and of another sum */
    CHECK(s[0] == 0.75f && s[1] == 0 && s[2] == 0.5f && s[3] == 0.875f);
    hb_scorer_scores((float[]) {-4, 2, -1, 1}, 4, s); /* by size, not sign */
    CHECK(s[0] == 0 && s[1] == 0.5f && s[2] == 0.75f && s[3] == 0.875f);
    hb_scorer_scores((float[]) {0, 3, 0}, 3, s);
    CHECK(s[0] == 1 && s[1] == 0 && s[2] == 1);
    hb_scorer_scores((float[]) {0, -0.0f, 0}, 3, s);
    CHECK(s[0] == 0 && s[1] == 0 && s[2] == 0);
    hb_scorer_scores((float[]) {0.3f}, 1, s);
    CHECK(s[0] == 0);
}

static void scores_are_those_of_a_naive_sum(void) {
    uint64_t seed = 3;
    float weights[MAX];
    for (int i = 0; i < 3000; i++) {
        int n = 1 + (int) check_random(&seed, i % 50 == 0 ? MAX : 16);
        for (int k = 0; k < n; k++) {
            float w = (float) check_random(&seed, 1 << 20) / (1 << 20);
            switch (check_random(&seed, 6)) {
                case 0: w = 0; break;
                case 1: w = -w; break;
                case 2: w = k > 0 ? weights[k - 1] : w; break; /* a tie */
                case 3: w = k > 0 ? -weights[check_random(&seed, (uint32_t) k)] : w; break;
                default: w *= i % 3 == 0 ? 1000.0f : 1; break; /* sums are anything */
            }
            weights[k] = w;
        }
        check_scores(weights, n);
    }
}

/* Where most of the sum is lost to rounding. */
static void scores_are_never_above_one(void) {
    uint64_t seed = 5;
    float weights[MAX], scores[MAX];
    for (int i = 0; i < 3000; i++) {
        int n = 1 + (int) check_random(&seed, i % 50 == 0 ? MAX : 24);
        for (int k = 0; k < n; k++) {
            float w = 1 + (float) check_random(&seed, 1 << 20) / (1 << 20);
            weights[k] = ldexpf(w, (int) check_random(&seed, 250) - 125);
        }
        hb_scorer_scores(weights, n, scores);
        for (int k = 0; k < n; k++) {
            CHECK(scores[k] >= 0 && scores[k] <= 1);
            CHECK(hb_scorer_need(scores[k], -1, 1) == HOBBIT_LOW); /* T2 = 1 skips nothing */
        }
    }
    hb_scorer_scores((float[]) {FLT_MAX, FLT_MAX, FLT_MAX, -FLT_MAX}, 4, scores);
    CHECK(scores[1] == 0.25f && scores[3] == 0.75f); /* the sum is no float */
    hb_scorer_scores((float[]) {FLT_TRUE_MIN, 0, FLT_TRUE_MIN}, 3, scores);
    CHECK(scores[0] == 0 && scores[1] == 1 && scores[2] == 0.5f);
}

static void needs_include_their_thresholds(void) {
    CHECK_EQUAL(hb_scorer_need(0, 0, 0), HOBBIT_HIGH);
    CHECK_EQUAL(hb_scorer_need(0.25f, 0.25f, 0.5f), HOBBIT_HIGH);
    CHECK_EQUAL(hb_scorer_need(nextafterf(0.25f, 1), 0.25f, 0.5f), HOBBIT_LOW);
    CHECK_EQUAL(hb_scorer_need(0.5f, 0.25f, 0.5f), HOBBIT_LOW);
    CHECK_EQUAL(hb_scorer_need(nextafterf(0.5f, 1), 0.25f, 0.5f), HOBBIT_SKIP);
    CHECK_EQUAL(hb_scorer_need(nextafterf(0.5f, 1), 0.5f, 0.5f), HOBBIT_SKIP); /* no low ones between */
    CHECK_EQUAL(hb_scorer_need(1, 1, 1), HOBBIT_HIGH);
    CHECK_EQUAL(hb_scorer_need(1, 0, 1), HOBBIT_LOW);
    CHECK_EQUAL(hb_scorer_need(0, -1, 1), HOBBIT_LOW);
    CHECK_EQUAL(hb_scorer_need(0, -1, -1), HOBBIT_SKIP);
}

/* What cannot be scored is computed as it always was. */
static void what_is_no_number_needs_high(void) {
    CHECK_EQUAL(hb_scorer_need(NAN, 0, 0), HOBBIT_HIGH);
    CHECK_EQUAL(hb_scorer_need(-NAN, -1, -1), HOBBIT_HIGH);
    float scores[3];
    for (int at = 0; at < 3; at++) {
        float weights[3] = {0.5f, 0.25f, 0.125f};
        weights[at] = NAN;
        hb_scorer_scores(weights, 3, scores);
        for (int i = 0; i < 3; i++) {
            CHECK_EQUAL(hb_scorer_need(scores[i], 0, 0), HOBBIT_HIGH);
        }
        weights[at] = -INFINITY;
        hb_scorer_scores(weights, 3, scores);
        CHECK_EQUAL(hb_scorer_need(scores[at], 0, 0), HOBBIT_HIGH);
    }
}

int main(void) {
    RUN(small_cases_are_exact);
    RUN(scores_are_those_of_a_naive_sum);
    RUN(scores_are_never_above_one);
    RUN(needs_include_their_thresholds);
    RUN(what_is_no_number_needs_high);
    return 0;
}
