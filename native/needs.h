/* From a token's gate weights to what each of its experts needs, under a rule. */
#ifndef HB_NEEDS_H
#define HB_NEEDS_H

#include <stdbool.h>
#include <stdint.h>

#include "routing.h"
#include "rule.h"

/* Whether the rule asks nothing of the scores in that group: then hb_needs_all does. */
bool hb_needs_alike(const struct hb_rule *rule, int32_t group);
void hb_needs_all(const struct hb_rule *rule, int32_t group, struct hb_routing *routing);
/* Give each expert the strongest need of its pairs, or with per_token each pair its own. scores[token * n_used + n]
 * are of scorer.h; `needs` is work space for as many. */
void hb_needs_set(const struct hb_rule *rule, int32_t group, struct hb_routing *routing, const float *scores,
                  uint8_t *needs);

#endif
