/* How often predictions come true: measured, not assumed. They are counted in bins, by the margin with which an expert
 * was predicted over the first one that was not: in units of router logits, so 0 or less for one that was predicted
 * beyond those that a token uses. */
#ifndef HB_ODDS_H
#define HB_ODDS_H

#include <stdbool.h>
#include <stdint.h>

#define HB_ODDS_BINS 9

struct hb_odds {
    struct {
        float right, all;
    } bins[HB_ODDS_BINS];
};

/* A few predictions are assumed, so that nothing is sure before much was counted. */
void hb_odds_start(struct hb_odds *odds);
int32_t hb_odds_bin(float margin);
/* The share of that bin's predictions that came true, older ones for less: 0 .. 1. */
float hb_odds(const struct hb_odds *odds, int32_t bin);
void hb_odds_count(struct hb_odds *odds, int32_t bin, bool right);

#endif
