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

int32_t hb_model_look_up_there(struct hobbit_model *m, struct hb_key key, int32_t n_pairs) {
    int32_t slot = hb_tier_look_up(m->tier, key, n_pairs);
    if (slot >= 0) {
        m->used[hb_model_number(m, key)]++;
        atomic_fetch_add(&m->counters.hits, 1);
        atomic_fetch_add(&m->counters.device_hits, 1);
        atomic_fetch_add(&m->counters.device_pairs, (uint64_t) n_pairs);
    }
    return slot;
}

void hb_model_offer(struct hobbit_model *m, struct hb_key key) {
    int32_t slot = key.precision == HOBBIT_HIGH ? hb_cache_peek(m->cache, key) : -1;
    if (slot < 0) {
        return;
    }
    struct hb_arena arena = hb_model_arena(m, key.group, HOBBIT_HIGH);
    uint64_t bytes = m->catalog.groups[key.group].copies[HOBBIT_HIGH].expert_bytes;
    if (hb_tier_offer(m->tier, key, arena.base + (uint64_t) slot * arena.slot_bytes, bytes)) {
        hb_cache_pin(m->cache, key, true);
    }
}

bool hb_model_take_uploads(struct hobbit_model *m, bool wait) {
    struct hb_key key;
    bool any = false, was_there = hb_model_tier(m) != NULL;
    while (m->tier != NULL && hb_tier_taken(m->tier, wait && !any, &key)) {
        hb_cache_pin(m->cache, key, false);
        if (!hb_tier_is_abandoned(m->tier)) {
            uint64_t bytes = m->catalog.groups[key.group].copies[HOBBIT_HIGH].expert_bytes;
            atomic_fetch_add(&m->counters.device_bytes, bytes);
        }
        any = true;
    }
    if (was_there && hb_tier_is_abandoned(m->tier)) {
        char why[HB_ERROR_BYTES / 2], text[HB_ERROR_BYTES];
        hb_tier_reason(m->tier, why, sizeof why);
        snprintf(text, sizeof text, "the device that holds experts was lost: %s", why);
        hb_model_device_failed(m, text);
    }
    return any;
}

void hb_model_decline(struct hobbit_model *m, int32_t group) {
    hb_tier_decline(m->tier, group);
}

void hb_model_end_uploads(struct hobbit_model *m) {
    while (hb_model_take_uploads(m, true)) {
    }
}
