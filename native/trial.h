/* Which of a few ways to run is fastest, found out while running: each gets turns, the best is kept, and now and then
 * they are compared again. Pure: the caller measures. */
#ifndef HB_TRIAL_H
#define HB_TRIAL_H

#include <stdint.h>

#define HB_TRIAL_ARMS 3
#define HB_TRIAL_TURN 8     /* tokens; the first of a turn is not counted */
#define HB_TRIAL_TURNS 4    /* of each arm in a comparison */
#define HB_TRIAL_REST 512   /* tokens between comparisons */
#define HB_TRIAL_SAMPLES (HB_TRIAL_TURNS * (HB_TRIAL_TURN - 1))
/* An arm replaces arm 0, the plain one, when its median is better by this share. */
#define HB_TRIAL_MARGIN 0.01

struct hb_trial {
    int32_t n_arms;
    int32_t lead;     /* tokens still to come before the first comparison */
    int32_t arm;      /* in force */
    int32_t chosen;   /* by the last comparison; -1: none was finished yet */
    int32_t left;     /* tokens of the turn, or of the rest */
    int32_t turn;     /* of n_arms * HB_TRIAL_TURNS; then the rest */
    int32_t n[HB_TRIAL_ARMS];
    uint64_t samples[HB_TRIAL_ARMS][HB_TRIAL_SAMPLES]; /* ns a token */
    uint64_t medians[HB_TRIAL_ARMS]; /* of the last comparison */
};

/* For `lead` tokens arm 1 is in force, if there is one: what has to learn first is not judged before. */
void hb_trial_start(struct hb_trial *trial, int32_t n_arms, int32_t lead);
/* A token took so long with the arm in force; afterwards another may be. */
void hb_trial_took(struct hb_trial *trial, uint64_t ns);

#endif
