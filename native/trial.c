#include "trial.h"

#include <stdbool.h>

void hb_trial_start(struct hb_trial *t, int32_t n_arms, int32_t lead) {
    *t = (struct hb_trial) {
        .n_arms = n_arms, .lead = lead, .arm = n_arms > 1 && lead > 0, .chosen = -1, .left = HB_TRIAL_TURN};
}

static uint64_t median(uint64_t *samples, int32_t n) {
    for (int32_t i = 1; i < n; i++) {
        uint64_t sample = samples[i];
        int32_t at = i;
        for (; at > 0 && samples[at - 1] > sample; at--) {
            samples[at] = samples[at - 1];
        }
        samples[at] = sample;
    }
    return n > 0 ? samples[n / 2] : UINT64_MAX;
}

static int32_t best(struct hb_trial *t) {
    int32_t best = 0;
    for (int32_t a = 0; a < t->n_arms; a++) {
        t->medians[a] = median(t->samples[a], t->n[a]);
        double limit = (double) t->medians[best] * (best == 0 ? 1 - HB_TRIAL_MARGIN : 1);
        best = (double) t->medians[a] < limit ? a : best;
    }
    return best;
}

/* Turns go forth and back (0 1 2 2 1 0), so that a drift favours nobody. */
static int32_t arm_of_turn(const struct hb_trial *t, int32_t turn) {
    int32_t within = turn % (2 * t->n_arms);
    return within < t->n_arms ? within : 2 * t->n_arms - 1 - within;
}

static void next_turn(struct hb_trial *t) {
    int32_t turns = t->n_arms * HB_TRIAL_TURNS;
    t->turn++;
    if (t->turn < turns) {
        t->arm = arm_of_turn(t, t->turn);
        t->left = HB_TRIAL_TURN;
    } else if (t->turn == turns) {
        t->arm = t->chosen = best(t);
        t->left = HB_TRIAL_REST;
    } else {
        int32_t chosen = t->chosen;
        hb_trial_start(t, t->n_arms, 0);
        t->chosen = chosen;
    }
}

void hb_trial_took(struct hb_trial *t, uint64_t ns) {
    if (t->n_arms < 2) {
        return;
    }
    if (t->lead > 0) {
        t->arm = --t->lead > 0;
        return;
    }
    bool counts = t->turn < t->n_arms * HB_TRIAL_TURNS && t->left < HB_TRIAL_TURN;
    if (counts) {
        t->samples[t->arm][t->n[t->arm]++] = ns;
    }
    if (--t->left == 0) {
        next_turn(t);
    }
}
