/* Who is evicted: pure functions of what is known of an expert. No clock, lock, allocation or I/O here.
 *
 * The copy with the smallest score goes first. A score changes with time, for all copies at once; so that the smallest
 * is found without looking at all of them, it is split: copies of one class are ordered by a key that stays as it is
 * until the expert is used again, and the score of a class's first copy is worked out when somebody has to go.
 *
 * In the formulas T is the number of tokens of this sequence so far, i the layer being computed, l the copy's layer,
 * n the number of layers, and d = (l - i + n) mod n: how many layers ahead the copy's next chance is.
 *   LRU      0: of equals, also in other policies, the one that was used or claimed longest ago goes first
 *   LFU      F, the uses in this sequence
 *   LFRU     F / (age + 1), age in tokens
 *   LCU      C/T + 1/(d + 0.1) if the expert was used in the latest pass through its layer, else C/T; C = H + L times
 *            the ratio of the copies' bytes, H and L the uses in high and in low precision (MoE-APEX)
 *   HOBBIT   w_lru R/T + w_lfu F/T + w_lhu H/T + w_fld (1 - d/n), R the token of the latest use (HOBBIT, equation 3)
 *   DECAY    log2 of the sum over all uses of 2^(-age/half-life), plus w_fld (1 - d/n); age in tokens that the expert's
 *            own layer has seen since, so that those still to come in a prompt are not older than those just used
 *   FARTHEST when the next use is, which only a simulator knows (Belady); the latest goes first
 */
#ifndef HB_POLICY_H
#define HB_POLICY_H

#include <stdbool.h>
#include <stdint.h>

#include "hobbit.h"

/* Of one expert. */
struct hb_usage {
    uint64_t last_token;            /* T at the latest use */
    uint64_t last_pass;             /* passes through the layer then; 0: never */
    double uses[HOBBIT_PRECISIONS]; /* pairs computed, by precision */
    double heat;                    /* DECAY's sum as of last_token */
    uint64_t next_use;              /* FARTHEST's */
};

/* Of a layer being computed. */
struct hb_moment {
    uint64_t token; /* T */
    int32_t group, n_groups;
    const uint64_t *seen; /* one a group: T when it was computed last */
};

/* Its kind and numbers are such as the functions below take. */
bool hb_policy_makes_sense(const struct hobbit_policy *policy);
/* The number of classes that hb_policy_class gives. */
int32_t hb_policy_classes(const struct hobbit_policy *policy, int32_t n_groups);
/* `passes` is how often the expert's layer was computed. */
int32_t hb_policy_class(const struct hobbit_policy *policy, const struct hb_usage *usage, int32_t group,
                        uint64_t passes);
/* The place in its class. */
double hb_policy_key(const struct hobbit_policy *policy, const struct hb_usage *usage);
/* Of the first of a class. */
double hb_policy_score(const struct hobbit_policy *policy, int32_t class, double key, const struct hb_moment *now);
/* Take in that `pairs` (token, expert) pairs used the copy. */
void hb_policy_use(const struct hobbit_policy *policy, struct hb_usage *usage, int32_t precision, double pairs,
                   uint64_t pass, const struct hb_moment *now);
/* What is left of a heat after so many tokens: 1 after none, whatever the policy. */
double hb_policy_left(const struct hobbit_policy *policy, uint64_t age);
/* At the start of a sequence: by how many tokens the records of the last one age. 0: they are forgotten. */
uint64_t hb_policy_age(const struct hobbit_policy *policy);
/* HOBBIT_POLICY_LCU's classes change when a layer is computed: whether its used experts are to be ordered again. */
bool hb_policy_moves_used(const struct hobbit_policy *policy);

#endif
