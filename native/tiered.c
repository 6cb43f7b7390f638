/* A model some of whose experts are on a device: see tier.h. */
#include <stdio.h>

#include "model_impl.h"

struct hb_tier *hb_model_tier(const struct hobbit_model *m) {
    return m->tier != NULL && !hb_tier_is_abandoned(m->tier) ? m->tier : NULL;
}

void hb_model_set_tier(struct hobbit_model *m, struct hb_tier *tier) {
    hb_model_lock(m);
    m->tier = tier;
    hb_model_unlock(m);
}

bool hb_model_is_there(const struct hobbit_model *m, struct hb_key key) {
    return m->tier != NULL && hb_tier_has(m->tier, key);
}

void hb_model_hit_there(struct hobbit_model *m, struct hb_key key) {
    m->used[hb_model_number(m, key)]++;
    hb_model_count(m, key.group, true);
    atomic_fetch_add(&m->counters.device_hits, 1);
}

/* The copy in the host's cache, or NULL. */
static const char *data_here(const struct hobbit_model *m, struct hb_key key) {
    int32_t slot = hb_cache_peek(m->cache, key);
    struct hb_arena arena = hb_model_arena(m, key.group, key.precision);
    return slot >= 0 ? arena.base + (uint64_t) slot * arena.slot_bytes : NULL;
}

void hb_model_offer(struct hobbit_model *m, struct hb_key key) {
    const char *data = hb_model_tier(m) != NULL && key.precision != HOBBIT_SKIP ? data_here(m, key) : NULL;
    if (data == NULL) {
        return;
    }
    uint64_t bytes = m->catalog.groups[key.group].copies[key.precision].expert_bytes;
    if (hb_tier_offer(m->tier, key, data, bytes)) {
        hb_cache_pin(m->cache, key, true);
    }
}

enum hb_brought hb_model_bring(struct hobbit_model *m, struct hb_key key) {
    enum hb_brought brought = hb_tier_bring(m->tier, key, data_here(m, key));
    if (brought == HB_BROUGHT_STARTED) {
        hb_cache_pin(m->cache, key, true);
        atomic_fetch_add(&m->counters.device_brought, 1);
    }
    return brought;
}

/* Where a high copy is, a rule that looks at what there is never uses the low one beside it. */
static void arrived(struct hobbit_model *m, struct hb_key key) {
    atomic_fetch_add(&m->counters.device_bytes, m->catalog.groups[key.group].copies[key.precision].expert_bytes);
    if (key.precision == HOBBIT_HIGH && !m->rule.deterministic) {
        hb_tier_drop(m->tier, hb_key_in(key, HOBBIT_LOW));
    }
}

/* For a copy, and a batch before it: a device that takes longer is of no use. When the computation is cancelled, or the
 * model closed, it has less. */
#define SLICE_MS 50
#define PATIENCE_MS 60000
#define LAST_PATIENCE_MS 5000

/* The next copy to be made; one that never is is the end of the device. False: none is under way. */
static bool await(struct hobbit_model *m, int patience_ms, struct hb_key *key) {
    int waited = 0, hurried = 0;
    while (hb_tier_is_copying(m->tier)) {
        if (hb_tier_taken(m->tier, SLICE_MS, key)) {
            return true;
        }
        waited += SLICE_MS;
        hurried += hb_model_cancelled(m) ? SLICE_MS : 0;
        if (waited >= patience_ms || hurried >= LAST_PATIENCE_MS) {
            hb_tier_abandon(m->tier, "it does not answer");
        }
    }
    return false;
}

static bool take_uploads(struct hobbit_model *m, int patience_ms) {
    struct hb_key key;
    bool any = false, was_there = hb_model_tier(m) != NULL;
    while (m->tier != NULL &&
           (patience_ms > 0 && !any ? await(m, patience_ms, &key) : hb_tier_taken(m->tier, 0, &key))) {
        hb_cache_pin(m->cache, key, false);
        if (key.precision == HOBBIT_LOW) {
            hb_model_drop_replaced(m, key); /* its high copy may have arrived here meanwhile */
        }
        if (!hb_tier_is_abandoned(m->tier)) {
            arrived(m, key);
        }
        any = true;
    }
    if (was_there && hb_tier_is_abandoned(m->tier)) {
        char text[HB_ERROR_BYTES];
        hb_tier_reason(m->tier, text, sizeof text);
        hb_model_device_failed(m, text);
    }
    return any;
}

bool hb_model_take_uploads(struct hobbit_model *m, bool wait) {
    return take_uploads(m, wait ? PATIENCE_MS : 0);
}

void hb_model_decline(struct hobbit_model *m, int32_t group, int32_t precision) {
    hb_tier_decline(m->tier, group, precision);
}

void hb_model_end_uploads(struct hobbit_model *m) {
    while (take_uploads(m, LAST_PATIENCE_MS)) {
    }
}
