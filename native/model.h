/* One streamed model: joins catalog, reader and cache, and owns the arena.
 *
 * The lock makes one computation at a time the owner of the cache. A computation looks each of its experts up
 * (hits are pinned), fetches the missing ones as slots allow, collects arrivals, computes, and releases every
 * expert it pinned. Reader threads touch only the memory of LOADING slots and their jobs.
 */
#ifndef HB_MODEL_H
#define HB_MODEL_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "cache.h"
#include "catalog.h"
#include "forecast.h"
#include "hobbit.h"
#include "map_predictor.h"
#include "reader.h"
#include "rule.h"
#include "rows.h"
#include "tier.h"
#include "trace.h"

struct hb_counters {
    atomic_uint_fast64_t hits, misses, evictions, cached, stall_ns, compute_ns, splits, dense_bytes;
    atomic_uint_fast64_t predicted, predicted_right, ahead, ahead_used, ahead_bytes, ahead_wasted_bytes;
    atomic_uint_fast64_t predict_ns, manage_ns;
    atomic_uint_fast64_t read_low_bytes, promotions, stand_ins, scored, unscored;
    atomic_uint_fast64_t pairs[HOBBIT_SKIP + 1]; /* by precision */
    atomic_uint_fast64_t device_hits, device_pairs, device_low_pairs, device_bytes, device_ns, device_wait_ns;
    atomic_uint_fast64_t device_declined;
    atomic_uint_fast64_t device_brought, split_ns, split_cpu_ns, split_device_ns, split_longer_ns;
    atomic_uint_fast64_t break_even_pairs; /* not a sum: as of now */
    atomic_uint_fast64_t cache_bytes, n_slots; /* of the arena as it is: stats are asked for while it is exchanged */
    atomic_uint_fast64_t predictor; /* hb_model_predictor: stats are asked for while it changes */
};

/* Of one group. */
struct hb_look_ups {
    atomic_uint_fast64_t hits, misses;
};

/* What calibration gathers; see hobbit_model_observe and hobbit_model_collect. NULL where it is not wanted. */
struct hb_gathered {
    int64_t *scores;
    float *const *sums;
    int64_t *const *counts;
};

struct hb_arena {
    char *base; /* slot i of the pool begins at base + i * slot_bytes */
    uint64_t slot_bytes;
    int32_t n_slots;
};

void hb_model_lock(struct hobbit_model *model);
bool hb_model_try_lock(struct hobbit_model *model);
void hb_model_unlock(struct hobbit_model *model);
bool hb_model_ready(const struct hobbit_model *model); /* the arena is allocated */

const struct hb_catalog *hb_model_catalog(const struct hobbit_model *model);
struct hb_counters *hb_model_counters(struct hobbit_model *model);
const struct hb_rule *hb_model_rule(const struct hobbit_model *model);
const struct hb_gathered *hb_model_gathered(const struct hobbit_model *model);
struct hb_arena hb_model_arena(const struct hobbit_model *model, int32_t group, int32_t precision);
int32_t hb_model_home(const struct hobbit_model *model, int32_t group); /* see hb_cache_home */
bool hb_model_cancelled(const struct hobbit_model *model);

/* With the lock held; groups and experts must exist: */

/* The precision that an expert gets whose pairs need `need` (HOBBIT_HIGH, LOW or SKIP), by what is cached:
 *
 *   need    high cached   low cached   both    neither
 *   high    high          read high    high    read high     (low cached: a promotion)
 *   low     high          low          high    read low
 *   skip    high          low          high    skip
 *
 * What is on the device is cached here too. A copy that is there costs nothing, so the better one is used. When a promoted high copy has arrived the low one is
 * dropped: it would never be used beside it. An evicted high copy is not demoted: its low copy is read when it is
 * asked for. With a deterministic rule the need decides alone, and both copies may stay.
 *
 * The high copy of a nested model is the low one and a plane that completes it: it is read with the low copy where
 * that is not cached, and without it where it is, which makes a promotion cheap.
 *
 * With patience n > 1, a high need gets a high copy that is cached, and else the low one, until it was in vain n - 1
 * times: then the high copy is read. So experts that are asked for often are soon high, and the others stay cheap.
 *
 * Where all low copies are kept, a high need gets a high copy that is cached, and else the low one at once; the high
 * one is then perhaps promoted in the background. */
int32_t hb_model_choose(struct hobbit_model *model, int32_t group, int32_t expert, int32_t need);
/* Record the precisions, or replace them by those that are replayed. On failure the error is kept. */
bool hb_model_schedule(struct hobbit_model *model, int32_t group, int32_t n, const int32_t *experts,
                       int32_t *precisions);
bool hb_model_has_schedule(const struct hobbit_model *model);
struct hb_trace *hb_model_trace(const struct hobbit_model *model); /* what routing is written to, or NULL */
bool hb_model_has(const struct hobbit_model *model, struct hb_key key); /* it is cached, here or on a device */
bool hb_model_is_here(const struct hobbit_model *model, struct hb_key key); /* in the host's memory */
/* Of router logits: take in the range of one token's, and return the mean of all so far of this group. */
float hb_model_mean_range(struct hobbit_model *model, int32_t group, float range);
/* Between computations: take in what was read in the background, and start what is wanted so. */
void hb_model_settle(struct hobbit_model *model);
/* A layer is computed, for so many rows: whose they are. Once for each layer, or piece of one. */
struct hb_owners hb_model_owners(struct hobbit_model *model, int32_t group, int64_t n_rows);
/* A layer's look-ups begin, of so many tokens, `most` of them of one sequence. */
void hb_model_begin(struct hobbit_model *model, int32_t group, int32_t n_tokens, int32_t most);
/* Count the look-up by these pairs; a cached copy is pinned and its slot returned, else -1. */
int32_t hb_model_look_up(struct hobbit_model *model, struct hb_key key, const struct hb_share *shares,
                         int32_t n_shares);
/* How many rows the last layer of the model had when it was computed last. */
int32_t hb_model_last_rows(const struct hobbit_model *model);
/* The routers, one a group, for the caller to fill in; all zero until then. And the predictors that learn from them:
 * NULL unless they were asked for. */
struct hb_router *hb_model_routers(struct hobbit_model *model);
struct hb_forecast *hb_model_forecast(struct hobbit_model *model);
struct hb_map_predictor *hb_model_map_predictor(struct hobbit_model *model);
/* The predictor in force, HOBBIT_PREDICT_NONE or one that can be asked; and how many layers ahead it may look. */
int32_t hb_model_predictor(const struct hobbit_model *model, int32_t *depth);
/* What hb_model_choose would say now, without any consequence. */
int32_t hb_model_expectation(const struct hobbit_model *model, int32_t group, int32_t expert, int32_t need);
/* These copies will be used when the group is computed, with such odds, the likeliest first: those cached are
 * protected until then; the others are read while nothing else is, unless the odds are poor. With a device, those
 * cached are offered to it, too. Returns whether all are
 * cached, which is to say that looking further ahead pays. */
bool hb_model_expect(struct hobbit_model *model, int32_t group, int32_t n, const int32_t *experts,
                     const int32_t *precisions, const float *odds);
/* The look-ups of this group are done: what was read for it and not asked for is not read to its end. -1: of any. */
void hb_model_give_up(struct hobbit_model *model, int32_t group);

enum hb_fetch {
    HB_FETCH_STARTED, /* it will arrive */
    HB_FETCH_READY,   /* it came with another copy meanwhile: it is pinned, in `*slot` */
    HB_FETCH_WAIT,    /* too much is pinned or under way: release some, or take in an arrival, first */
};
/* Start reading a missing copy. */
enum hb_fetch hb_model_fetch(struct hobbit_model *model, struct hb_key key, int32_t *slot);

struct hb_arrival {
    struct hb_key key; /* expert -1: nothing arrived */
    int32_t slot;
    bool failed; /* the read failed; the error is kept for hobbit_model_take_error */
};
struct hb_arrival hb_model_arrival(struct hobbit_model *model, bool wait);
void hb_model_release(struct hobbit_model *model, struct hb_key key);

/* --- experts that are on a device; the tier must be there for `bring` --- */

struct hb_tier *hb_model_tier(const struct hobbit_model *model); /* NULL: there is none, or it was lost */
/* Addresses of experts stay valid for as long as the process lives: a lost device may come back, and read them. */
void hb_model_keep_space(struct hobbit_model *model);
void hb_model_set_tier(struct hobbit_model *model, struct hb_tier *tier); /* once; takes the lock; the model frees it */
bool hb_model_is_there(const struct hobbit_model *model, struct hb_key key);
/* Count a look-up that found it there. */
void hb_model_hit_there(struct hobbit_model *model, struct hb_key key);
/* It goes there if it is cached here and that is worth it. Does nothing without a device. */
void hb_model_offer(struct hobbit_model *model, struct hb_key key);
/* Copy what is cached here to the device for the layer that is being computed: see hb_tier_bring. */
enum hb_brought hb_model_bring(struct hobbit_model *model, struct hb_key key);
/* Take in what has arrived there: the copies here are no longer pinned. `wait` for the next. False: nothing did. */
bool hb_model_take_uploads(struct hobbit_model *model, bool wait);
void hb_model_end_uploads(struct hobbit_model *model); /* wait for all */
void hb_model_decline(struct hobbit_model *model, int32_t group, int32_t precision); /* see hb_tier_decline */

/* Give back the reads that have not begun: they arrive as failed, without an error. Those in the background end too. */
void hb_model_withdraw(struct hobbit_model *model);

/* Copy part of a matrix stack from its file, past the cache. On failure the error is kept. */
bool hb_model_read(struct hobbit_model *model, const struct hb_matrix *matrix, void *dst, uint64_t offset,
                   size_t length);
/* Keep a sentence for hobbit_model_take_error. */
void hb_model_fail(struct hobbit_model *model, const char *reason);
/* The same, of the device: it is used no more. */
void hb_model_device_failed(struct hobbit_model *model, const char *reason);

#endif
