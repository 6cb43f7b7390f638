#include "routing.h"

#include <string.h>

static int32_t id_at(const struct ggml_tensor *ids, int64_t n, int64_t token) {
    return *(const int32_t *) ((const char *) ids->data + (size_t) token * ids->nb[1] + (size_t) n * ids->nb[0]);
}

static bool count_pairs(struct hb_routed *all, const struct ggml_tensor *ids, int32_t n_expert) {
    for (int32_t e = 0; e < n_expert; e++) {
        all[e] = (struct hb_routed) {.expert = e, .slot = -1};
    }
    for (int64_t t = 0; t < ids->ne[1]; t++) {
        for (int64_t n = 0; n < ids->ne[0]; n++) {
            int32_t e = id_at(ids, n, t);
            if (e < 0 || e >= n_expert) {
                return false;
            }
            all[e].n_pairs++;
        }
    }
    return true;
}

bool hb_routing_read(struct hb_routing *r, const struct ggml_tensor *ids, int32_t n_expert) {
    r->n_pairs = ids->ne[0] * ids->ne[1];
    size_t pairs_bytes = (size_t) r->n_pairs * sizeof *r->n;
    size_t experts_bytes = (size_t) n_expert * sizeof *r->experts;
    size_t cursors_bytes = (size_t) n_expert * sizeof(int32_t);
    if (!hb_block_reserve(&r->memory, 2 * hb_block_round(pairs_bytes) + hb_block_round(experts_bytes) +
                                          hb_block_round(cursors_bytes))) {
        return false;
    }
    r->n = hb_block_take(&r->memory, pairs_bytes);
    r->token = hb_block_take(&r->memory, pairs_bytes);
    r->experts = hb_block_take(&r->memory, experts_bytes);
    int32_t *cursor = hb_block_take(&r->memory, cursors_bytes); /* where the expert's next pair goes */
    if (!count_pairs(r->experts, ids, n_expert)) {
        return false;
    }
    int32_t first = 0;
    r->n_experts = 0;
    r->max_pairs = 0;
    for (int32_t e = 0; e < n_expert; e++) {
        struct hb_routed expert = r->experts[e];
        expert.first = cursor[e] = first;
        first += expert.n_pairs;
        r->max_pairs = expert.n_pairs > r->max_pairs ? expert.n_pairs : r->max_pairs;
        if (expert.n_pairs > 0) {
            r->experts[r->n_experts++] = expert; /* never ahead of e */
        }
    }
    for (int64_t t = 0; t < ids->ne[1]; t++) {
        for (int64_t n = 0; n < ids->ne[0]; n++) {
            int32_t at = cursor[id_at(ids, n, t)]++;
            r->n[at] = (int32_t) n;
            r->token[at] = (int32_t) t;
        }
    }
    return true;
}
