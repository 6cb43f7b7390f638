/* Copies of experts in a device's memory, beside those in the host's: which expert is in which slot there, and who goes
 * there next. Only high copies do. They come from the host's cache, after the layer that used them: an expert that is
 * worth more than what it would take the place of is copied by the device's worker while other things are computed, a
 * bounded number of bytes a token. Once it is there its copy in the host's memory is no longer used, and goes when the
 * host's policy has it go.
 *
 * The tier knows of every use of every high expert, on the device or not, so that its own policy can compare both.
 * Part of a model, under its lock.
 */
#ifndef HB_TIER_H
#define HB_TIER_H

#include <stdbool.h>
#include <stdint.h>

#include "cache.h"
#include "worker.h"

#define HB_TIER_UPLOADS 16

struct hb_executor;
struct hb_tier;

/* What a device does for it. */
struct hb_tier_device {
    struct hb_executor *executor;
    struct hb_worker *worker;
    /* On the worker's thread: fill the slot from an expert's slot in the host's arena. */
    void (*copy)(struct hb_executor *executor, int32_t group, int32_t slot, const char *data);
};

struct hb_tier_sizes {
    int32_t n_groups, n_pools;
    const int32_t *n_expert, *pool_of_group; /* [n_groups] */
    const uint64_t *expert_bytes;            /* [n_pools] */
    const int32_t *n_slots;                  /* [n_pools] */
    uint64_t token_bytes;                    /* the most that are uploaded a token */
};

struct hb_tier *hb_tier_new(const struct hb_tier_device *device, const struct hb_tier_sizes *sizes);
/* Every upload has ended, or the worker is lost. NULL is fine. */
void hb_tier_free(struct hb_tier *tier);
struct hb_executor *hb_tier_executor(const struct hb_tier *tier);
bool hb_tier_set_policy(struct hb_tier *tier, const struct hobbit_policy *policy);

/* A layer's look-ups begin; `new_pass`: it is the first of these tokens. */
void hb_tier_begin(struct hb_tier *tier, int32_t group, int32_t n_tokens, bool new_pass);
void hb_tier_new_sequence(struct hb_tier *tier);
/* Whether a computation finds it there. */
bool hb_tier_has(const struct hb_tier *tier, struct hb_key key);
/* A use by so many pairs: its slot, pinned, or -1. */
int32_t hb_tier_look_up(struct hb_tier *tier, struct hb_key key, int32_t n_pairs);
void hb_tier_release(struct hb_tier *tier, struct hb_key key);
/* The device cannot compute this group: nothing of it is there any more. */
void hb_tier_decline(struct hb_tier *tier, int32_t group);
/* Drop all that is there and not in use. */
void hb_tier_forget(struct hb_tier *tier);
/* Nothing is there any more, for good. */
void hb_tier_abandon(struct hb_tier *tier);
bool hb_tier_is_abandoned(const struct hb_tier *tier);
void hb_tier_reason(const struct hb_tier *tier, char *text, unsigned long length); /* why its worker is lost, else "" */

/* Copy the expert there if it is worth it and there are bytes left for it: then `data` has to stay until hb_tier_taken
 * says that the copy is made. */
bool hb_tier_offer(struct hb_tier *tier, struct hb_key key, const char *data, uint64_t bytes);
/* A copy that has been made, if there is one: false, if not. `wait` for the next; false then if none is under way. */
bool hb_tier_taken(struct hb_tier *tier, bool wait, struct hb_key *key);

#endif
