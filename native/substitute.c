#include "substitute.h"

#include <math.h>
#include <string.h>

#include "model.h"
#include "shape.h"

#define SEARCH_DEPTH 12
#define PROBS "ffn_moe_probs"

/* The softmax over all experts that the gate weights are taken from, by way of first operands. */
static const struct ggml_tensor *find_probs(const struct ggml_tensor *weights) {
    for (int i = 0; weights != NULL && i < SEARCH_DEPTH; i++) {
        if (weights->op == GGML_OP_SOFT_MAX && strncmp(weights->name, PROBS, sizeof PROBS - 1) == 0) {
            return weights;
        }
        weights = weights->src[0];
    }
    return NULL;
}

struct router {
    const struct ggml_tensor *matrix; /* F32 [n_embd, n_expert] */
    const struct ggml_tensor *input;  /* F32 [n_embd, n_tokens]: the experts' too, so that it is still there */
};

static bool find_router(const struct hb_segment *s, struct router *router) {
    const struct ggml_tensor *probs = find_probs(s->weights);
    const struct ggml_tensor *logits = probs != NULL ? probs->src[0] : NULL;
    if (logits == NULL || logits->op != GGML_OP_MUL_MAT ||
        logits->src[0]->type != GGML_TYPE_F32 || logits->src[1]->type != GGML_TYPE_F32) {
        return false;
    }
    *router = (struct router) {logits->src[0], logits->src[1]};
    return true;
}

static const float *row(const struct ggml_tensor *t, int64_t i) {
    return (const float *) ((const char *) t->data + (size_t) i * t->nb[1]);
}

/* Writes z and the softmax of it; returns max z - min z. */
static float route(const struct router *router, int64_t token, float *z, float *p) {
    int64_t n_embd = router->matrix->ne[0], n_expert = router->matrix->ne[1];
    const float *x = row(router->input, token);
    float most = -INFINITY, least = INFINITY;
    for (int64_t e = 0; e < n_expert; e++) {
        const float *w = row(router->matrix, e);
        z[e] = 0;
        for (int64_t i = 0; i < n_embd; i++) {
            z[e] += w[i] * x[i];
        }
        most = z[e] > most ? z[e] : most;
        least = z[e] < least ? z[e] : least;
    }
    float sum = 0;
    for (int64_t e = 0; e < n_expert; e++) {
        sum += p[e] = expf(z[e] - most);
    }
    for (int64_t e = 0; e < n_expert; e++) {
        p[e] /= sum;
    }
    return most - least;
}

static int32_t best(const float *z, int64_t n) {
    int32_t at = 0;
    for (int32_t e = 1; e < n; e++) {
        at = z[e] > z[at] ? e : at;
    }
    return at;
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
    struct router router;
    float lambda = hb_model_rule(s->model)->substitute;
    if (lambda <= 0) {
        return true;
    }
    if (!find_router(s, &router) || s->ids->ne[0] > 512) {
        hb_model_fail(s->model, "cache-aware substitution needs a router that is a softmax of a linear layer");
        return false;
    }
    size_t n_expert = (size_t) router.matrix->ne[1];
    if (!hb_block_reserve(memory, 3 * hb_block_round(n_expert * sizeof(float)))) {
        hb_model_fail(s->model, "memory is short");
        return false;
    }
    float *z = hb_block_take(memory, n_expert * sizeof(float));
    float *p = hb_block_take(memory, n_expert * sizeof(float));
    int32_t *chosen = hb_block_take(memory, n_expert * sizeof(int32_t));
    for (int64_t token = 0; token < s->ids->ne[1]; token++) {
        float bonus = lambda * hb_model_mean_range(s->model, s->group, route(&router, token, z, p));
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
