#include "substitute.h"

#include <math.h>

#include "model.h"
#include "router.h"
#include "shape.h"

static int32_t best(const float *z, int64_t n) {
    int32_t at = 0;
    for (int32_t e = 1; e < n; e++) {
        at = z[e] > z[at] ? e : at;
    }
    return at;
}

static float range(const float *z, int64_t n) {
    float most = z[0], least = z[0];
    for (int64_t e = 1; e < n; e++) {
        most = z[e] > most ? z[e] : most;
        least = z[e] < least ? z[e] : least;
    }
    return most - least;
}

/* The selected experts' gate weights, scaled as the old ones were: to the same sum, or not at all. */
static void replace(const struct hb_segment *s, int64_t token, const float *p, const int32_t *chosen) {
    int32_t *ids[512];
    float *weights[512], old_sum = 0, old_p = 0, new_p = 0;
    int64_t n_used = s->ids->ne[0];
    for (int64_t n = 0; n < n_used; n++) {
        ids[n] = (int32_t *) ((char *) s->ids->data + (size_t) token * s->ids->nb[1] + (size_t) n * s->ids->nb[0]);
        weights[n] = (float *) (void *) hb_shape_row(s->weights, s->weights->data, n, token);
        old_sum += *weights[n];
        old_p += p[*ids[n]];
        new_p += p[chosen[n]];
    }
    bool plain = fabsf(old_sum - old_p) < 1e-3f; /* the weights are p itself */
    for (int64_t n = 0; n < n_used; n++) {
        *ids[n] = chosen[n];
        *weights[n] = plain ? p[chosen[n]] : p[chosen[n]] / new_p * old_sum;
    }
}

bool hb_substitute(struct hb_block *memory, const struct hb_segment *s) {
    struct hb_router router;
    const struct ggml_tensor *input;
    float lambda = hb_model_rule(s->model)->substitute;
    if (lambda <= 0) {
        return true;
    }
    if (!hb_router_find(s, &router, &input) || router.sigmoid || router.bias_of_choice != NULL ||
        s->weights == NULL || s->ids->ne[0] > 512) {
        hb_model_fail(s->model, "cache-aware substitution needs a router that is a softmax of a linear layer");
        return false;
    }
    size_t n_expert = (size_t) router.n_expert;
    if (!hb_block_reserve(memory, 4 * hb_block_round(n_expert * sizeof(float)))) {
        hb_model_fail(s->model, "memory is short");
        return false;
    }
    float *z = hb_block_take(memory, n_expert * sizeof(float));
    float *p = hb_block_take(memory, n_expert * sizeof(float));
    float *choice = hb_block_take(memory, n_expert * sizeof(float));
    int32_t *chosen = hb_block_take(memory, n_expert * sizeof(int32_t));
    for (int64_t token = 0; token < s->ids->ne[1]; token++) {
        hb_router_logits(&router, hb_router_row(input, token), z);
        float bonus = lambda * hb_model_mean_range(s->model, s->group, range(z, (int64_t) n_expert));
        hb_router_probs(&router, z, p, choice);
        chosen[0] = best(z, (int64_t) n_expert);
        for (size_t e = 0; e < n_expert; e++) {
            z[e] += hb_model_has(s->model, (struct hb_key) {s->group, (int32_t) e, HOBBIT_HIGH}) ? bonus : 0;
        }
        z[chosen[0]] = -INFINITY;
        for (int64_t n = 1; n < s->ids->ne[0]; n++) {
            chosen[n] = best(z, (int64_t) n_expert);
            z[chosen[n]] = -INFINITY;
        }
        replace(s, token, p, chosen);
    }
    return true;
}
