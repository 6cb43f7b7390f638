/* A routing trace: which experts the router chose, layer by layer in the order they were computed, in a file. Replaying
 * it, a simulator sees what the cache, the policies and the predictors of that run saw. docs/trace.md has the format
 * byte by byte. This file knows numbers only.
 *
 * Writing is buffered and nothing is allocated after hb_trace_create. An error stays: what follows is not written, and
 * each call says so. Not thread-safe: the model's lock covers it. */
#ifndef HB_TRACE_H
#define HB_TRACE_H

#include <stdbool.h>
#include <stdint.h>

#include "hobbit.h"

struct hb_trace;

struct hb_trace_group {
    int32_t layer, n_expert, pool;
    uint64_t expert_bytes[HOBBIT_PRECISIONS]; /* of one copy, by precision; 0: there is none */
    uint64_t slot_bytes[HOBBIT_PRECISIONS];   /* expert_bytes plus padding: what it needs of a slot */
};

/* What was recorded: it heads the file. */
struct hb_trace_head {
    const char *note; /* the caller's, UTF-8 */
    uint32_t flags;   /* enum hobbit_trace_flags */
    const struct hobbit_pool *pools;
    const struct hb_trace_group *groups;
    int32_t n_pools, n_groups;
};

/* The routing of one layer and ubatch; pair i is row i / n_used. */
struct hb_trace_layer {
    int32_t group, n_used;
    int64_t n_rows;
    const int32_t *experts; /* [n_rows * n_used], in the router's order */
    const float *weights;   /* [n_rows * n_used], the gate weights; NULL: not seen */
    const uint16_t *probs;  /* [n_rows * n_expert], the softmax over all experts as round(p * 65535); NULL: not known */
    const int32_t *sequences, *tokens; /* [n_rows], of each row; both NULL: see hb_trace_layer */
};

/* Makes the file, or empties it. NULL with errno set when that cannot be done; ENOMEM when memory is short. */
struct hb_trace *hb_trace_create(const char *path, const struct hb_trace_head *head);
/* Finish the file. False with errno set when not everything could be written. NULL is fine. */
bool hb_trace_close(struct hb_trace *trace);
uint32_t hb_trace_flags(const struct hb_trace *trace);

/* Each writes one event. False with errno set when the file cannot be written. */

/* Without sequences and tokens the rows get consecutive numbers in the sequence that began last: those of a ubatch
 * follow those of the one before, and a layer that computes fewer rows (the last one, where few logits are asked for)
 * has the last ones. A ubatch ends where a group comes that is not after the one before; a group that comes twice in
 * a row, in a model with several, is one layer computed in two pieces. */
bool hb_trace_layer(struct hb_trace *trace, const struct hb_trace_layer *layer);
/* A sequence begins: what was remembered of the routing before is void, and its tokens are counted from 0. */
bool hb_trace_sequence(struct hb_trace *trace, int32_t sequence);
/* These experts were predicted to be needed next in the group, with these probabilities. */
bool hb_trace_predicted(struct hb_trace *trace, int32_t group, int32_t n, const int32_t *experts,
                        const float *probabilities);
/* The cache was emptied, but for copies that are kept. */
bool hb_trace_forget(struct hb_trace *trace);

#endif
