/* Description: odds begin as assumed, become what was counted, follow a change, and are kept apart by margin. */
#include "odds.h"

#include <math.h>

#include "check.h"

static void margins_have_bins(void) {
    const float margins[] = {-INFINITY, 0.05f, 0.2f, 0.3f, 0.6f, 1, 1.5f, 2, INFINITY};
    for (int32_t i = 0; i < HB_ODDS_BINS; i++) {
        CHECK_EQUAL(hb_odds_bin(margins[i]), i);
    }
    CHECK_EQUAL(hb_odds_bin(0), 0);
    CHECK_EQUAL(hb_odds_bin(NAN), 0);
}

static float after(struct hb_odds *odds, int32_t bin, int n, int every) {
    for (int i = 0; i < n; i++) {
        hb_odds_count(odds, bin, i % every != 0);
    }
    return hb_odds(odds, bin);
}

static void odds_are_what_was_counted(void) {
    struct hb_odds odds;
    hb_odds_start(&odds);
    float assumed = hb_odds(&odds, 3);
    CHECK(assumed > 0.3f && assumed < 0.7f); /* not enough to read ahead for */
    CHECK(after(&odds, 3, 4, 1) < assumed && after(&odds, 5, 4, 100) > assumed);
    CHECK(fabsf(after(&odds, 3, 3000, 4) - 0.75f) < 0.02f);
    CHECK(fabsf(after(&odds, 3, 3000, 2) - 0.5f) < 0.04f); /* the last ones count more */
    for (int32_t bin = 0; bin < HB_ODDS_BINS; bin++) {
        CHECK(bin == 3 || bin == 5 || hb_odds(&odds, bin) == assumed);
    }
}

static void nothing_is_sure(void) {
    struct hb_odds odds;
    hb_odds_start(&odds);
    float never = after(&odds, 0, 20000, 1), always = 0;
    for (int i = 0; i < 20000; i++) {
        hb_odds_count(&odds, 1, true);
    }
    always = hb_odds(&odds, 1);
    CHECK(never >= 0 && never < 0.01f && always > 0.99f && always <= 1);
}

int main(void) {
    RUN(margins_have_bins);
    RUN(odds_are_what_was_counted);
    RUN(nothing_is_sure);
    return 0;
}
