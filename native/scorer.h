/* How much each of a token's experts matters, and which precision it needs for that. Pure functions. */
#ifndef HB_SCORER_H
#define HB_SCORER_H

#include <stdint.h>

#define HB_SCORER_EXPERTS 512 /* as many as llama.cpp runs */

/* The scores of a token's n experts (at most HB_SCORER_EXPERTS) from their gate weights, in any order and of any sum
 * (HOBBIT, arXiv 2411.01433, section 3.2): with |w| sorted descending and scaled to sum 1,
 *
 *   s_0 = 0,  s_i = |w_0| + ... + |w_(i-1)|
 *
 * In [0, 1] for finite weights, else perhaps no number; equal weights count in their order. */
void hb_scorer_scores(const float *weights, int n, float *scores);

/* HOBBIT_HIGH where s <= t1, HOBBIT_LOW where s <= t2, else HOBBIT_SKIP. A score that is no number needs HIGH. */
int32_t hb_scorer_need(float score, float t1, float t2);

#endif
