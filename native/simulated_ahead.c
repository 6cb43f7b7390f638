/* What the trace's predictions do to the cache: see ahead.c. */
#include "scorer.h"
#include "simulate.h"

/* Of a pool's slots at most this share is protected or being read ahead, as in the engine. */
#define SHARE 4

struct hb_simulated_ahead *hb_simulated_reading(struct hb_simulator *sim, struct hb_key key) {
    for (int32_t i = 0; i < sim->n_expected; i++) {
        struct hb_simulated_ahead *a = &sim->expected[i];
        if (a->reading && a->key.group == key.group && a->key.expert == key.expert &&
            a->key.precision == key.precision) {
            return a;
        }
    }
    return NULL;
}

void hb_simulated_count_unused(struct hb_simulator *sim, struct hb_key key) {
    sim->out->ahead_wasted_bytes += *hb_simulated_unused(sim, key) ? hb_simulated_bytes(sim, key) : 0;
    *hb_simulated_unused(sim, key) = 0;
}

static bool is_expected(const struct hb_simulator *sim, struct hb_key key) {
    for (int32_t i = 0; i < sim->n_expected; i++) {
        const struct hb_key *other = &sim->expected[i].key;
        if (other->group == key.group && other->expert == key.expert && other->precision == key.precision) {
            return true;
        }
    }
    return false;
}

/* False when nothing more is to be expected. */
static bool expect(struct hb_simulator *sim, struct hb_key key, bool read) {
    int32_t most = sim->in->pools[sim->in->pool_of_group[key.group]].n_slots[key.precision] / SHARE;
    if (sim->n_expected == HB_SIMULATED_AHEAD || sim->n_expected >= most) {
        return false;
    }
    struct hb_simulated_ahead *a = &sim->expected[sim->n_expected];
    *a = (struct hb_simulated_ahead) {.key = key};
    if (hb_cache_peek(sim->cache, key) >= 0) {
        hb_cache_pin(sim->cache, key, true);
        a->pinned = true;
    } else if (hb_cache_slot(sim->cache, key) < 0) {
        if (!read) {
            return true;
        }
        if (hb_cache_claim(sim->cache, key) < 0) {
            return false;
        }
        a->reading = true;
        a->left = (double) hb_simulated_bytes(sim, key);
        hb_simulated_count_unused(sim, key);
        *hb_simulated_unused(sim, key) = 1;
        sim->out->ahead++;
    }
    sim->n_expected++;
    return true;
}

/* The precision that each of them would get, by their probabilities. */
static int32_t precision_of(const struct hb_simulator *sim, int32_t group, int32_t expert, const float *score) {
    if (!sim->rule.active) {
        return HOBBIT_HIGH;
    }
    float t1 = sim->rule.t1[group], t2 = sim->rule.t2[group];
    int32_t need = score != NULL ? hb_scorer_need(*score, t1, t2) : HOBBIT_HIGH;
    struct hb_wanted wanted = hb_simulated_wanted(sim, group, expert, need);
    return hb_rule_expect(&sim->rule, sim->cache, &wanted, false);
}

void hb_simulated_expect(struct hb_simulator *sim, int64_t event) {
    int32_t n = sim->trace->n_used[event], group = sim->trace->group[event];
    const int32_t *experts = sim->trace->experts + sim->trace->pair_at[event];
    const float *odds = sim->trace->weights + sim->trace->pair_at[event];
    float scores[HB_SCORER_EXPERTS];
    bool scored = n <= HB_SCORER_EXPERTS;
    if (scored) {
        hb_scorer_scores(odds, n, scores);
    }
    for (int32_t i = 0; i < n; i++) {
        struct hb_key key = {group, experts[i], precision_of(sim, group, experts[i], scored ? &scores[i] : NULL)};
        bool read = (double) odds[i] >= sim->in->least_odds;
        if (key.precision != HOBBIT_SKIP && !is_expected(sim, key) && !expect(sim, key, read)) {
            return;
        }
    }
}

void hb_simulated_unprotect(struct hb_simulator *sim, int32_t group) {
    for (int32_t i = 0; i < sim->n_expected; i++) {
        struct hb_simulated_ahead *a = &sim->expected[i];
        if (a->pinned && (group < 0 || a->key.group == group)) {
            if (hb_cache_peek(sim->cache, a->key) >= 0) { /* else its high copy has come, and took its place */
                hb_cache_pin(sim->cache, a->key, false);
            }
            a->pinned = false;
        }
    }
}

void hb_simulated_give_up(struct hb_simulator *sim, int32_t group) {
    int32_t kept = 0;
    hb_simulated_unprotect(sim, group);
    for (int32_t i = 0; i < sim->n_expected; i++) {
        struct hb_simulated_ahead a = sim->expected[i];
        if (group >= 0 && a.key.group != group) {
            sim->expected[kept++] = a;
        } else if (a.reading) {
            uint64_t done = hb_simulated_bytes(sim, a.key) - (uint64_t) a.left;
            hb_simulated_count_read(sim, a.key.precision, done);
            sim->out->ahead_wasted_bytes += done;
            *hb_simulated_unused(sim, a.key) = 0;
            hb_cache_drop(sim->cache, a.key);
        }
    }
    sim->n_expected = kept;
}

static void take_in(struct hb_simulator *sim, struct hb_simulated_ahead *a) {
    a->reading = false;
    hb_simulated_count_read(sim, a->key.precision, hb_simulated_bytes(sim, a->key));
    hb_cache_loaded(sim->cache, a->key);
    hb_cache_pin(sim->cache, a->key, false);
}

void hb_simulated_read_ahead(struct hb_simulator *sim, double bytes) {
    for (int32_t i = 0; i < sim->n_expected && bytes > 0; i++) {
        struct hb_simulated_ahead *a = &sim->expected[i];
        if (!a->reading) {
            continue;
        }
        double part = a->left < bytes ? a->left : bytes;
        a->left -= part;
        bytes -= part;
        if (a->left <= 0) {
            take_in(sim, a);
        }
    }
}

bool hb_simulated_await_ahead(struct hb_simulator *sim) {
    for (int32_t i = 0; i < sim->n_expected; i++) {
        if (sim->expected[i].reading) {
            sim->demand += sim->expected[i].left;
            take_in(sim, &sim->expected[i]);
            return true;
        }
    }
    return false;
}
