/* Description: for every policy and random use, who is evicted is who a search through all copies finds, by policy.h's
 * formulas, worked out from the list of all uses. */
#include "policy.h"

#include <math.h>

#include "cache.h"
#include "check.h"

enum { GROUPS = 3, EXPERTS = 7, COPIES = GROUPS * EXPERTS * HOBBIT_PRECISIONS, MOST_USES = 20000, STEPS = 1500 };

static const struct hobbit_policy policies[] = {
    {.kind = HOBBIT_POLICY_LRU},
    {.kind = HOBBIT_POLICY_LFU},
    {.kind = HOBBIT_POLICY_LFRU},
    {.kind = HOBBIT_POLICY_LCU, .low_cost = 0.3f},
    {.kind = HOBBIT_POLICY_HOBBIT, .w_lru = 0.05f, .w_lfu = 0.7f, .w_lhu = 0.2f, .w_fld = 0.05f},
    {.kind = HOBBIT_POLICY_DECAY, .w_fld = 0.2f, .half_life = 16},
    {.kind = HOBBIT_POLICY_FARTHEST},
};

/* Everything that happened, in no clever form. */
static struct {
    const struct hobbit_policy *policy;
    double token; /* T */
    double seen[GROUPS]; /* T when the layer was computed last */
    int32_t group;
    uint64_t passes[GROUPS], clock;
    struct use {
        int32_t group, expert, precision, pairs;
        double token;
        uint64_t pass;
    } uses[MOST_USES];
    int n_uses;
    uint64_t next_use[GROUPS][EXPERTS];
    struct copy {
        struct hb_key key;
        bool cached;
        int pins;
        uint64_t stamp;
    } copies[COPIES];
} m;

static struct hb_cache *cache;

static void emptied(void *context, int32_t pool, int32_t precision, int32_t slot) {
    CHECK(context == NULL && pool == 0 && precision >= 0 && slot >= 0);
}

static uint64_t bytes_of(int32_t precision) {
    return precision == HOBBIT_HIGH ? 10 : 3;
}

/* What the formulas speak of, of one expert. */
struct history {
    double uses[HOBBIT_PRECISIONS], heat, last;
    bool in_latest_pass;
};

static struct history history_of(struct hb_key key) {
    struct history h = {0};
    uint64_t pass = 0;
    for (int i = 0; i < m.n_uses; i++) {
        const struct use *u = &m.uses[i];
        if (u->group == key.group && u->expert == key.expert) {
            h.uses[u->precision] += u->pairs;
            h.heat += u->pairs * exp2((u->token - m.token) / (double) m.policy->half_life);
            h.last = u->token;
            pass = u->pass;
        }
    }
    h.in_latest_pass = pass > 0 && pass == m.passes[key.group];
    return h;
}

static double score(struct hb_key key) {
    const struct hobbit_policy *p = m.policy;
    struct history h = history_of(key);
    double t = m.token > 0 ? m.token : 1, f = h.uses[HOBBIT_HIGH] + h.uses[HOBBIT_LOW];
    double d = (key.group - m.group + GROUPS) % GROUPS;
    switch (p->kind) {
    case HOBBIT_POLICY_LFU: return f;
    case HOBBIT_POLICY_LFRU: return f / (t - h.last + 1);
    case HOBBIT_POLICY_LCU:
        return (h.uses[HOBBIT_HIGH] + (double) p->low_cost * h.uses[HOBBIT_LOW]) / t +
               (h.in_latest_pass ? 1 / (d + 0.1) : 0);
    case HOBBIT_POLICY_HOBBIT:
        return ((double) p->w_lru * h.last + (double) p->w_lfu * f + (double) p->w_lhu * h.uses[HOBBIT_HIGH]) / t +
               (double) p->w_fld * (1 - d / GROUPS);
    case HOBBIT_POLICY_DECAY:
        return log2(h.heat) + (m.token - m.seen[key.group]) / (double) p->half_life +
               (double) p->w_fld * (1 - d / GROUPS);
    case HOBBIT_POLICY_FARTHEST: return -(double) m.next_use[key.group][key.expert];
    default: return 0;
    }
}

/* Sums in another order may differ in their last digits. */
static bool is_close(double a, double b) {
    return a == b || fabs(a - b) <= 1e-9 * (1 + fabs(a));
}

/* Of the copies that may go. `scores` has all of theirs. */
static struct copy *first_to_go(const double *scores, const bool *gone) {
    struct copy *best = NULL;
    double least = 0;
    for (int i = 0; i < COPIES; i++) {
        struct copy *c = &m.copies[i];
        if (!c->cached || c->pins > 0 || gone[i]) {
            continue;
        }
        bool equal = best != NULL && is_close(scores[i], least);
        if (best == NULL || (equal ? c->stamp < best->stamp : scores[i] < least)) {
            best = c;
            least = scores[i];
        }
    }
    return best;
}

/* It is not cached any more; of a near tie the one that went, which is returned. */
static const struct copy *check_gone(const struct copy *expected, const double *scores, bool *gone) {
    bool exact = m.policy->kind == HOBBIT_POLICY_LRU || m.policy->kind == HOBBIT_POLICY_LFU ||
                 m.policy->kind == HOBBIT_POLICY_FARTHEST;
    int at = (int) (expected - m.copies);
    for (int i = 0; !exact && hb_cache_slot(cache, m.copies[at].key) >= 0 && i < COPIES; i++) {
        const struct copy *c = &m.copies[i];
        if (c->cached && c->pins == 0 && !gone[i] && is_close(scores[i], scores[expected - m.copies]) &&
            hb_cache_slot(cache, c->key) < 0) {
            at = i;
        }
    }
    CHECK(hb_cache_slot(cache, m.copies[at].key) < 0);
    gone[at] = true;
    return &m.copies[at];
}

static void claim(struct copy *wanted, uint64_t limit) {
    double scores[COPIES] = {0};
    bool gone[COPIES] = {false};
    uint64_t used = 0, evictable = 0, evictions = hb_cache_evictions(cache), expected = 0;
    for (int i = 0; i < COPIES; i++) {
        struct copy *c = &m.copies[i];
        uint64_t bytes = c->cached ? bytes_of(c->key.precision) : 0;
        used += bytes;
        evictable += c->pins == 0 ? bytes : 0;
        scores[i] = score(c->key);
    }
    bool fits = used + bytes_of(wanted->key.precision) <= limit + evictable;
    CHECK_EQUAL(hb_cache_claim(cache, wanted->key) >= 0, fits);
    while (fits && used + bytes_of(wanted->key.precision) > limit) {
        struct copy *victim = first_to_go(scores, gone);
        CHECK(victim != NULL);
        used -= bytes_of(check_gone(victim, scores, gone)->key.precision);
        expected++;
    }
    CHECK_EQUAL(hb_cache_evictions(cache) - evictions, expected);
    for (int i = 0; i < COPIES; i++) {
        m.copies[i].cached = m.copies[i].cached && !gone[i];
    }
    if (fits) {
        wanted->cached = true;
        wanted->pins = 1;
        wanted->stamp = ++m.clock;
        hb_cache_loaded(cache, wanted->key);
    }
}

static void use(struct copy *c, int32_t pairs) {
    CHECK(m.n_uses < MOST_USES);
    m.uses[m.n_uses++] = (struct use) {c->key.group, c->key.expert, c->key.precision, pairs, m.token,
                                       m.passes[c->key.group]};
    m.clock++;
    if (c->cached) {
        c->stamp = m.clock;
    }
    CHECK_EQUAL(hb_cache_find(cache, c->key, pairs) >= 0, c->cached);
}

/* Used next at that time, if the policy knows; it is pinned or not cached. */
static void foretell(struct hb_key key, uint64_t *seed) {
    m.next_use[key.group][key.expert] = check_random(seed, 1 << 20);
    hb_cache_set_next_use(cache, key, m.next_use[key.group][key.expert]);
}

static void pin(struct copy *c, bool pinned) {
    c->pins += pinned ? 1 : -1;
    hb_cache_pin(cache, c->key, pinned);
}

/* A layer is computed: a few experts are looked up and pinned, the missing ones claimed, and all let go, but some. */
static void layer(int32_t group, bool both, uint64_t limit, uint64_t *seed) {
    int32_t n_tokens = 1 + (int32_t) check_random(seed, 2);
    m.token += group < m.group || m.token == 0 ? n_tokens : 0;
    m.group = group;
    m.seen[group] = m.token;
    m.passes[group]++;
    hb_cache_begin(cache, group, n_tokens);
    struct copy *chosen[2];
    for (int i = 0; i < 2; i++) {
        int32_t expert = 2 * (int32_t) check_random(seed, EXPERTS / 2) + i; /* two that differ */
        int32_t precision = both ? (int32_t) check_random(seed, HOBBIT_PRECISIONS) : HOBBIT_HIGH;
        chosen[i] = &m.copies[(group * EXPERTS + expert) * HOBBIT_PRECISIONS + precision];
        struct copy *twin = chosen[i] + (precision == HOBBIT_HIGH ? 1 : -1);
        use(chosen[i], 1 + (int32_t) check_random(seed, 3));
        if (chosen[i]->cached) {
            pin(chosen[i], true);
        }
        if (m.policy->kind == HOBBIT_POLICY_FARTHEST && (!twin->cached || twin->pins > 0)) {
            foretell(chosen[i]->key, seed);
        }
    }
    for (int i = 0; i < 2; i++) {
        if (!chosen[i]->cached) {
            claim(chosen[i], limit);
        }
    }
    for (int i = 0; i < 2; i++) {
        if (chosen[i]->pins > 0 && check_random(seed, 8) > 0) { /* else it is let go later */
            pin(chosen[i], false);
        }
    }
}

static void new_sequence(void) {
    bool ages = m.policy->kind == HOBBIT_POLICY_DECAY;
    hb_cache_reset(cache, 0);
    m.token = ages ? m.token + 4 * (double) m.policy->half_life : 0;
    m.n_uses = ages ? m.n_uses : 0;
}

static void something_else(uint64_t *seed) {
    struct copy *c = &m.copies[check_random(seed, COPIES)];
    switch (check_random(seed, 12)) {
    case 0: new_sequence(); break;
    case 1:
        if (c->cached) {
            hb_cache_drop(cache, c->key);
            c->cached = false;
            c->pins = 0;
        }
        break;
    case 2:
        if (c->cached && c->pins < 2) {
            pin(c, true);
        }
        break;
    default:
        for (int i = 0; i < COPIES; i++) {
            while (m.copies[i].cached && m.copies[i].pins > 0) {
                pin(&m.copies[i], false);
            }
        }
    }
}

static void start(const struct hobbit_policy *policy, const struct hobbit_pool *pool) {
    memset(&m, 0, sizeof m);
    m.policy = policy;
    for (int32_t i = 0; i < COPIES; i++) {
        m.copies[i].key = (struct hb_key) {i / HOBBIT_PRECISIONS / EXPERTS, i / HOBBIT_PRECISIONS % EXPERTS,
                                           i % HOBBIT_PRECISIONS};
    }
    cache = hb_cache_new(1, pool, GROUPS, (int32_t[GROUPS]) {EXPERTS, EXPERTS, EXPERTS}, (int32_t[GROUPS]) {0},
                         emptied, NULL);
    CHECK(cache != NULL && hb_cache_set_policy(cache, policy));
}

static void the_victim_is_the_minimum(void) {
    for (size_t p = 0; p < sizeof policies / sizeof *policies; p++) {
        for (int both = 0; both < 2; both++) {
            const struct hobbit_pool pool = {.bytes = 90, .slot_bytes = {10, 3}, .n_slots = {9, both ? 21 : 0}};
            start(&policies[p], &pool);
            uint64_t seed = 17 + p;
            for (int step = 0; step < STEPS; step++) {
                layer(step % GROUPS, both, pool.bytes, &seed);
                if (check_random(&seed, 6) == 0) {
                    something_else(&seed);
                }
                CHECK(hb_cache_is_valid(cache));
            }
            CHECK(hb_cache_evictions(cache) > 200);
            hb_cache_free(cache);
        }
    }
}

/* A policy without a half-life is in force before another is set. */
static void heat_is_a_number_under_every_policy(void) {
    const struct hobbit_policy lru = {.kind = HOBBIT_POLICY_LRU};
    struct hb_moment now = {.token = 1, .n_groups = 1};
    struct hb_usage usage = {0};
    for (uint64_t pass = 1; pass <= 2; pass++) { /* twice for one token */
        hb_policy_use(&lru, &usage, HOBBIT_HIGH, 3, pass, &now);
    }
    CHECK(usage.heat == 6 && hb_policy_left(&lru, 0) == 1);
    now.token = 2;
    hb_policy_use(&lru, &usage, HOBBIT_HIGH, 3, 3, &now);
    CHECK(usage.heat == 3);
}

static void settings_are_checked(void) {
    struct hobbit_policy decay = {.kind = HOBBIT_POLICY_DECAY, .half_life = 1};
    CHECK(hb_policy_makes_sense(&decay));
    decay.half_life = 0.5f;
    CHECK(!hb_policy_makes_sense(&decay));
    CHECK(!hb_policy_makes_sense(&(struct hobbit_policy) {.kind = HOBBIT_POLICY_FARTHEST + 1}));
    CHECK(!hb_policy_makes_sense(&(struct hobbit_policy) {.kind = -1}));
    CHECK(!hb_policy_makes_sense(&(struct hobbit_policy) {.w_lfu = -1}));
    CHECK(!hb_policy_makes_sense(&(struct hobbit_policy) {.w_fld = NAN}));
    CHECK(hb_policy_makes_sense(&(struct hobbit_policy) {.kind = HOBBIT_POLICY_FARTHEST}));
}

int main(void) {
    RUN(the_victim_is_the_minimum);
    RUN(heat_is_a_number_under_every_policy);
    RUN(settings_are_checked);
    return 0;
}
