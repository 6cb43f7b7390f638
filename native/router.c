#include "router.h"

#include <math.h>
#include <string.h>

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

static const struct ggml_tensor *root(const struct ggml_tensor *t) {
    return t->view_src != NULL ? t->view_src : t;
}

/* Else its memory may hold something else by now. */
static bool is_experts_input(const struct hb_segment *s, const struct ggml_tensor *x) {
    for (int i = 0; i < s->n_nodes; i++) {
        if (s->nodes[i]->op == GGML_OP_MUL_MAT_ID && root(s->nodes[i]->src[1]) == root(x)) {
            return true;
        }
    }
    return false;
}

bool hb_router_find(const struct hb_segment *s, struct hb_router *router) {
    const struct ggml_tensor *probs = find_probs(s->weights);
    const struct ggml_tensor *logits = probs != NULL ? probs->src[0] : NULL;
    if (logits == NULL || logits->op != GGML_OP_MUL_MAT ||
        logits->src[0]->type != GGML_TYPE_F32 || logits->src[1]->type != GGML_TYPE_F32 ||
        !is_experts_input(s, logits->src[1])) {
        return false;
    }
    *router = (struct hb_router) {logits->src[0], logits->src[1]};
    return true;
}

static const float *row(const struct ggml_tensor *t, int64_t i) {
    return (const float *) ((const char *) t->data + (size_t) i * t->nb[1]);
}

const float *hb_router_input(const struct hb_router *router, int64_t token) {
    return row(router->input, token);
}

void hb_router_logits(const struct ggml_tensor *matrix, const float *x, float *z) {
    int64_t n_embd = matrix->ne[0], n_expert = matrix->ne[1];
    for (int64_t e = 0; e < n_expert; e++) {
        const float *w = row(matrix, e);
        z[e] = 0;
        for (int64_t i = 0; i < n_embd; i++) {
            z[e] += w[i] * x[i];
        }
    }
}

float hb_router_softmax(const float *z, int64_t n, float *p) {
    float most = -INFINITY, least = INFINITY, sum = 0;
    for (int64_t e = 0; e < n; e++) {
        most = z[e] > most ? z[e] : most;
        least = z[e] < least ? z[e] : least;
    }
    for (int64_t e = 0; e < n; e++) {
        sum += p[e] = expf(z[e] - most);
    }
    for (int64_t e = 0; e < n; e++) {
        p[e] /= sum;
    }
    return most - least;
}
