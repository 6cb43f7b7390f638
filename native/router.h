/* A layer's router: how it comes from the input to the experts. Found in the graph that llama.cpp built. */
#ifndef HB_ROUTER_H
#define HB_ROUTER_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "model.h"
#include "segment.h"

/* Its tensors; NULL where there is none. */
struct hb_router_parts {
    const struct ggml_tensor *matrix, *bias, *bias_of_choice, *norm;
    bool sigmoid;
};

/* The router of the layer of a weight, as it was in the graph before llama.cpp divided that between devices; and the
 * numbers of its tensors that are on a device, once they were fetched. */
struct hb_seen {
    atomic_int known; /* 0: not yet; 1: somebody writes it; 2: it is */
    struct hb_router_parts parts;
    _Atomic(float *) copies;
};

/* Look at the graph around a MUL_MAT_ID, while it is whole. */
void hb_router_see(const struct ggml_tensor *op);
void hb_router_forget(struct hb_seen *seen);
/* What of the segment's router is on a device and still to be copied, for hb_router_find; or NULL. */
struct hb_seen *hb_router_to_fetch(const struct hb_segment *segment);
/* Copy it. Where the device fails, the thread never returns: so without any lock. */
void hb_router_fetch(struct hb_seen *seen);
/* The router of the segment's layer, and its input, F32 [n_embd, n_tokens] contiguous, which is still in memory because
 * the experts read it too. False where it is of another kind: the layer then predicts nothing, and nobody predicts it. */
bool hb_router_find(const struct hb_segment *segment, struct hb_router *router, const struct ggml_tensor **input);
/* x [n_embd] of a token. */
const float *hb_router_row(const struct ggml_tensor *input, int64_t token);
#endif
