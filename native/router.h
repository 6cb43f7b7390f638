/* The router of a layer, computed again: llama.cpp's own logits are gone when the experts are computed.
 *
 *   z = W x        p = softmax(z), over all experts
 *
 * For routers that are a softmax of a linear layer, on the input that the experts have too. The sums are not in
 * llama.cpp's order: z is equal up to rounding. */
#ifndef HB_ROUTER_H
#define HB_ROUTER_H

#include <stdbool.h>
#include <stdint.h>

#include "segment.h"

struct hb_router {
    const struct ggml_tensor *matrix; /* W: F32 [n_embd, n_expert] */
    const struct ggml_tensor *input;  /* x: F32 [n_embd, n_tokens], still there while the segment is not computed */
};

/* The router whose softmax the segment's gate weights are taken from; false where there is no such router. */
bool hb_router_find(const struct hb_segment *segment, struct hb_router *router);
/* x of a token. */
const float *hb_router_input(const struct hb_router *router, int64_t token);
/* z[n_expert] of any x[n_embd]. */
void hb_router_logits(const struct ggml_tensor *matrix, const float *x, float *z);
/* p[n] of z[n]; returns max z - min z. */
float hb_router_softmax(const float *z, int64_t n, float *p);

#endif
