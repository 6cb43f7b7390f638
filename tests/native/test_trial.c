/* Description: the fastest arm is found by its turns, the plain one is kept within the margin, and after a rest all are
 * compared again. */
#include "trial.h"

#include "check.h"

enum { COMPARISON = HB_TRIAL_TURN * HB_TRIAL_TURNS }; /* tokens of an arm */

/* So many tokens, each as long as its arm takes. */
static void tokens(struct hb_trial *t, int n, const uint64_t *ns_of_arm) {
    for (int i = 0; i < n; i++) {
        hb_trial_took(t, ns_of_arm[t->arm]);
    }
}

static void the_fastest_arm_is_chosen(void) {
    const uint64_t speeds[][HB_TRIAL_ARMS] = {{90, 100, 110}, {100, 90, 95}, {100, 98, 80}};
    for (int32_t fastest = 0; fastest < 3; fastest++) {
        struct hb_trial t;
        hb_trial_start(&t, 3, 0);
        CHECK(t.arm == 0 && t.chosen == -1);
        tokens(&t, 3 * COMPARISON - 1, speeds[fastest]);
        CHECK_EQUAL(t.chosen, -1);
        tokens(&t, 1, speeds[fastest]);
        CHECK(t.chosen == fastest && t.arm == fastest);
        for (int a = 0; a < 3; a++) {
            CHECK_EQUAL(t.medians[a], speeds[fastest][a]);
            CHECK_EQUAL(t.n[a], HB_TRIAL_SAMPLES);
        }
    }
}

static void the_plain_arm_is_kept_within_the_margin(void) {
    const uint64_t limit = (uint64_t) (1000 * (1 - HB_TRIAL_MARGIN));
    for (uint64_t other = limit - 1; other <= limit + 1; other++) {
        struct hb_trial t;
        hb_trial_start(&t, 2, 0);
        tokens(&t, 2 * COMPARISON, (const uint64_t[]) {1000, other});
        CHECK_EQUAL(t.chosen, other < limit);
    }
    struct hb_trial t; /* the margin is only the plain arm's */
    hb_trial_start(&t, 3, 0);
    tokens(&t, 3 * COMPARISON, (const uint64_t[]) {1000, 900, 899});
    CHECK_EQUAL(t.chosen, 2);
}

static void every_arm_has_as_many_turns_and_a_drift_favours_none(void) {
    struct hb_trial t;
    int32_t turns[HB_TRIAL_ARMS] = {0}, place[HB_TRIAL_ARMS] = {0};
    hb_trial_start(&t, 3, 0);
    for (int32_t turn = 0; turn < 3 * HB_TRIAL_TURNS; turn++) {
        int32_t arm = t.arm;
        turns[arm]++;
        place[arm] += turn;
        for (int i = 0; i < HB_TRIAL_TURN; i++) {
            CHECK_EQUAL(t.arm, arm); /* throughout its turn */
            hb_trial_took(&t, 5);
        }
    }
    for (int a = 0; a < 3; a++) {
        CHECK_EQUAL(turns[a], HB_TRIAL_TURNS);
        CHECK_EQUAL(place[a], place[0]);
    }
}

static void the_first_token_of_a_turn_does_not_count(void) {
    struct hb_trial t;
    hb_trial_start(&t, 2, 0);
    for (int i = 0; i < 2 * COMPARISON; i++) {
        bool first = t.left == HB_TRIAL_TURN;
        hb_trial_took(&t, first ? 1 : t.arm == 1 ? 50 : 100); /* what the other arm has left behind */
    }
    CHECK_EQUAL(t.medians[0], 100);
    CHECK_EQUAL(t.medians[1], 50);
    CHECK_EQUAL(t.chosen, 1);
}

static void one_slow_token_decides_nothing(void) {
    struct hb_trial t;
    hb_trial_start(&t, 2, 0);
    for (int i = 0; i < 2 * COMPARISON; i++) {
        bool stalled = t.arm == 1 && t.left == 2;
        hb_trial_took(&t, stalled ? 1000000 : t.arm == 1 ? 50 : 100);
    }
    CHECK_EQUAL(t.chosen, 1);
}

static void after_the_rest_they_are_compared_again(void) {
    struct hb_trial t;
    hb_trial_start(&t, 2, 0);
    tokens(&t, 2 * COMPARISON, (const uint64_t[]) {100, 50});
    CHECK_EQUAL(t.arm, 1);
    tokens(&t, HB_TRIAL_REST - 1, (const uint64_t[]) {100, 5000});
    CHECK(t.arm == 1 && t.chosen == 1); /* nothing of the rest counts */
    tokens(&t, 1, (const uint64_t[]) {100, 5000});
    CHECK(t.arm == 0 && t.chosen == 1 && t.turn == 0); /* the old result holds until there is a new one */
    tokens(&t, 2 * COMPARISON, (const uint64_t[]) {100, 150});
    CHECK(t.arm == 0 && t.chosen == 0);
}

static void a_single_arm_is_never_compared(void) {
    struct hb_trial t;
    hb_trial_start(&t, 1, 0);
    for (int i = 0; i < 3 * (COMPARISON + HB_TRIAL_REST); i++) {
        hb_trial_took(&t, 7);
        CHECK_EQUAL(t.arm, 0);
    }
}

static void arm_1_leads(void) {
    struct hb_trial t;
    hb_trial_start(&t, 2, 3);
    for (int i = 0; i < 3; i++) {
        CHECK_EQUAL(t.arm, 1);
        hb_trial_took(&t, 1); /* is not counted */
    }
    CHECK(t.arm == 0 && t.n[0] == 0 && t.n[1] == 0 && t.left == HB_TRIAL_TURN);
    hb_trial_start(&t, 1, 3);
    CHECK_EQUAL(t.arm, 0);
}

int main(void) {
    RUN(arm_1_leads);
    RUN(the_fastest_arm_is_chosen);
    RUN(the_plain_arm_is_kept_within_the_margin);
    RUN(every_arm_has_as_many_turns_and_a_drift_favours_none);
    RUN(the_first_token_of_a_turn_does_not_count);
    RUN(one_slow_token_decides_nothing);
    RUN(after_the_rest_they_are_compared_again);
    RUN(a_single_arm_is_never_compared);
    return 0;
}
