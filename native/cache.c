#include "cache.h"

#include <stdlib.h>

#define NONE (-1)

struct pool {
    int32_t n_slots, n_experts;
    struct hb_slot *slots;
};

struct group {
    int32_t pool, n_experts;
    int32_t home; /* where its experts would lie in a pool that holds all of them, in order */
    int32_t *slot_of; /* expert -> slot in the pool, or NONE */
};

struct hb_cache {
    int32_t n_pools, n_groups;
    struct pool *pools;
    struct group *groups;
    int32_t n_ready;
    uint64_t uses, evictions;
};

struct hb_cache *hb_cache_new(int32_t n_pools, const int32_t *slots_of_pool, int32_t n_groups,
                              const int32_t *experts_of_group, const int32_t *pool_of_group) {
    struct hb_cache *c = calloc(1, sizeof *c);
    if (c == NULL) {
        return NULL;
    }
    c->pools = calloc((size_t) n_pools, sizeof *c->pools);
    c->groups = calloc((size_t) n_groups, sizeof *c->groups);
    if (c->pools == NULL || c->groups == NULL) {
        goto err;
    }
    for (c->n_pools = 0; c->n_pools < n_pools; c->n_pools++) {
        struct pool *pool = &c->pools[c->n_pools];
        pool->n_slots = slots_of_pool[c->n_pools];
        pool->slots = calloc((size_t) pool->n_slots, sizeof *pool->slots);
        if (pool->slots == NULL) {
            goto err;
        }
    }
    for (c->n_groups = 0; c->n_groups < n_groups; c->n_groups++) {
        struct group *group = &c->groups[c->n_groups];
        group->pool = pool_of_group[c->n_groups];
        group->n_experts = experts_of_group[c->n_groups];
        group->home = c->pools[group->pool].n_experts;
        c->pools[group->pool].n_experts += group->n_experts;
        group->slot_of = malloc((size_t) group->n_experts * sizeof *group->slot_of);
        if (group->slot_of == NULL) {
            goto err;
        }
        for (int32_t e = 0; e < group->n_experts; e++) {
            group->slot_of[e] = NONE;
        }
    }
    return c;
err:
    hb_cache_free(c);
    return NULL;
}

void hb_cache_free(struct hb_cache *c) {
    if (c == NULL) {
        return;
    }
    for (int32_t i = 0; i < c->n_groups; i++) {
        free(c->groups[i].slot_of);
    }
    for (int32_t i = 0; i < c->n_pools; i++) {
        free(c->pools[i].slots);
    }
    free(c->groups);
    free(c->pools);
    free(c);
}

static struct hb_slot *slot_of(struct hb_cache *c, int32_t group, int32_t expert) {
    const struct group *g = &c->groups[group];
    return &c->pools[g->pool].slots[g->slot_of[expert]];
}

int32_t hb_cache_find(struct hb_cache *c, int32_t group, int32_t expert) {
    int32_t index = c->groups[group].slot_of[expert];
    if (index == NONE || slot_of(c, group, expert)->state != HB_SLOT_READY) {
        return NONE;
    }
    slot_of(c, group, expert)->usage.last_use = ++c->uses;
    return index;
}

static int32_t victim(const struct pool *pool) {
    int32_t best = NONE;
    for (int32_t i = 0; i < pool->n_slots; i++) {
        const struct hb_slot *slot = &pool->slots[i];
        if (slot->state == HB_SLOT_FREE) {
            return i;
        }
        if (slot->state == HB_SLOT_READY && !slot->pinned &&
            (best == NONE || hb_policy_score(&slot->usage) < hb_policy_score(&pool->slots[best].usage))) {
            best = i;
        }
    }
    return best;
}

int32_t hb_cache_home(const struct hb_cache *c, int32_t group) {
    const struct group *g = &c->groups[group];
    const struct pool *pool = &c->pools[g->pool];
    return pool->n_slots >= pool->n_experts ? g->home : NONE;
}

int32_t hb_cache_claim(struct hb_cache *c, int32_t group, int32_t expert) {
    struct group *g = &c->groups[group];
    struct pool *pool = &c->pools[g->pool];
    int32_t home = hb_cache_home(c, group);
    int32_t index = home != NONE ? home + expert : victim(pool);
    if (index == NONE) {
        return NONE;
    }
    struct hb_slot *slot = &pool->slots[index];
    if (slot->state == HB_SLOT_READY) {
        c->groups[slot->group].slot_of[slot->expert] = NONE;
        c->evictions++;
        c->n_ready--;
    }
    *slot = (struct hb_slot) {HB_SLOT_LOADING, true, group, expert, {++c->uses}};
    g->slot_of[expert] = index;
    return index;
}

void hb_cache_loaded(struct hb_cache *c, int32_t group, int32_t expert) {
    slot_of(c, group, expert)->state = HB_SLOT_READY;
    c->n_ready++;
}

void hb_cache_failed(struct hb_cache *c, int32_t group, int32_t expert) {
    *slot_of(c, group, expert) = (struct hb_slot) {.state = HB_SLOT_FREE};
    c->groups[group].slot_of[expert] = NONE;
}

void hb_cache_pin(struct hb_cache *c, int32_t group, int32_t expert, bool pinned) {
    slot_of(c, group, expert)->pinned = pinned;
}

int32_t hb_cache_n_slots(const struct hb_cache *c, int32_t pool) {
    return c->pools[pool].n_slots;
}

int32_t hb_cache_n_ready(const struct hb_cache *c) {
    return c->n_ready;
}

uint64_t hb_cache_evictions(const struct hb_cache *c) {
    return c->evictions;
}

bool hb_cache_is_valid(const struct hb_cache *c) {
    int64_t held = 0, mapped = 0, ready = 0;
    for (int32_t p = 0; p < c->n_pools; p++) {
        for (int32_t i = 0; i < c->pools[p].n_slots; i++) {
            const struct hb_slot *slot = &c->pools[p].slots[i];
            if (slot->state == HB_SLOT_FREE) {
                continue;
            }
            const struct group *g = &c->groups[slot->group];
            if (g->pool != p || g->slot_of[slot->expert] != i || slot->usage.last_use > c->uses ||
                (slot->state == HB_SLOT_LOADING && !slot->pinned)) {
                return false;
            }
            held++;
            ready += slot->state == HB_SLOT_READY;
        }
    }
    for (int32_t i = 0; i < c->n_groups; i++) {
        for (int32_t e = 0; e < c->groups[i].n_experts; e++) {
            mapped += c->groups[i].slot_of[e] != NONE;
        }
    }
    return held == mapped && ready == c->n_ready;
}
