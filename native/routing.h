/* The (token, expert) pairs of one MoE layer and ubatch, grouped by expert. */
#ifndef HB_ROUTING_H
#define HB_ROUTING_H

#include <stdbool.h>
#include <stdint.h>

#include "block.h"
#include "ggml.h"

/* One expert that some token uses. Its pairs are first .. first + n_pairs - 1, in token order. */
struct hb_routed {
    int32_t expert;
    int32_t first, n_pairs;
    int32_t slot; /* the rest is the computation's */
    int32_t state;
};

struct hb_routing {
    struct hb_routed *experts; /* those in use, by expert number */
    int32_t n_experts;
    int32_t max_pairs; /* of one expert */
    int32_t *n;        /* [n_pairs] which of its token's experts */
    int32_t *token;    /* [n_pairs] */
    int64_t n_pairs;
    struct hb_block memory;
};

/* `ids` is I32 [n_used, n_tokens], any strides. False when memory is short or an id is not below n_expert. */
bool hb_routing_read(struct hb_routing *routing, const struct ggml_tensor *ids, int32_t n_expert);

#endif
