#include "policy.h"

#include <math.h>

/* LFRU orders by age among the experts with as many uses; more uses than this count as this many. */
#define MOST_USES 1023

/* MoE-APEX's delta: the expert of the layer being computed does not divide by zero. */
#define NEAREST 0.1

static double all_uses(const struct hb_usage *usage) {
    return usage->uses[HOBBIT_HIGH] + usage->uses[HOBBIT_LOW];
}

/* How many layers ahead the group's next chance is: 0 for the one being computed. */
static int32_t distance(const struct hb_moment *now, int32_t group) {
    return (group - now->group + now->n_groups) % now->n_groups;
}

bool hb_policy_makes_sense(const struct hobbit_policy *p) {
    const float numbers[] = {p->w_lru, p->w_lfu, p->w_lhu, p->w_fld, p->low_cost};
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        if (!(numbers[i] >= 0 && numbers[i] <= 1e6f)) {
            return false;
        }
    }
    return p->kind >= HOBBIT_POLICY_LRU && p->kind <= HOBBIT_POLICY_FARTHEST &&
           (p->kind != HOBBIT_POLICY_DECAY || (p->half_life >= 1 && p->half_life <= 1e6f));
}

int32_t hb_policy_classes(const struct hobbit_policy *p, int32_t n_groups) {
    switch (p->kind) {
    case HOBBIT_POLICY_LFRU: return MOST_USES + 1;
    case HOBBIT_POLICY_LCU: return 2 * n_groups;
    case HOBBIT_POLICY_HOBBIT:
    case HOBBIT_POLICY_DECAY: return n_groups;
    default: return 1;
    }
}

int32_t hb_policy_class(const struct hobbit_policy *p, const struct hb_usage *u, int32_t group, uint64_t passes) {
    double uses = all_uses(u);
    switch (p->kind) {
    case HOBBIT_POLICY_LFRU: return uses < MOST_USES ? (int32_t) uses : MOST_USES;
    case HOBBIT_POLICY_LCU: return 2 * group + (u->last_pass > 0 && u->last_pass == passes);
    case HOBBIT_POLICY_HOBBIT:
    case HOBBIT_POLICY_DECAY: return group;
    default: return 0;
    }
}

double hb_policy_key(const struct hobbit_policy *p, const struct hb_usage *u) {
    switch (p->kind) {
    case HOBBIT_POLICY_LFU: return all_uses(u);
    case HOBBIT_POLICY_LFRU: return (double) u->last_token;
    case HOBBIT_POLICY_LCU: return u->uses[HOBBIT_HIGH] + (double) p->low_cost * u->uses[HOBBIT_LOW];
    case HOBBIT_POLICY_HOBBIT:
        return (double) p->w_lru * (double) u->last_token + (double) p->w_lfu * all_uses(u) +
               (double) p->w_lhu * u->uses[HOBBIT_HIGH];
    case HOBBIT_POLICY_DECAY:
        return u->heat > 0 ? log2(u->heat) + (double) u->last_token / (double) p->half_life : -INFINITY;
    case HOBBIT_POLICY_FARTHEST: return -(double) u->next_use;
    default: return 0;
    }
}

double hb_policy_score(const struct hobbit_policy *p, int32_t class, double key, const struct hb_moment *now) {
    double t = now->token > 0 ? (double) now->token : 1;
    switch (p->kind) {
    case HOBBIT_POLICY_LFRU: return class / (t - key + 1);
    case HOBBIT_POLICY_LCU: return key / t + (class % 2 ? 1 / (distance(now, class / 2) + NEAREST) : 0);
    case HOBBIT_POLICY_HOBBIT:
        return key / t + (double) p->w_fld * (1 - (double) distance(now, class) / now->n_groups);
    case HOBBIT_POLICY_DECAY:
        return key - (double) now->seen[class] / (double) p->half_life +
               (double) p->w_fld * (1 - (double) distance(now, class) / now->n_groups);
    default: return key;
    }
}

/* Policies without a half-life keep the heat of the present token alone, so that DECAY can take over. */
double hb_policy_left(const struct hobbit_policy *p, uint64_t age) {
    return age > 0 ? exp2(-(double) age / (double) p->half_life) : 1;
}

void hb_policy_use(const struct hobbit_policy *p, struct hb_usage *u, int32_t precision, double pairs, uint64_t pass,
                   const struct hb_moment *now) {
    u->heat = u->heat * hb_policy_left(p, now->token - u->last_token) + pairs;
    u->uses[precision] += pairs;
    u->last_token = now->token;
    u->last_pass = pass;
}

bool hb_policy_moves_used(const struct hobbit_policy *p) {
    return p->kind == HOBBIT_POLICY_LCU;
}

/* An old sequence is better than nothing, and soon outweighed: its uses count a sixteenth. */
uint64_t hb_policy_age(const struct hobbit_policy *p) {
    return p->kind == HOBBIT_POLICY_DECAY ? 4 * (uint64_t) p->half_life : 0;
}
