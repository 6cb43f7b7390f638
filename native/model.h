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
#include "hobbit.h"
#include "reader.h"

struct hb_counters {
    atomic_uint_fast64_t hits, misses, evictions, cached, stall_ns, compute_ns, splits, dense_bytes;
};

struct hb_arena {
    char *base; /* slot i of the pool begins at base + i * slot_bytes */
    uint64_t slot_bytes;
    int32_t n_slots;
};

void hb_model_lock(struct hobbit_model *model);
void hb_model_unlock(struct hobbit_model *model);
bool hb_model_ready(const struct hobbit_model *model); /* the arena is allocated */

const struct hb_catalog *hb_model_catalog(const struct hobbit_model *model);
struct hb_counters *hb_model_counters(struct hobbit_model *model);
struct hb_arena hb_model_arena(const struct hobbit_model *model, int32_t group);
int32_t hb_model_home(const struct hobbit_model *model, int32_t group); /* see hb_cache_home */
bool hb_model_cancelled(const struct hobbit_model *model);

/* With the lock held; group and expert must exist: */
/* Count the look-up; a cached expert is pinned and its slot returned, else -1. */
int32_t hb_model_look_up(struct hobbit_model *model, int32_t group, int32_t expert);
/* Start reading a missing expert; false when every slot is pinned: release some first. */
bool hb_model_fetch(struct hobbit_model *model, int32_t group, int32_t expert);

struct hb_arrival {
    int32_t expert, slot; /* expert -1: nothing arrived */
    bool failed;          /* the read failed; the error is kept for hobbit_model_take_error */
};
struct hb_arrival hb_model_arrival(struct hobbit_model *model, bool wait);
void hb_model_release(struct hobbit_model *model, int32_t group, int32_t expert);

/* Give back the reads that have not begun: they arrive as failed, without an error. */
void hb_model_withdraw(struct hobbit_model *model);

/* Copy part of a matrix stack from its file, past the cache. On failure the error is kept. */
bool hb_model_read(struct hobbit_model *model, const struct hb_matrix *matrix, void *dst, uint64_t offset,
                   size_t length);
/* Keep a sentence for hobbit_model_take_error. */
void hb_model_fail(struct hobbit_model *model, const char *reason);

#endif
