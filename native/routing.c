#include "routing.h"

#include "hobbit.h"

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
    r->n_used = (int32_t) ids->ne[0];
    r->n_tokens = ids->ne[1];
    r->n_pairs = ids->ne[0] * ids->ne[1];
    size_t pairs_bytes = (size_t) r->n_pairs * sizeof *r->n;
    size_t experts_bytes = (size_t) n_expert * sizeof *r->experts;
    size_t cursors_bytes = (size_t) n_expert * sizeof(int32_t);
    /* Room for an entry of each precision, and for a copy of the pairs and entries while they are divided. */
    if (!hb_block_reserve(&r->memory, 4 * hb_block_round(pairs_bytes) + 4 * hb_block_round(3 * experts_bytes) +
                                          hb_block_round(cursors_bytes))) {
        return false;
    }
    r->n = hb_block_take(&r->memory, pairs_bytes);
    r->token = hb_block_take(&r->memory, pairs_bytes);
    r->experts = hb_block_take(&r->memory, 3 * experts_bytes);
    int32_t *cursor = hb_block_take(&r->memory, cursors_bytes); /* where the expert's next pair goes */
    if (!count_pairs(r->experts, ids, n_expert)) {
        return false;
    }
    int32_t first = 0;
    r->n_experts = 0;
    for (int32_t e = 0; e < n_expert; e++) {
        struct hb_routed expert = r->experts[e];
        expert.first = cursor[e] = first;
        first += expert.n_pairs;
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

static int32_t need_of(const struct hb_routing *r, const uint8_t *needs, int32_t pair) {
    return needs[(int64_t) r->token[pair] * r->n_used + r->n[pair]];
}

void hb_routing_strongest(struct hb_routing *r, const uint8_t *needs) {
    for (int32_t e = 0; e < r->n_experts; e++) {
        struct hb_routed *expert = &r->experts[e];
        expert->precision = HOBBIT_SKIP;
        for (int32_t i = expert->first; i < expert->first + expert->n_pairs; i++) {
            int32_t need = need_of(r, needs, i);
            expert->precision = need < expert->precision ? need : expert->precision;
        }
    }
}

void hb_routing_divide(struct hb_routing *r, const uint8_t *needs) {
    int32_t n_whole = r->n_experts, at = 0;
    struct hb_routed *entries = hb_block_take(&r->memory, 3 * (size_t) n_whole * sizeof *entries);
    int32_t *n = hb_block_take(&r->memory, (size_t) r->n_pairs * sizeof *n);
    int32_t *token = hb_block_take(&r->memory, (size_t) r->n_pairs * sizeof *token);
    r->n_experts = 0;
    for (int32_t e = 0; e < n_whole; e++) {
        struct hb_routed whole = r->experts[e];
        for (int32_t precision = HOBBIT_HIGH; precision <= HOBBIT_SKIP; precision++) {
            struct hb_routed part = whole;
            part.precision = precision;
            part.first = at;
            for (int32_t i = whole.first; i < whole.first + whole.n_pairs; i++) {
                if (need_of(r, needs, i) == precision) {
                    n[at] = r->n[i];
                    token[at++] = r->token[i];
                }
            }
            part.n_pairs = at - part.first;
            if (part.n_pairs > 0) {
                entries[r->n_experts++] = part;
            }
        }
    }
    r->experts = entries;
    r->n = n;
    r->token = token;
}

struct hb_routed *hb_routing_find(const struct hb_routing *r, int32_t expert, int32_t precision) {
    int32_t low = 0, high = r->n_experts - 1;
    while (low < high) {
        int32_t middle = low + (high - low) / 2;
        const struct hb_routed *e = &r->experts[middle];
        if (e->expert < expert || (e->expert == expert && e->precision < precision)) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return &r->experts[low];
}
