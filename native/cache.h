/* Which copy of an expert is in which slot. An expert has a high copy and perhaps a low one, and each is cached by
 * itself. A pool has a bank of equal slots for each precision; the two banks share the pool's bytes: a slot takes its
 * bytes when it is filled and gives them back when another needs them, so the mixture follows from what is asked for. A
 * copy of either kind costs its bytes to read again, so that the same order of eviction is right for both. The cache
 * knows numbers only: it never touches the slots' memory and does no I/O.
 *
 * A slot is FREE, LOADING (claimed, its bytes are the reader's) or READY. A pinned slot is never evicted; pins are
 * counted, and a LOADING slot has one. What is known of an expert's uses is kept whether it is cached or not, until the
 * sequence ends that used it: see records.h. Who is evicted is the policy's matter; finding it takes O(log slots +
 * layers), and nothing here allocates after hb_cache_new but hb_cache_set_policy and hb_cache_add_sequence. Not
 * thread-safe: the model's lock covers it.
 */
#ifndef HB_CACHE_H
#define HB_CACHE_H

#include <stdbool.h>
#include <stdint.h>

#include "hobbit.h"
#include "policy.h"
#include "records.h"

/* One copy of one expert. */
struct hb_key {
    int32_t group, expert, precision;
};

struct hb_cache;

/* Called when a slot's memory is to be given back: the other bank wants it. */
typedef void hb_cache_emptied(void *context, int32_t pool, int32_t precision, int32_t slot);

/* Group g has experts_of_group[g] experts that live in pool_of_group[g]. NULL when memory is short. */
struct hb_cache *hb_cache_new(int32_t n_pools, const struct hobbit_pool *pools, int32_t n_groups,
                              const int32_t *experts_of_group, const int32_t *pool_of_group,
                              hb_cache_emptied *emptied, void *context);
void hb_cache_free(struct hb_cache *cache); /* NULL is fine */

/* Evict by this policy from now on; LRU until then. False, and nothing is changed, when memory is short. */
bool hb_cache_set_policy(struct hb_cache *cache, const struct hobbit_policy *policy);
/* A layer's look-ups begin, of so many tokens of one sequence: the most that any has. Groups follow one another in the
 * order of the layers. */
void hb_cache_begin(struct hb_cache *cache, int32_t group, int32_t n_tokens);
/* What this sequence uses is told apart from now on: see hb_records_add. Sequence 0 needs none. */
bool hb_cache_add_sequence(struct hb_cache *cache, int32_t sequence);
/* The sequence ended, or a new one takes its place: its records of uses are forgotten, or aged where the policy says
 * so; those of others stay. O(experts + slots). */
void hb_cache_reset(struct hb_cache *cache, int32_t sequence);

/* The slot (numbered within its bank) that holds the copy in READY state, or -1. */
int32_t hb_cache_peek(const struct hb_cache *cache, struct hb_key key);
/* The slot of the copy, LOADING or READY, or -1. */
int32_t hb_cache_slot(const struct hb_cache *cache, struct hb_key key);
/* Whether a claim would evict nothing. */
bool hb_cache_has_room(const struct hb_cache *cache, struct hb_key key);
/* As hb_cache_peek, and hit or miss it is a use by so many (token, expert) pairs, of sequence 0. */
int32_t hb_cache_find(struct hb_cache *cache, struct hb_key key, int32_t n_pairs);
/* The same, by pairs of several sequences: one look-up. */
int32_t hb_cache_find_shared(struct hb_cache *cache, struct hb_key key, const struct hb_share *shares,
                             int32_t n_shares);
/* Of a copy that is not cached: whether claiming it evicts nothing, or what is worth less, even if its own layer were
 * as far away as any. */
bool hb_cache_is_worth_it(const struct hb_cache *cache, struct hb_key key);
/* For HOBBIT_POLICY_FARTHEST: when the expert is used next. Set it while the expert is pinned or not cached. */
void hb_cache_set_next_use(struct hb_cache *cache, struct hb_key key, uint64_t when);
/* A slot for a copy that is not cached, LOADING from now on; evicts. -1 when what is not pinned has too few bytes. */
int32_t hb_cache_claim(struct hb_cache *cache, struct hb_key key);
void hb_cache_loaded(struct hb_cache *cache, struct hb_key key); /* LOADING -> READY, stays pinned */
/* A LOADING or READY copy is given up, pinned or not. */
void hb_cache_drop(struct hb_cache *cache, struct hb_key key);
/* Give up every READY copy that is not pinned. */
void hb_cache_forget(struct hb_cache *cache);
void hb_cache_pin(struct hb_cache *cache, struct hb_key key, bool pinned);
bool hb_cache_is_pinned(const struct hb_cache *cache, struct hb_key key); /* of a LOADING or READY copy */
void hb_cache_keep(struct hb_cache *cache, struct hb_key key); /* from now on never evicted or forgotten */

/* In a pool with a slot for the high copy of every expert, that of expert e always lives in slot home + e; -1
 * elsewhere. */
int32_t hb_cache_home(const struct hb_cache *cache, int32_t group);

uint64_t hb_cache_slot_bytes(const struct hb_cache *cache, int32_t group); /* of a high copy */
int32_t hb_cache_n_experts(const struct hb_cache *cache, int32_t group);
int32_t hb_cache_n_ready(const struct hb_cache *cache);
uint64_t hb_cache_used(const struct hb_cache *cache, int32_t pool); /* bytes */
uint64_t hb_cache_evictions(const struct hb_cache *cache);
bool hb_cache_is_valid(const struct hb_cache *cache); /* the invariants hold; for tests */

#endif
