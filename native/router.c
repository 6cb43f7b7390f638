#include "router.h"


/* Between the router's product and the ids there are few nodes: biases, softmax or sigmoid, top-k, views. */
#define SEARCH_DEPTH 16

static const float *vector(const struct ggml_tensor *t, int64_t n) {
    bool good = t != NULL && t->type == GGML_TYPE_F32 && ggml_is_contiguous(t) && ggml_nelements(t) == n &&
                t->op == GGML_OP_NONE;
    return good ? t->data : NULL;
}

static bool is_router(const struct ggml_tensor *t) {
    return t->op == GGML_OP_MUL_MAT && t->src[0]->type == GGML_TYPE_F32 && t->src[1]->type == GGML_TYPE_F32 &&
           ggml_is_contiguous(t->src[0]) && t->src[0]->op == GGML_OP_NONE;
}

/* One step from the ids towards the router, noting what it does to the scores. False: not understood. */
static bool take_node(struct hb_router *router, const struct ggml_tensor *t, int64_t n_expert) {
    bool sigmoid = t->op == GGML_OP_UNARY && ggml_get_unary_op(t) == GGML_UNARY_OP_SIGMOID;
    if (t->op == GGML_OP_SOFT_MAX || sigmoid) {
        router->sigmoid |= sigmoid;
        router->bias_of_choice = router->bias;
        router->bias = NULL;
        return true;
    }
    if (t->op == GGML_OP_ADD && router->bias == NULL) {
        router->bias = vector(t->src[1], n_expert);
        return router->bias != NULL;
    }
    return t->op == GGML_OP_VIEW || t->op == GGML_OP_RESHAPE || t->op == GGML_OP_ARGSORT || t->op == GGML_OP_TOP_K;
}

/* What the input's row was multiplied with after it was normalised, or NULL. */
static const float *norm_of(const struct ggml_tensor *input) {
    bool normal = input->op == GGML_OP_MUL && input->src[0]->op == GGML_OP_RMS_NORM;
    return normal ? vector(input->src[1], input->ne[0]) : NULL;
}

static const struct ggml_tensor *root(const struct ggml_tensor *t) {
    return t->view_src != NULL ? t->view_src : t;
}

/* Else its memory may hold something else by now. */
static bool feeds_experts(const struct hb_segment *s, const struct ggml_tensor *input) {
    for (int i = 0; i < s->n_nodes; i++) {
        if (s->nodes[i]->op == GGML_OP_MUL_MAT_ID && root(s->nodes[i]->src[1]) == root(input)) {
            return true;
        }
    }
    return false;
}

bool hb_router_find(const struct hb_segment *s, struct hb_router *router, const struct ggml_tensor **input) {
    int64_t n_expert = hb_model_catalog(s->model)->groups[s->group].n_expert;
    const struct ggml_tensor *t = s->ids;
    *router = (struct hb_router) {.n_used = (int32_t) s->ids->ne[0]};
    for (int depth = 0; t != NULL && !is_router(t); t = t->src[0]) {
        if (++depth > SEARCH_DEPTH || !take_node(router, t, n_expert)) {
            return false;
        }
    }
    if (t == NULL || t->src[0]->ne[1] != n_expert || !ggml_is_contiguous(t->src[1]) || !feeds_experts(s, t->src[1])) {
        return false;
    }
    *input = t->src[1];
    router->matrix = t->src[0]->data;
    router->norm = norm_of(t->src[1]);
    router->n_embd = (int32_t) t->src[0]->ne[0];
    router->n_expert = (int32_t) n_expert;
    return true;
}

const float *hb_router_row(const struct ggml_tensor *input, int64_t token) {
    return (const float *) ((const char *) input->data + (size_t) token * input->nb[1]);
}
