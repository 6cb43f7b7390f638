/* Routers that look ahead, and learn to. A layer's router applied to the input that an earlier one gets already says
 * much of what it will choose (HOBBIT, section 3.3). What the layers in between add is not random: so each pair of
 * layers has a matrix of its own, which starts as the later router (scaled by the ratio of the two norms' weights) and
 * is corrected after every token, by normalised least mean squares, where it mattered:
 *
 *   W_e += MU (z_e - W_e x) x / |x|^2    for the experts that were chosen, those predicted, and the next in line
 *
 * or, when a pair has learned for a while, for those that were predicted and not chosen or chosen and not predicted,
 * but for every fourth token: that costs a fraction, where most predictions are right. z is what the router really
 * made of its own input. How often experts predicted with such a margin are chosen is counted too: the odds of a
 * prediction are measured, not assumed.
 *
 * Numbers only; nothing is allocated after hb_forecast_new; not thread-safe. */
#ifndef HB_FORECAST_H
#define HB_FORECAST_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "routers.h"

#define HB_FORECAST_DEPTH 4 /* layers ahead, at most */

struct hb_forecast;

struct hb_forecast *hb_forecast_new(int32_t n_groups, int32_t n_embd, int32_t n_expert, int32_t depth);
size_t hb_forecast_bytes(int32_t n_groups, int32_t n_embd, int32_t n_expert, int32_t depth);
void hb_forecast_free(struct hb_forecast *forecast); /* NULL is fine */

/* A pass through the layers begins: what is left of one that was broken off is not learned from. */
void hb_forecast_begin(struct hb_forecast *forecast);
/* At group `from`, whose router gets x [n_embd]: the n_used experts that group `from` + `ahead` will probably choose,
 * the likeliest first, with the odds of each (0..1) and p [n_expert]. `routers` has one of each group. False where one
 * of the two is not known or of another size. `learns`: hb_forecast_learn is to look at this one. */
bool hb_forecast_predict(struct hb_forecast *forecast, const struct hb_router *routers, int32_t from, int32_t ahead,
                         const float *x, bool learns, int32_t *experts, float *odds, float *p);
/* Group `at` gets x and chooses these experts: learn from what was predicted of it since the last time. Returns how
 * many of `*predicted`, the experts predicted from the group before, were chosen. */
int32_t hb_forecast_learn(struct hb_forecast *forecast, const struct hb_router *routers, int32_t at, const float *x,
                          const int32_t *experts, int32_t n, int32_t *predicted);

#endif
