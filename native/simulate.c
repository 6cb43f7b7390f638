#include "simulate.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NEVER UINT64_MAX

static bool event_fits(const struct hobbit_routing *t, const struct hobbit_simulation *in, int64_t i) {
    int64_t rows = t->n_rows[i], used = t->n_used[i], at = t->pair_at[i];
    if (t->kind[i] != HOBBIT_EVENT_LAYER && t->kind[i] != HOBBIT_EVENT_PREDICTED) {
        return true;
    }
    if (t->group[i] < 0 || t->group[i] >= in->n_groups || rows < 0 || used < 0 || at < 0 ||
        (t->kind[i] == HOBBIT_EVENT_PREDICTED && rows != 1) || rows * used > t->n_pairs - at) {
        return false;
    }
    for (int64_t pair = at; pair < at + rows * used; pair++) {
        if (t->experts[pair] < 0 || t->experts[pair] >= in->n_expert[t->group[i]]) {
            return false;
        }
    }
    return true;
}

static bool pool_fits(const struct hobbit_pool *pool) {
    return pool->n_slots[HOBBIT_HIGH] > 0 && pool->n_slots[HOBBIT_LOW] >= 0 &&
           pool->bytes >= pool->slot_bytes[HOBBIT_HIGH];
}

/* NULL, or what is wrong. */
static const char *check(const struct hobbit_routing *trace, const struct hobbit_simulation *in) {
    bool good = in->n_groups > 0 && in->n_pools > 0;
    for (int32_t i = 0; good && i < in->n_pools; i++) {
        good = pool_fits(&in->pools[i]);
    }
    for (int32_t g = 0; good && g < in->n_groups; g++) {
        good = in->n_expert[g] > 0 && in->pool_of_group[g] >= 0 && in->pool_of_group[g] < in->n_pools;
    }
    if (!good) {
        return "the simulated cache has a size that makes no sense";
    }
    if (!hb_policy_makes_sense(&in->policy)) {
        return "the cache policy has a number that makes no sense";
    }
    if (!(in->disk_bytes_s >= 0) || !(in->compute_s >= 0)) {
        return "a time or a speed makes no sense";
    }
    for (int64_t i = 0; i < trace->n_events; i++) {
        if (!event_fits(trace, in, i)) {
            return "the trace has an event that makes no sense";
        }
    }
    return NULL;
}

/* Of each pair, the next event after its own in which the group's expert is used. NULL: memory is short. */
static uint64_t *find_next_uses(const struct hobbit_routing *t, const int32_t *first_expert, int32_t n_experts) {
    uint64_t *next = calloc((size_t) t->n_pairs + 1, sizeof *next);
    uint64_t *at = malloc((size_t) n_experts * sizeof *at);
    if (next == NULL || at == NULL) {
        free(next);
        free(at);
        return NULL;
    }
    for (int32_t e = 0; e < n_experts; e++) {
        at[e] = NEVER;
    }
    for (int64_t i = t->n_events - 1; i >= 0; i--) {
        if (t->kind[i] != HOBBIT_EVENT_LAYER) {
            continue;
        }
        int64_t begin = t->pair_at[i], end = begin + (int64_t) t->n_rows[i] * t->n_used[i];
        for (int64_t pair = begin; pair < end; pair++) {
            next[pair] = at[first_expert[t->group[i]] + t->experts[pair]];
        }
        for (int64_t pair = begin; pair < end; pair++) {
            at[first_expert[t->group[i]] + t->experts[pair]] = (uint64_t) i;
        }
    }
    free(at);
    return next;
}

static void nothing_to_empty(void *context, int32_t pool, int32_t precision, int32_t slot) {
    (void) context;
    (void) pool;
    (void) precision;
    (void) slot;
}

static struct hb_rule rule_of(const struct hobbit_rule *rule) {
    return (struct hb_rule) {
        .active = rule->t1 != NULL && rule->t2 != NULL,
        .deterministic = rule->deterministic != 0,
        .per_token = rule->per_token != 0 && rule->deterministic != 0,
        .reversed = rule->reversed != 0,
        .patience = rule->patience,
        .experts = rule->experts,
        .t1 = (float *) (uintptr_t) rule->t1,
        .t2 = (float *) (uintptr_t) rule->t2,
    };
}

/* False when memory is short. */
static bool set_up(struct hb_simulator *sim) {
    const struct hobbit_simulation *in = sim->in;
    int32_t n_experts = 0;
    sim->rule = rule_of(&in->rule);
    sim->first_expert = calloc((size_t) in->n_groups, sizeof *sim->first_expert);
    for (int32_t g = 0; sim->first_expert != NULL && g < in->n_groups; g++) {
        sim->first_expert[g] = n_experts;
        n_experts += in->n_expert[g];
    }
    sim->in_vain = calloc((size_t) n_experts + 1, sizeof *sim->in_vain);
    sim->unused = calloc(HOBBIT_PRECISIONS * ((size_t) n_experts + 1), sizeof *sim->unused);
    sim->cache = hb_cache_new(in->n_pools, in->pools, in->n_groups, in->n_expert, in->pool_of_group,
                              nothing_to_empty, NULL);
    bool good = sim->first_expert != NULL && sim->in_vain != NULL && sim->unused != NULL && sim->cache != NULL &&
                hb_cache_set_policy(sim->cache, &in->policy);
    if (good && in->policy.kind == HOBBIT_POLICY_FARTHEST) {
        sim->next_use = find_next_uses(sim->trace, sim->first_expert, n_experts);
        good = sim->next_use != NULL;
    }
    return good;
}

static void tear_down(struct hb_simulator *sim) {
    hb_cache_free(sim->cache);
    hb_block_free(&sim->routing.memory);
    hb_block_free(&sim->memory);
    free(sim->first_expert);
    free(sim->in_vain);
    free(sim->unused);
    free(sim->next_use);
}

static void forget(struct hb_simulator *sim) {
    int32_t n_experts = 0;
    for (int32_t g = 0; g < sim->in->n_groups; g++) {
        n_experts += sim->in->n_expert[g];
    }
    hb_simulated_give_up(sim, -1);
    hb_cache_forget(sim->cache);
    memset(sim->in_vain, 0, (size_t) n_experts * sizeof *sim->in_vain);
}

/* NULL, or what went wrong. Predictions come while their layer is being computed; whatever else, after it. */
static const char *take_event(struct hb_simulator *sim, int64_t event) {
    const char *problem = NULL;
    int32_t kind = sim->trace->kind[event];
    if (kind == HOBBIT_EVENT_PREDICTED) {
        if (sim->in->predicted) {
            hb_simulated_expect(sim, event);
        }
    } else if (!hb_simulated_layer_end(sim)) {
        problem = "the simulated cache is too small for what a layer needs at once";
    } else if (kind == HOBBIT_EVENT_LAYER) {
        (void) hb_simulated_layer(sim, event, &problem);
    } else if (kind == HOBBIT_EVENT_SEQUENCE) {
        hb_cache_reset(sim->cache, 0);
    } else if (kind == HOBBIT_EVENT_FORGET) {
        forget(sim);
    }
    return problem;
}

static const char *replay(struct hb_simulator *sim) {
    const char *problem = NULL;
    for (int64_t i = 0; problem == NULL && i < sim->trace->n_events; i++) {
        problem = take_event(sim, i);
    }
    if (problem == NULL && !hb_simulated_layer_end(sim)) {
        problem = "the simulated cache is too small for what a layer needs at once";
    }
    return problem;
}

static void clear(struct hobbit_simulated *out, size_t n) {
    memset(out->hits, 0, n * sizeof *out->hits);
    memset(out->misses, 0, n * sizeof *out->misses);
    memset(out->evictions, 0, n * sizeof *out->evictions);
    memset(out->read_bytes, 0, n * sizeof *out->read_bytes);
    memset(out->read_low_bytes, 0, n * sizeof *out->read_low_bytes);
    memset(out->seconds, 0, n * sizeof *out->seconds);
    memset(out->pairs, 0, sizeof out->pairs);
    out->promotions = out->stand_ins = out->ahead = out->ahead_used = out->ahead_wasted_bytes = out->crowded = 0;
}

int32_t hobbit_simulate(const struct hobbit_routing *trace, const struct hobbit_simulation *in,
                        struct hobbit_simulated *out, char *err, size_t err_len) {
    const char *problem = check(trace, in);
    if (problem != NULL) {
        snprintf(err, err_len, "%s", problem);
        return HOBBIT_ARG;
    }
    clear(out, (size_t) trace->n_events);
    struct hb_simulator *sim = calloc(1, sizeof *sim);
    int32_t status = HOBBIT_NOMEM;
    problem = "out of memory";
    if (sim != NULL) {
        *sim = (struct hb_simulator) {.trace = trace, .in = in, .out = out};
        if (set_up(sim)) {
            problem = replay(sim);
            status = problem == NULL ? HOBBIT_OK : HOBBIT_ARG;
        }
        tear_down(sim);
    }
    free(sim);
    if (problem != NULL) {
        snprintf(err, err_len, "%s", problem);
    }
    return status;
}
