/* A rule at work: which copy an expert gets, by what its pairs need and what is cached. The engine and the simulator
 * ask here. */
#ifndef HB_RULE_H
#define HB_RULE_H

#include <stdbool.h>
#include <stdint.h>

#include "cache.h"

/* hobbit_rule; the thresholds are the owner's. */
struct hb_rule {
    bool active; /* else everything is high, and there are no thresholds */
    bool deterministic, renormalise, per_token, reversed;
    int32_t patience, experts;
    float substitute;
    float *t1, *t2; /* one a group */
};

/* What is asked for. */
struct hb_wanted {
    struct hb_key high; /* the expert, in high precision */
    int32_t need;       /* HOBBIT_HIGH, LOW or SKIP */
    bool elsewhere;     /* its high copy is at hand though it is not cached: on a device */
    bool low_elsewhere; /* and its low one */
    bool has_low;       /* the model has a low copy of it */
    uint16_t *in_vain;  /* how often its high copy was needed since it was read last */
};

/* The precision it gets: hb_model_choose has the table. With patience it counts in `*in_vain`. */
int32_t hb_rule_choose(const struct hb_rule *rule, const struct hb_cache *cache, const struct hb_wanted *wanted);
/* What hb_rule_choose would say of what is read then, without any consequence. `low_kept`: all low copies are. */
int32_t hb_rule_expect(const struct hb_rule *rule, const struct hb_cache *cache, const struct hb_wanted *wanted,
                       bool low_kept);

#endif
