/* What routers will choose, from what they chose for past tokens: the search of maps.h, one token at a time, with the
 * odds of what it finds. What is observed of a layer is what its router chooses by: the softmax, or another positive
 * number of each expert, less the smallest where it is a sigmoid or has a bias of choice.
 *
 * Predicted are the experts whose probabilities in the best match sum to 1 - score, but at least as many as a token
 * uses, and at most twice that (fMoE, section 4.3). Their odds are counted by distance and by the margin
 *
 *   ln p_k - ln p_n    n the number of experts that a token uses
 *
 * which for a softmax is that of the logits. Numbers only; nothing is allocated after creation; not thread-safe. */
#ifndef HB_MAP_PREDICTOR_H
#define HB_MAP_PREDICTOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "maps.h"
#include "routers.h"

#define HB_MAP_DEPTH 4 /* layers ahead, at most */
#define HB_MAP_MOST 64 /* experts predicted of a layer, at most */

struct hb_map_predictor;

/* For groups with so many experts, with room for `capacity` maps. NULL: no memory, or a shape beyond any model. */
struct hb_map_predictor *hb_map_predictor_new(int32_t n_groups, const int32_t *n_experts, int32_t n_embd,
                                              int32_t capacity, int32_t depth);
/* 0: a shape that hb_map_predictor_new refuses. */
size_t hb_map_predictor_bytes(int32_t n_groups, const int32_t *n_experts, int32_t n_embd, int32_t capacity,
                              int32_t depth);
void hb_map_predictor_free(struct hb_map_predictor *predictor); /* NULL is fine */
struct hb_maps *hb_map_predictor_maps(struct hb_map_predictor *predictor); /* to save and load, between tokens */

/* A pass of a single token begins, or one of several, of which nothing is taken in. What the first group's router gets,
 * x [router->n_embd], is the token's hint, if that is n_embd; NULL: there is none. */
void hb_map_predictor_begin(struct hb_map_predictor *predictor, bool single, const struct hb_router *router,
                            const float *x);
/* Group `at` chose these experts: count what was predicted of it for this token. Returns how many of `*predicted`, the
 * experts predicted from the group before, were chosen. */
int32_t hb_map_predictor_count(struct hb_map_predictor *predictor, int32_t at, const int32_t *experts, int32_t n,
                               int32_t *predicted);
/* Group `at` has this router, which gets x [router->n_embd]. */
void hb_map_predictor_observe(struct hb_map_predictor *predictor, int32_t at, const struct hb_router *router,
                              const float *x);
/* The experts that group `to`, with this router, will probably choose, `ahead` groups after the one observed last: the
 * likeliest first, with the odds of each (0..1), at most HB_MAP_MOST; and p [n_expert]. Returns their number: 0 where
 * nothing is known. */
int32_t hb_map_predictor_predict(struct hb_map_predictor *predictor, int32_t to, int32_t ahead,
                                 const struct hb_router *router, int32_t *experts, float *odds, float *p);
/* The last group's router was observed: the token's map is stored. Nothing where no token was begun. */
void hb_map_predictor_end(struct hb_map_predictor *predictor);
bool hb_map_predictor_has_new(const struct hb_map_predictor *predictor); /* a map was stored since it was made */

#endif
