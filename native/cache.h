/* Which expert is in which slot. Slots of equal size form a pool; an expert belongs to one pool. The cache knows
 * numbers only: it never touches the slots' memory and does no I/O.
 *
 * A slot is FREE, LOADING (claimed, its bytes are the reader's) or READY. A pinned slot is never evicted; a
 * LOADING slot counts as pinned. Not thread-safe: the model's lock covers it.
 */
#ifndef HB_CACHE_H
#define HB_CACHE_H

#include <stdbool.h>
#include <stdint.h>

#include "policy.h"

enum hb_slot_state { HB_SLOT_FREE, HB_SLOT_LOADING, HB_SLOT_READY };

struct hb_slot {
    enum hb_slot_state state;
    bool pinned;
    int32_t group, expert; /* valid unless FREE */
    struct hb_usage usage;
};

struct hb_cache;

/* Pools of slots_of_pool[] slots; group g has experts_of_group[g] experts that live in pool_of_group[g].
 * NULL when memory is short. */
struct hb_cache *hb_cache_new(int32_t n_pools, const int32_t *slots_of_pool, int32_t n_groups,
                              const int32_t *experts_of_group, const int32_t *pool_of_group);
void hb_cache_free(struct hb_cache *cache); /* NULL is fine */

/* The slot (numbered within its pool) that holds the expert in READY state, or -1. A hit is a use. */
int32_t hb_cache_find(struct hb_cache *cache, int32_t group, int32_t expert);
/* A slot for an expert that is not cached, LOADING from now on; evicts. -1 when every slot is pinned. */
int32_t hb_cache_claim(struct hb_cache *cache, int32_t group, int32_t expert);
void hb_cache_loaded(struct hb_cache *cache, int32_t group, int32_t expert); /* LOADING -> READY, stays pinned */
void hb_cache_failed(struct hb_cache *cache, int32_t group, int32_t expert); /* LOADING -> FREE */
void hb_cache_pin(struct hb_cache *cache, int32_t group, int32_t expert, bool pinned);

/* In a pool with a slot for every expert, expert e of the group always lives in slot home + e; -1 elsewhere. */
int32_t hb_cache_home(const struct hb_cache *cache, int32_t group);

int32_t hb_cache_n_slots(const struct hb_cache *cache, int32_t pool);
int32_t hb_cache_n_ready(const struct hb_cache *cache);
uint64_t hb_cache_evictions(const struct hb_cache *cache);
bool hb_cache_is_valid(const struct hb_cache *cache); /* the invariants hold; for tests */

#endif
