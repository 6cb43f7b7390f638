/* The (token, expert) pairs of one MoE layer and ubatch, grouped by the copy that computes them. */
#ifndef HB_ROUTING_H
#define HB_ROUTING_H

#include <stdbool.h>
#include <stdint.h>

#include "block.h"
#include "ggml.h"

/* One expert that some token uses, in one precision. Its pairs are first .. first + n_pairs - 1, in token order. */
struct hb_routed {
    int32_t expert;
    int32_t precision; /* HOBBIT_HIGH, LOW or SKIP: HIGH unless it is set */
    int32_t first, n_pairs;
    int32_t slot; /* the rest is the computation's */
    int32_t state;
    bool to_device;
};

struct hb_routing {
    struct hb_routed *experts; /* those in use, by expert number, then by precision */
    int32_t n_experts;
    int32_t n_used;   /* of each token */
    int32_t *n;       /* [n_pairs] which of its token's experts */
    int32_t *token;   /* [n_pairs] */
    int64_t n_pairs, n_tokens;
    struct hb_block memory;
};

/* `ids` is I32 [n_used, n_tokens], any strides. False when memory is short or an id is not below n_expert. */
bool hb_routing_read(struct hb_routing *routing, const struct ggml_tensor *ids, int32_t n_expert);
/* Give each expert the strongest need of its pairs; needs[token * n_used + n] is a hobbit_precision. */
void hb_routing_strongest(struct hb_routing *routing, const uint8_t *needs);
/* Give each pair its own need: an expert becomes one entry for each precision that its pairs have. */
void hb_routing_divide(struct hb_routing *routing, const uint8_t *needs);
/* The entry of that expert and precision, which must exist. */
struct hb_routed *hb_routing_find(const struct hb_routing *routing, int32_t expert, int32_t precision);

#endif
