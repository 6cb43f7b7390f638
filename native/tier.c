#include "tier.h"

#include <stdlib.h>
#include <string.h>

/* For a copy, and a batch before it: a device that takes longer is of no use. */
#define PATIENCE_MS 60000

struct upload {
    struct hb_task task;
    struct hb_tier *tier;
    struct hb_key key;
    int32_t slot;
    const char *data;
    bool under_way;
};

struct hb_tier {
    struct hb_tier_device device;
    struct hb_cache *cache;
    bool *declined; /* one a group */
    bool abandoned, begun;
    uint64_t token_bytes, budget;
    struct upload uploads[HB_TIER_UPLOADS];
};

static void nothing(void *context, int32_t pool, int32_t precision, int32_t slot) {
    (void) context, (void) pool, (void) precision, (void) slot;
}

static struct hb_cache *new_cache(const struct hb_tier_sizes *s) {
    struct hobbit_pool *pools = calloc((size_t) s->n_pools, sizeof *pools);
    if (pools == NULL) {
        return NULL;
    }
    for (int32_t i = 0; i < s->n_pools; i++) {
        pools[i].slot_bytes[HOBBIT_HIGH] = s->expert_bytes[i];
        pools[i].n_slots[HOBBIT_HIGH] = s->n_slots[i];
        pools[i].bytes = s->expert_bytes[i] * (uint64_t) s->n_slots[i];
    }
    struct hb_cache *cache =
        hb_cache_new(s->n_pools, pools, s->n_groups, s->n_expert, s->pool_of_group, nothing, NULL);
    free(pools);
    return cache;
}

struct hb_tier *hb_tier_new(const struct hb_tier_device *device, const struct hb_tier_sizes *sizes) {
    struct hb_tier *t = calloc(1, sizeof *t);
    if (t == NULL) {
        return NULL;
    }
    t->device = *device;
    t->token_bytes = sizes->token_bytes;
    t->declined = calloc((size_t) sizes->n_groups, sizeof *t->declined);
    t->cache = new_cache(sizes);
    if (t->declined == NULL || t->cache == NULL) {
        hb_tier_free(t);
        return NULL;
    }
    return t;
}

void hb_tier_free(struct hb_tier *t) {
    if (t == NULL) {
        return;
    }
    hb_cache_free(t->cache);
    free(t->declined);
    if (!t->abandoned) { /* else a lost worker may still have a task of ours in its list */
        free(t);
    }
}

struct hb_executor *hb_tier_executor(const struct hb_tier *t) {
    return t->device.executor;
}

bool hb_tier_set_policy(struct hb_tier *t, const struct hobbit_policy *policy) {
    return hb_cache_set_policy(t->cache, policy);
}

/* What is not spent is kept for one expert that is bigger than what a token may have. */
void hb_tier_begin(struct hb_tier *t, int32_t group, int32_t n_tokens, bool new_pass) {
    hb_cache_begin(t->cache, group, n_tokens);
    if (new_pass || !t->begun) {
        uint64_t most = hb_cache_slot_bytes(t->cache, group), now = t->token_bytes * (uint64_t) n_tokens;
        uint64_t kept = t->budget < most ? t->budget : most;
        t->budget = t->token_bytes > 0 ? kept + now : 0;
        t->begun = true;
    }
}

void hb_tier_new_sequence(struct hb_tier *t) {
    hb_cache_reset(t->cache, 0);
}

bool hb_tier_has(const struct hb_tier *t, struct hb_key key) {
    return !t->abandoned && key.precision == HOBBIT_HIGH && hb_cache_peek(t->cache, key) >= 0;
}

int32_t hb_tier_look_up(struct hb_tier *t, struct hb_key key, int32_t n_pairs) {
    if (t->abandoned || key.precision != HOBBIT_HIGH) {
        return -1;
    }
    int32_t slot = hb_cache_find(t->cache, key, n_pairs);
    if (slot >= 0) {
        hb_cache_pin(t->cache, key, true);
    }
    return slot;
}

void hb_tier_release(struct hb_tier *t, struct hb_key key) {
    hb_cache_pin(t->cache, key, false);
}

void hb_tier_decline(struct hb_tier *t, int32_t group) {
    t->declined[group] = true;
    for (int32_t e = 0; e < hb_cache_n_experts(t->cache, group); e++) {
        struct hb_key key = {group, e, HOBBIT_HIGH};
        if (hb_cache_peek(t->cache, key) >= 0) {
            hb_cache_drop(t->cache, key);
        }
    }
}

void hb_tier_forget(struct hb_tier *t) {
    hb_cache_forget(t->cache);
}

void hb_tier_abandon(struct hb_tier *t) {
    t->abandoned = true;
}

bool hb_tier_is_abandoned(const struct hb_tier *t) {
    return t->abandoned;
}

void hb_tier_reason(const struct hb_tier *t, char *text, unsigned long length) {
    hb_worker_reason(t->device.worker, text, length);
}

static void copy(void *context) {
    const struct upload *u = context;
    u->tier->device.copy(u->tier->device.executor, u->key.group, u->slot, u->data);
}

static struct upload *free_upload(struct hb_tier *t) {
    for (int i = 0; i < HB_TIER_UPLOADS; i++) {
        if (!t->uploads[i].under_way) {
            return &t->uploads[i];
        }
    }
    return NULL;
}

bool hb_tier_offer(struct hb_tier *t, struct hb_key key, const char *data, uint64_t bytes) {
    struct upload *u = free_upload(t);
    if (t->abandoned || t->declined[key.group] || u == NULL || bytes > t->budget ||
        hb_cache_slot(t->cache, key) >= 0 || !hb_cache_is_worth_it(t->cache, key)) {
        return false;
    }
    int32_t slot = hb_cache_claim(t->cache, key);
    if (slot < 0) {
        return false;
    }
    t->budget -= bytes;
    *u = (struct upload) {.task = {.run = copy, .context = u}, .tier = t, .key = key, .slot = slot, .data = data, .under_way = true};
    hb_worker_submit(t->device.worker, &u->task, false);
    return true;
}

/* The worker does them in order; one that is lost does no more, and what it had is given back. */
static struct upload *next_taken(struct hb_tier *t, bool wait) {
    struct upload *first = NULL;
    t->abandoned = t->abandoned || hb_worker_is_lost(t->device.worker);
    for (int i = 0; i < HB_TIER_UPLOADS; i++) {
        struct upload *u = &t->uploads[i];
        if (u->under_way && (t->abandoned || hb_worker_done(t->device.worker, &u->task, 0))) {
            return u;
        }
        first = first == NULL && u->under_way ? u : first;
    }
    if (first != NULL && wait && !hb_worker_done(t->device.worker, &first->task, PATIENCE_MS)) {
        hb_worker_lose(t->device.worker, "it does not answer");
        t->abandoned = true;
    }
    return wait ? first : NULL;
}

bool hb_tier_taken(struct hb_tier *t, bool wait, struct hb_key *key) {
    struct upload *u = next_taken(t, wait);
    if (u == NULL) {
        return false;
    }
    u->under_way = false;
    *key = u->key;
    if (t->abandoned || t->declined[key->group]) {
        hb_cache_drop(t->cache, *key);
    } else {
        hb_cache_loaded(t->cache, *key);
        hb_cache_pin(t->cache, *key, false);
    }
    return true;
}
