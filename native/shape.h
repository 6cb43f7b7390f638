/* Which operations belong to the expert part of a graph, and how their operands are indexed. Pure functions of
 * tensors; shapes are ggml's (ne[0] is the row). The rows of a "pair tensor" [d, n_used, n_tokens] belong to one
 * (token, expert) pair each. */
#ifndef HB_SHAPE_H
#define HB_SHAPE_H

#include <stdbool.h>

#include "ggml.h"

/* Whether the weights of this MUL_MAT_ID are streamed. */
typedef bool hb_is_streamed(const struct ggml_tensor *weights);

/* VIEW and its kin compute nothing. */
bool hb_shape_is_view(const struct ggml_tensor *t);
/* Row-wise on pair tensors and fed by a MUL_MAT_ID of ours (or one itself). */
bool hb_shape_supports(const struct ggml_tensor *op, hb_is_streamed *is_streamed);
/* A view of whole rows of a pair tensor that keeps the pair dimensions, as the halves of a fused gate_up do. */
bool hb_shape_is_row_view(const struct ggml_tensor *t);
/* The row of a pair tensor (broadcast dimensions allowed) for the token's n-th expert. */
char *hb_shape_row(const struct ggml_tensor *t, const char *data, int64_t n, int64_t token);

#endif
