/* The state of one segment's computation, which moe.c drives; split.c has the device's part of it. */
#ifndef HB_WAVE_H
#define HB_WAVE_H

#include <stdbool.h>
#include <stdint.h>

#include "block.h"
#include "dispatch.h"
#include "executor.h"
#include "model.h"
#include "replica.h"
#include "routing.h"
#include "segment.h"

/* Of an expert within a segment. READY: in the host's memory; to be computed here, or else to be copied to the device.
 * COPYING: that is under way. THERE: its weights are on the device, that has still to compute it; SENT: it does. */
enum { HB_MISSING, HB_LOADING, HB_READY, HB_COPYING, HB_THERE, HB_SENT, HB_DONE };

struct hb_moe;

struct hb_wave {
    struct hb_moe *moe; /* moe.c's */
    const struct hb_segment *segment;
    struct hb_routing *routing;
    struct hb_replicas *replicas;
    struct hb_owners owners;
    struct hb_block *batch, *items; /* room for pointers to experts, and for what is dispatched */
    int32_t next_missing;           /* experts before it are cached, loading or done */
    int32_t loading, ready, done, skipped; /* `ready`: those to be computed here */
    struct hb_executor *device; /* NULL: no expert is there, or none is used */
    int32_t to_copy, copying, there, sent;
    double sent_work; /* see hb_costs_work */
    uint64_t ended;   /* of the device's tasks, when it was served last */
    bool in_batches;  /* their memory is there */
    uint64_t begun, cpu_ns; /* when; and the CPU's part */
    uint64_t busy_ns;       /* hb_executor_busy_ns, then */
    bool on_device;         /* something was computed there */
    uint64_t read_from, read_bytes;    /* when the reads began, and how much they are */
};

struct hb_key hb_wave_key(const struct hb_wave *wave, const struct hb_routed *expert);
/* Look an expert up in the host's memory: it becomes READY or MISSING. */
void hb_wave_look_up(struct hb_wave *wave, struct hb_routed *expert);
/* An expert is in the host's memory and pinned: whoever it is for may have it. */
void hb_wave_is_ready(struct hb_wave *wave, struct hb_routed *expert);

/* --- the device's part: `wave->device` is there --- */

/* Look all experts up, on the device and here, and decide who computes which. False when memory is short. */
bool hb_split_look_up(struct hb_wave *wave);
/* Take back what the device has finished, copy what it is to have, and send it the next batch. False when it is of no
 * use any more: the computation fails. */
bool hb_split_serve(struct hb_wave *wave);
/* There is nothing to do here: wait until that may have changed. False: as above, or nothing is under way. */
bool hb_split_wait(struct hb_wave *wave);
/* The CPU computed these experts in so long. */
void hb_split_computed_here(struct hb_wave *wave, const struct hb_routed *const *experts, int n, uint64_t ns);
/* What is read by the wave was waited for. */
void hb_split_has_read(struct hb_wave *wave);
/* After a failure nothing may be left pinned or under way; what is READY is computed here as of now. */
void hb_split_drain(struct hb_wave *wave);
/* The layer is done: what was computed here may go there, as far as it is worth it. */
void hb_split_end(struct hb_wave *wave);

#endif
