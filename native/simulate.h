/* What a cache would have done: a routing trace is replayed against the engine's own cache, policies and rules, without
 * a model. Each layer goes through the steps of moe.c in the same order: a precision for each expert, the look-ups, the
 * claims for the missing ones, what is no longer expected given up, what is predicted protected or read ahead, and then
 * the arrivals. So the counts are those of the engine wherever they follow from that order. They do not where a layer
 * needs more experts than the cache has room for, because then arrivals decide who goes; nor with predictions, because
 * then the disk's speed does.
 *
 * Of time there is a model: a layer takes as long as its computation or the reads that it waits for, whichever is
 * longer, and reads ahead get what time the disk has left, in their order. */
#ifndef HB_SIMULATE_H
#define HB_SIMULATE_H

#include <stdbool.h>
#include <stdint.h>

#include "cache.h"
#include "hobbit.h"
#include "routing.h"
#include "rule.h"

#define HB_SIMULATED_AHEAD 512 /* expected at a time, as in the engine */

/* A copy that a layer to come was predicted to use. */
struct hb_simulated_ahead {
    struct hb_key key;
    bool pinned;  /* it is cached, and protected */
    bool reading; /* it is being read, and nobody waits for it */
    double left;  /* bytes to read */
};

struct hb_simulator {
    const struct hobbit_routing *trace;
    const struct hobbit_simulation *in;
    struct hobbit_simulated *out;
    struct hb_cache *cache;
    struct hb_rule rule;
    struct hb_routing routing;
    struct hb_block memory;
    int32_t *first_expert; /* [n_groups] their experts' numbers, of all */
    uint16_t *in_vain;     /* one an expert */
    uint8_t *unused;       /* two an expert, by precision: read ahead, and not used yet */
    uint64_t *next_use;    /* one a pair of the trace: for HOBBIT_POLICY_FARTHEST, else NULL */
    struct hb_simulated_ahead expected[HB_SIMULATED_AHEAD];
    int32_t n_expected;
    /* The layer being computed. */
    bool computing;
    int64_t event;
    int32_t group;        /* also that of the layer before */
    int32_t next_missing; /* experts before it are cached, loading or done */
    int32_t loading, ready, done;
    double demand;        /* bytes that are waited for */
    uint64_t evictions;   /* when it began */
};

/* False, with a sentence in `*problem`: the layer cannot be computed. */
bool hb_simulated_layer(struct hb_simulator *sim, int64_t event, const char **problem);
/* Everything arrives and is computed. False: the cache is too small. */
bool hb_simulated_layer_end(struct hb_simulator *sim);

/* Take in an event that predicts. */
void hb_simulated_expect(struct hb_simulator *sim, int64_t event);
/* As hb_model_unprotect and hb_model_give_up. */
void hb_simulated_unprotect(struct hb_simulator *sim, int32_t group);
void hb_simulated_give_up(struct hb_simulator *sim, int32_t group);
/* The read ahead of this copy, or NULL. */
struct hb_simulated_ahead *hb_simulated_reading(struct hb_simulator *sim, struct hb_key key);
/* The copy is not cached: if it was read ahead and not used, that was in vain. */
void hb_simulated_count_unused(struct hb_simulator *sim, struct hb_key key);
/* Reads ahead go on for so many bytes. What is complete is taken in. */
void hb_simulated_read_ahead(struct hb_simulator *sim, double bytes);
/* The oldest read ahead is waited for; false when there is none. */
bool hb_simulated_await_ahead(struct hb_simulator *sim);

static inline uint64_t hb_simulated_bytes(const struct hb_simulator *sim, struct hb_key key) {
    return sim->in->expert_bytes[HOBBIT_PRECISIONS * key.group + key.precision];
}

static inline uint8_t *hb_simulated_unused(const struct hb_simulator *sim, struct hb_key key) {
    return &sim->unused[HOBBIT_PRECISIONS * (sim->first_expert[key.group] + key.expert) + key.precision];
}

static inline void hb_simulated_count_read(struct hb_simulator *sim, int32_t precision, uint64_t bytes) {
    sim->out->read_bytes[sim->event] += bytes;
    sim->out->read_low_bytes[sim->event] += precision == HOBBIT_LOW ? bytes : 0;
}

static inline struct hb_wanted hb_simulated_wanted(const struct hb_simulator *sim, int32_t group, int32_t expert,
                                                   int32_t need) {
    return (struct hb_wanted) {
        .high = {group, expert, HOBBIT_HIGH},
        .need = need,
        .has_low = sim->in->expert_bytes[HOBBIT_PRECISIONS * group + HOBBIT_LOW] > 0,
        .in_vain = &sim->in_vain[sim->first_expert[group] + expert],
    };
}

#endif
