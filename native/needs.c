#include "needs.h"

#include "scorer.h"

/* How many of the token's pairs matter more. */
static int32_t rank(const float *scores, int32_t n_used, int32_t n) {
    int32_t before = 0;
    for (int32_t i = 0; i < n_used; i++) {
        before += scores[i] < scores[n] || (scores[i] == scores[n] && i < n);
    }
    return before;
}

/* The sum of the token's smaller gate weights, of 1: what is left of it above the next score. */
static float reversed(const float *scores, int32_t n_used, int32_t n) {
    float next = 1;
    for (int32_t i = 0; i < n_used; i++) {
        next = scores[i] > scores[n] && scores[i] < next ? scores[i] : next;
    }
    return 1 - next;
}

bool hb_needs_alike(const struct hb_rule *rule, int32_t group) {
    float t1 = rule->t1[group], t2 = rule->t2[group];
    return rule->experts == 0 && (t1 >= 1 || (t1 < 0 && t2 >= 1));
}

void hb_needs_all(const struct hb_rule *rule, int32_t group, struct hb_routing *r) {
    for (int32_t e = 0; e < r->n_experts; e++) {
        r->experts[e].precision = hb_scorer_need(0, rule->t1[group], rule->t2[group]);
    }
}

void hb_needs_set(const struct hb_rule *rule, int32_t group, struct hb_routing *r, const float *scores,
                  uint8_t *needs) {
    for (int64_t i = 0; i < r->n_pairs; i++) {
        int32_t n = (int32_t) (i % r->n_used);
        bool used = rule->experts == 0 || rank(scores + i - n, r->n_used, n) < rule->experts;
        float score = rule->reversed ? reversed(scores + i - n, r->n_used, n) : scores[i];
        needs[i] = used ? (uint8_t) hb_scorer_need(score, rule->t1[group], rule->t2[group]) : HOBBIT_SKIP;
    }
    if (rule->per_token) {
        hb_routing_divide(r, needs);
    } else {
        hb_routing_strongest(r, needs);
    }
}
