#include "odds.h"

/* What is assumed before anything was counted, as if of so many predictions; and when counts are halved. */
#define PRIOR_RIGHT 0.6f
#define PRIOR 8.0f
#define MOST_COUNTED 1024.0f

static const float bounds[HB_ODDS_BINS - 1] = {0.0f, 0.1f, 0.25f, 0.5f, 0.8f, 1.2f, 1.8f, 2.5f};

void hb_odds_start(struct hb_odds *odds) {
    for (int32_t i = 0; i < HB_ODDS_BINS; i++) {
        odds->bins[i].right = PRIOR * PRIOR_RIGHT;
        odds->bins[i].all = PRIOR;
    }
}

int32_t hb_odds_bin(float margin) {
    int32_t bin = 0;
    while (bin < HB_ODDS_BINS - 1 && margin > bounds[bin]) {
        bin++;
    }
    return bin;
}

float hb_odds(const struct hb_odds *odds, int32_t bin) {
    return odds->bins[bin].right / odds->bins[bin].all;
}

void hb_odds_count(struct hb_odds *odds, int32_t bin, bool right) {
    odds->bins[bin].right += right;
    odds->bins[bin].all += 1;
    if (odds->bins[bin].all > MOST_COUNTED) {
        odds->bins[bin].right /= 2;
        odds->bins[bin].all /= 2;
    }
}
