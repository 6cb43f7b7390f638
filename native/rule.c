#include "rule.h"

static bool is_patient(const struct hb_rule *rule, const struct hb_wanted *wanted) {
    return rule->patience > 1 && wanted->has_low;
}

static bool has_low_cached(const struct hb_cache *cache, const struct hb_wanted *wanted) {
    struct hb_key low = {wanted->high.group, wanted->high.expert, HOBBIT_LOW};
    return wanted->low_elsewhere || hb_cache_peek(cache, low) >= 0;
}

/* With patience: whether the low copy has to do this time too. */
static bool stands_in(const struct hb_rule *rule, uint16_t *in_vain) {
    bool low = *in_vain + 1 < rule->patience;
    *in_vain = low ? *in_vain + 1 : 0;
    return low;
}

int32_t hb_rule_choose(const struct hb_rule *rule, const struct hb_cache *cache, const struct hb_wanted *wanted) {
    if (rule->deterministic || (wanted->need == HOBBIT_HIGH && !is_patient(rule, wanted))) {
        return wanted->need;
    }
    if (wanted->elsewhere || hb_cache_peek(cache, wanted->high) >= 0) {
        return HOBBIT_HIGH;
    }
    if (wanted->need == HOBBIT_HIGH) {
        return stands_in(rule, wanted->in_vain) ? HOBBIT_LOW : HOBBIT_HIGH;
    }
    return has_low_cached(cache, wanted) ? HOBBIT_LOW : wanted->need;
}

int32_t hb_rule_expect(const struct hb_rule *rule, const struct hb_cache *cache, const struct hb_wanted *wanted,
                       bool low_kept) {
    if (rule->deterministic || wanted->need == HOBBIT_SKIP) {
        return wanted->need;
    }
    if (wanted->elsewhere || hb_cache_peek(cache, wanted->high) >= 0) {
        return HOBBIT_HIGH;
    }
    bool low = is_patient(rule, wanted) && *wanted->in_vain + 1 < rule->patience;
    return wanted->need == HOBBIT_LOW || low_kept || low ? HOBBIT_LOW : HOBBIT_HIGH;
}
