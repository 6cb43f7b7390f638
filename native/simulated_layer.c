/* One layer of a simulation, step by step as moe.c computes it. */
#include <math.h>

#include "needs.h"
#include "scorer.h"
#include "simulate.h"

enum { MISSING, LOADING, READY, DONE }; /* of an expert within a layer */

static struct hb_key key_of(const struct hb_simulator *sim, const struct hb_routed *e) {
    return (struct hb_key) {sim->group, e->expert, e->precision};
}

static bool read_routing(struct hb_simulator *sim, int64_t event) {
    const struct hobbit_routing *t = sim->trace;
    int32_t n_used = t->n_used[event], n_rows = t->n_rows[event];
    const struct ggml_tensor ids = {
        .data = (void *) (uintptr_t) (t->experts + t->pair_at[event]),
        .ne = {n_used, n_rows, 1, 1},
        .nb = {sizeof *t->experts, sizeof *t->experts * (size_t) n_used},
    };
    return hb_routing_read(&sim->routing, &ids, sim->in->n_expert[sim->group]);
}

/* By the gate weights. False when memory is short. */
static bool set_needs(struct hb_simulator *sim, int64_t event) {
    struct hb_routing *r = &sim->routing;
    size_t n = (size_t) r->n_pairs;
    if (!hb_block_reserve(&sim->memory, hb_block_round(n * sizeof(float)) + hb_block_round(n))) {
        return false;
    }
    float *scores = hb_block_take(&sim->memory, n * sizeof *scores);
    const float *weights = sim->trace->weights + sim->trace->pair_at[event];
    for (int64_t t = 0; t < r->n_tokens; t++) {
        hb_scorer_scores(weights + t * r->n_used, r->n_used, scores + t * r->n_used);
    }
    hb_needs_set(&sim->rule, sim->group, r, scores, hb_block_take(&sim->memory, n));
    return true;
}

/* A precision for each expert. */
static bool choose(struct hb_simulator *sim, int64_t event, const char **problem) {
    struct hb_routing *r = &sim->routing;
    if (!sim->rule.active) {
        return true;
    }
    bool seen = sim->trace->has_weights[event] != 0 && r->n_used <= HB_SCORER_EXPERTS;
    if (!seen && !hb_needs_alike(&sim->rule, sim->group)) {
        *problem = "the trace has no gate weights, and without them every expert is needed in high precision";
        return false;
    }
    if (!seen) {
        hb_needs_all(&sim->rule, sim->group, r);
    } else if (!set_needs(sim, event)) {
        *problem = "out of memory";
        return false;
    }
    for (int32_t i = 0; i < r->n_experts; i++) {
        struct hb_routed *e = &r->experts[i];
        struct hb_wanted wanted = hb_simulated_wanted(sim, sim->group, e->expert, e->precision);
        e->precision = hb_rule_choose(&sim->rule, sim->cache, &wanted);
        sim->out->stand_ins += wanted.need == HOBBIT_HIGH && e->precision == HOBBIT_LOW;
    }
    return true;
}

static void count_hit(struct hb_simulator *sim, struct hb_key key) {
    sim->out->hits[sim->event]++;
    sim->out->ahead_used += *hb_simulated_unused(sim, key);
    *hb_simulated_unused(sim, key) = 0;
}

static void count_miss(struct hb_simulator *sim, struct hb_key key) {
    sim->out->misses[sim->event]++;
    if (key.precision == HOBBIT_HIGH &&
        hb_cache_peek(sim->cache, (struct hb_key) {key.group, key.expert, HOBBIT_LOW}) >= 0) {
        sim->out->promotions++;
    }
    if (hb_cache_slot(sim->cache, key) < 0) {
        hb_simulated_count_unused(sim, key);
    }
}

/* Belady's knowledge: any of the expert's pairs says when it is used next. */
static void set_next_use(struct hb_simulator *sim, const struct hb_routed *e) {
    if (sim->next_use != NULL) {
        int32_t pair = sim->routing.token[e->first] * sim->routing.n_used + sim->routing.n[e->first];
        hb_cache_set_next_use(sim->cache, key_of(sim, e), sim->next_use[sim->trace->pair_at[sim->event] + pair]);
    }
}

static void look_up(struct hb_simulator *sim) {
    for (int32_t i = 0; i < sim->routing.n_experts; i++) {
        struct hb_routed *e = &sim->routing.experts[i];
        struct hb_key key = key_of(sim, e);
        sim->out->pairs[e->precision] += (uint64_t) e->n_pairs;
        if (e->precision == HOBBIT_SKIP) {
            e->state = DONE;
            sim->done++;
            continue;
        }
        e->state = hb_cache_find(sim->cache, key, e->n_pairs) >= 0 ? READY : MISSING;
        if (e->state == READY) {
            hb_cache_pin(sim->cache, key, true);
            sim->ready++;
            count_hit(sim, key);
        } else {
            count_miss(sim, key);
        }
        set_next_use(sim, e);
    }
}

/* Whether the copy is on its way now. */
static bool start_read(struct hb_simulator *sim, struct hb_key key) {
    struct hb_simulated_ahead *ahead = hb_simulated_reading(sim, key);
    if (ahead != NULL) { /* wait for it after all */
        ahead->reading = false;
        sim->demand += ahead->left;
        sim->out->ahead_used++;
        *hb_simulated_unused(sim, key) = 0;
        return true;
    }
    if (hb_cache_claim(sim->cache, key) < 0) {
        return false;
    }
    sim->demand += (double) hb_simulated_bytes(sim, key);
    return true;
}

/* Start as many reads as there are slots to be had; what is in the way may be reads that nobody waits for. */
static void fetch(struct hb_simulator *sim) {
    struct hb_routing *r = &sim->routing;
    for (; sim->next_missing < r->n_experts; sim->next_missing++) {
        struct hb_routed *e = &r->experts[sim->next_missing];
        while (e->state == MISSING) {
            if (start_read(sim, key_of(sim, e))) {
                e->state = LOADING;
                sim->loading++;
            } else if (sim->loading > 0 || !hb_simulated_await_ahead(sim)) {
                return;
            }
        }
    }
}

static void arrive(struct hb_simulator *sim) {
    for (int32_t i = 0; i < sim->routing.n_experts; i++) {
        struct hb_routed *e = &sim->routing.experts[i];
        if (e->state != LOADING) {
            continue;
        }
        struct hb_key key = key_of(sim, e), low = {key.group, key.expert, HOBBIT_LOW};
        e->state = READY;
        hb_simulated_count_read(sim, key.precision, hb_simulated_bytes(sim, key));
        hb_cache_loaded(sim->cache, key);
        if (key.precision == HOBBIT_HIGH && !sim->rule.deterministic && hb_cache_peek(sim->cache, low) >= 0) {
            hb_cache_drop(sim->cache, low); /* promoted: see hb_model_choose */
        }
    }
    sim->ready += sim->loading;
    sim->loading = 0;
}

static void release(struct hb_simulator *sim) {
    for (int32_t i = 0; i < sim->routing.n_experts; i++) {
        struct hb_routed *e = &sim->routing.experts[i];
        if (e->state == READY) {
            hb_cache_pin(sim->cache, key_of(sim, e), false);
            e->state = DONE;
        }
    }
    sim->done += sim->ready;
    sim->ready = 0;
}

bool hb_simulated_layer(struct hb_simulator *sim, int64_t event, const char **problem) {
    int32_t before = sim->group;
    sim->group = sim->trace->group[event];
    sim->event = event;
    sim->next_missing = sim->loading = sim->ready = sim->done = 0;
    sim->demand = 0;
    sim->evictions = hb_cache_evictions(sim->cache);
    if (!read_routing(sim, event)) {
        *problem = "the trace has an expert that does not exist, or memory is short";
        return false;
    }
    if (!choose(sim, event, problem)) {
        return false;
    }
    if (sim->group < before || sim->in->n_groups == 1) {
        hb_simulated_give_up(sim, -1); /* of a pass that was broken off */
    }
    hb_simulated_unprotect(sim, sim->group);
    hb_cache_begin(sim->cache, sim->group, sim->trace->n_rows[event]);
    look_up(sim);
    fetch(sim);
    hb_simulated_give_up(sim, sim->group);
    sim->out->crowded += sim->next_missing < sim->routing.n_experts;
    sim->computing = true;
    return true;
}

static void take_time(struct hb_simulator *sim) {
    double compute = sim->in->compute_s * sim->trace->n_rows[sim->event], speed = sim->in->disk_bytes_s;
    double read = speed > 0 ? sim->demand / speed : 0, took = compute > read ? compute : read;
    sim->out->seconds[sim->event] = took;
    hb_simulated_read_ahead(sim, speed > 0 ? (took - read) * speed : INFINITY);
}

bool hb_simulated_layer_end(struct hb_simulator *sim) {
    if (!sim->computing) {
        return true;
    }
    sim->computing = false;
    while (sim->done < sim->routing.n_experts) {
        fetch(sim);
        if (sim->ready == 0) {
            arrive(sim);
        }
        if (sim->ready == 0) {
            return false;
        }
        release(sim);
    }
    take_time(sim);
    sim->out->evictions[sim->event] = (uint32_t) (hb_cache_evictions(sim->cache) - sim->evictions);
    return true;
}
