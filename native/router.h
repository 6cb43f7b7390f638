/* A layer's router: how it comes from the input to the experts. Found in the graph that llama.cpp built. */
#ifndef HB_ROUTER_H
#define HB_ROUTER_H

#include <stdbool.h>
#include <stdint.h>

#include "model.h"
#include "segment.h"

/* The router of the segment's layer, and its input, F32 [n_embd, n_tokens], which is still in memory because the
 * experts read it too. False where it is of another kind: the layer then predicts nothing, and nobody predicts it. */
bool hb_router_find(const struct hb_segment *segment, struct hb_router *router, const struct ggml_tensor **input);
/* x [n_embd] of a token. */
const float *hb_router_row(const struct ggml_tensor *input, int64_t token);
#endif
