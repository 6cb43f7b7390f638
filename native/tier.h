/* Copies of experts in a device's memory, beside those in the host's: which expert is in which slot there, and who goes
 * there next. They come from the host's cache, after the layer that used them: a copy that is worth more than what it
 * would take the place of, which is of the same precision, is copied by the device's worker while other things are
 * computed, a bounded number of bytes a token. Once it is there the one in the host's memory is no longer used, and goes
 * when the host's policy has it go.
 *
 * The tier knows of every use of every expert, on the device or not, so that its own policy can compare both.
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
    const char *name; /* for messages; it stays */
    struct hb_executor *executor;
    struct hb_worker *worker;
    int thread; /* the worker's that copies */
    /* On that thread: fill the slot from the copy's slot in the host's arena. */
    void (*copy)(struct hb_executor *executor, struct hb_key key, int32_t slot, const char *data);
};

struct hb_tier_sizes {
    int32_t n_groups, n_pools;
    const int32_t *n_expert, *pool_of_group; /* [n_groups] */
    const struct hobbit_device_pool *pools;  /* [n_pools] */
    uint64_t token_bytes;                    /* the most that are uploaded a token, but for what is brought */
};

struct hb_tier *hb_tier_new(const struct hb_tier_device *device, const struct hb_tier_sizes *sizes);
/* Every upload has ended, or the worker is lost. NULL is fine. */
void hb_tier_free(struct hb_tier *tier);
struct hb_executor *hb_tier_executor(const struct hb_tier *tier);
bool hb_tier_set_policy(struct hb_tier *tier, const struct hobbit_policy *policy);

/* Whether anything is to go there that is not brought; and, in the passes to come, at most so many bytes each: what
 * there is time for. */
void hb_tier_admit(struct hb_tier *tier, bool anything, uint64_t bytes);
/* A layer's look-ups begin; `new_pass`: it is the first of these tokens. */
void hb_tier_begin(struct hb_tier *tier, int32_t group, int32_t n_tokens, bool new_pass);
void hb_tier_new_sequence(struct hb_tier *tier);
/* Whether a computation finds it there. */
bool hb_tier_has(const struct hb_tier *tier, struct hb_key key);
/* A use by so many pairs: its slot, pinned, or -1. */
int32_t hb_tier_look_up(struct hb_tier *tier, struct hb_key key, int32_t n_pairs);
void hb_tier_release(struct hb_tier *tier, struct hb_key key);
/* The device cannot compute this group in this precision: nothing of it is there any more. */
void hb_tier_decline(struct hb_tier *tier, int32_t group, int32_t precision);
bool hb_tier_declines(const struct hb_tier *tier, struct hb_key key);
/* The copy is of no use any more, and goes if it is there; not if it is in use, or on its way. */
void hb_tier_drop(struct hb_tier *tier, struct hb_key key);
/* Drop all that is there and not in use. */
void hb_tier_forget(struct hb_tier *tier);
/* The device failed: nothing is there any more, for good, and it is asked for nothing. Copies that it is in the middle of
 * have some time to end, as what they read is given back. */
void hb_tier_abandon(struct hb_tier *tier, const char *why);
bool hb_tier_is_abandoned(const struct hb_tier *tier);
void hb_tier_reason(const struct hb_tier *tier, char *text, unsigned long length); /* that it was lost, and why */

/* Copy it there if it is worth it and there are bytes left for it: then `data` has to stay until hb_tier_taken
 * says that the copy is made. */
bool hb_tier_offer(struct hb_tier *tier, struct hb_key key, const char *data, uint64_t bytes);
enum hb_brought {
    HB_BROUGHT_STARTED,
    HB_BROUGHT_THERE, /* it is there already: nothing is copied */
    HB_BROUGHT_WAIT,  /* too many copies are under way, or too much is pinned: release some, or take one in, first */
    HB_BROUGHT_NEVER, /* not this group */
};
/* Copy it there for the layer that is being computed, whatever it is worth: it is pinned when it has arrived. `data` as
 * above. */
enum hb_brought hb_tier_bring(struct hb_tier *tier, struct hb_key key, const char *data);
/* The slot of a copy that was brought; -1: it has not arrived; -2: and never will. */
int32_t hb_tier_arrived(const struct hb_tier *tier, struct hb_key key);
bool hb_tier_is_copying(const struct hb_tier *tier);
/* A copy that has been made, if there is one within so many milliseconds, or less: false, if not. */
bool hb_tier_taken(struct hb_tier *tier, int timeout_ms, struct hb_key *key);

#endif
