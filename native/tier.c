#include "tier.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LAST_COPY_MS 1000

struct upload {
    struct hb_task task;
    struct hb_tier *tier;
    struct hb_key key;
    int32_t slot;
    const char *data;
    bool under_way, brought;
};

struct hb_tier {
    struct hb_tier_device device;
    struct hb_cache *cache;
    bool *declined; /* one a group and precision */
    bool abandoned, begun, admits;
    uint64_t token_bytes, budget, limit;
    struct upload uploads[HB_TIER_UPLOADS];
};

static void nothing(void *context, int32_t pool, int32_t precision, int32_t slot) {
    (void) context, (void) pool, (void) precision, (void) slot;
}

static bool *declined(const struct hb_tier *t, int32_t group, int32_t precision) {
    return &t->declined[group * HOBBIT_PRECISIONS + precision];
}

/* With bytes for all slots of both banks, neither needs those of the other. */
static struct hb_cache *new_cache(const struct hb_tier_sizes *s) {
    struct hobbit_pool *pools = calloc((size_t) s->n_pools, sizeof *pools);
    if (pools == NULL) {
        return NULL;
    }
    for (int32_t i = 0; i < s->n_pools; i++) {
        for (int32_t p = 0; p < HOBBIT_PRECISIONS; p++) {
            pools[i].slot_bytes[p] = s->pools[i].expert_bytes[p];
            pools[i].n_slots[p] = s->pools[i].n_slots[p];
            pools[i].bytes += pools[i].slot_bytes[p] * (uint64_t) pools[i].n_slots[p];
        }
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
    t->limit = UINT64_MAX;
    t->admits = true;
    t->declined = calloc((size_t) sizes->n_groups * HOBBIT_PRECISIONS, sizeof *t->declined);
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

void hb_tier_admit(struct hb_tier *t, bool anything, uint64_t bytes) {
    t->admits = anything;
    t->limit = bytes;
}

/* What is not spent is kept for one expert that is bigger than what a token may have. */
void hb_tier_begin(struct hb_tier *t, int32_t group, int32_t n_tokens, bool new_pass) {
    hb_cache_begin(t->cache, group, n_tokens);
    if (new_pass || !t->begun) {
        uint64_t most = hb_cache_slot_bytes(t->cache, group), now = t->token_bytes * (uint64_t) n_tokens;
        now = now < t->limit ? now : t->limit;
        uint64_t kept = t->budget < most ? t->budget : most;
        t->budget = t->token_bytes > 0 ? kept + now : 0;
        t->begun = true;
    }
}

void hb_tier_new_sequence(struct hb_tier *t) {
    hb_cache_reset(t->cache, 0);
}

bool hb_tier_has(const struct hb_tier *t, struct hb_key key) {
    return !t->abandoned && hb_cache_peek(t->cache, key) >= 0;
}

int32_t hb_tier_look_up(struct hb_tier *t, struct hb_key key, int32_t n_pairs) {
    if (t->abandoned) {
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

void hb_tier_decline(struct hb_tier *t, int32_t group, int32_t precision) {
    *declined(t, group, precision) = true;
    for (int32_t e = 0; e < hb_cache_n_experts(t->cache, group); e++) {
        struct hb_key key = {group, e, precision};
        if (hb_cache_peek(t->cache, key) >= 0) {
            hb_cache_drop(t->cache, key);
        }
    }
}

bool hb_tier_declines(const struct hb_tier *t, struct hb_key key) {
    return *declined(t, key.group, key.precision);
}

void hb_tier_drop(struct hb_tier *t, struct hb_key key) {
    if (hb_cache_slot(t->cache, key) >= 0 && !hb_cache_is_pinned(t->cache, key)) {
        hb_cache_drop(t->cache, key);
    }
}

void hb_tier_forget(struct hb_tier *t) {
    hb_cache_forget(t->cache);
}

void hb_tier_abandon(struct hb_tier *t, const char *why) {
    if (!t->abandoned) {
        hb_worker_lose(t->device.worker, why);
        hb_worker_rest(t->device.worker, LAST_COPY_MS);
        t->abandoned = true;
    }
}

bool hb_tier_is_abandoned(const struct hb_tier *t) {
    return t->abandoned;
}

void hb_tier_reason(const struct hb_tier *t, char *text, unsigned long length) {
    char why[256];
    hb_worker_reason(t->device.worker, why, sizeof why);
    snprintf(text, length, "device %s was lost: %s", t->device.name, why);
}

static void copy(void *context) {
    const struct upload *u = context;
    u->tier->device.copy(u->tier->device.executor, u->key, u->slot, u->data);
}

static struct upload *free_upload(struct hb_tier *t) {
    for (int i = 0; i < HB_TIER_UPLOADS; i++) {
        if (!t->uploads[i].under_way) {
            return &t->uploads[i];
        }
    }
    return NULL;
}

static bool upload(struct hb_tier *t, struct hb_key key, const char *data, bool brought) {
    struct upload *u = free_upload(t);
    int32_t slot = u != NULL ? hb_cache_claim(t->cache, key) : -1;
    if (slot < 0) {
        return false;
    }
    *u = (struct upload) {.task = {.run = copy, .context = u}, .tier = t, .key = key, .slot = slot, .data = data,
                          .under_way = true, .brought = brought};
    hb_worker_submit(t->device.worker, t->device.thread, &u->task, brought);
    return true;
}

bool hb_tier_offer(struct hb_tier *t, struct hb_key key, const char *data, uint64_t bytes) {
    if (t->abandoned || !t->admits || hb_tier_declines(t, key) || bytes > t->budget ||
        hb_cache_slot(t->cache, key) >= 0 || !hb_cache_is_worth_it(t->cache, key) || !upload(t, key, data, false)) {
        return false;
    }
    t->budget -= bytes;
    return true;
}

enum hb_brought hb_tier_bring(struct hb_tier *t, struct hb_key key, const char *data) {
    if (t->abandoned || hb_tier_declines(t, key)) {
        return HB_BROUGHT_NEVER;
    }
    if (hb_cache_peek(t->cache, key) >= 0) { /* it was on its way there already */
        hb_cache_pin(t->cache, key, true);
        return HB_BROUGHT_THERE;
    }
    bool can = hb_cache_slot(t->cache, key) < 0 && upload(t, key, data, true);
    return can ? HB_BROUGHT_STARTED : HB_BROUGHT_WAIT;
}

int32_t hb_tier_arrived(const struct hb_tier *t, struct hb_key key) {
    if (t->abandoned || hb_cache_slot(t->cache, key) < 0) {
        return -2;
    }
    return hb_cache_peek(t->cache, key);
}

bool hb_tier_is_copying(const struct hb_tier *t) {
    bool any = false;
    for (int i = 0; i < HB_TIER_UPLOADS; i++) {
        any = any || t->uploads[i].under_way;
    }
    return any;
}

/* A worker that is lost does no more, and what it had is given back. */
static struct upload *ended(struct hb_tier *t) {
    if (hb_worker_is_lost(t->device.worker)) {
        hb_tier_abandon(t, "");
    }
    for (int i = 0; i < HB_TIER_UPLOADS; i++) {
        struct upload *u = &t->uploads[i];
        if (u->under_way && (t->abandoned || hb_worker_done(t->device.worker, &u->task, 0))) {
            return u;
        }
    }
    return NULL;
}

bool hb_tier_taken(struct hb_tier *t, int timeout_ms, struct hb_key *key) {
    uint64_t seen = hb_worker_ended(t->device.worker);
    struct upload *u = ended(t);
    if (u == NULL && timeout_ms > 0 && hb_tier_is_copying(t) && hb_worker_wait(t->device.worker, seen, timeout_ms)) {
        u = ended(t);
    }
    if (u == NULL) {
        return false;
    }
    u->under_way = false;
    *key = u->key;
    if (t->abandoned || *declined(t, key->group, key->precision)) {
        hb_cache_drop(t->cache, *key);
    } else {
        hb_cache_loaded(t->cache, *key);
        if (!u->brought) {
            hb_cache_pin(t->cache, *key, false);
        }
    }
    return true;
}
