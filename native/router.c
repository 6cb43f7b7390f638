#include "router.h"

#include <stdlib.h>

#include "ggml-backend.h"

/* Between the router's product and the ids there are few nodes: biases, softmax or sigmoid, top-k, views. */
#define SEARCH_DEPTH 16

static const struct ggml_tensor *vector(const struct ggml_tensor *t, int64_t n) {
    bool good = t != NULL && t->type == GGML_TYPE_F32 && ggml_is_contiguous(t) && ggml_nelements(t) == n &&
                t->op == GGML_OP_NONE;
    return good ? t : NULL;
}

static bool is_router(const struct ggml_tensor *t) {
    return t->op == GGML_OP_MUL_MAT && t->src[0]->type == GGML_TYPE_F32 && t->src[1]->type == GGML_TYPE_F32 &&
           ggml_is_contiguous(t->src[0]) && t->src[0]->op == GGML_OP_NONE;
}

/* One step from the ids towards the router, noting what it does to the scores. False: not understood. */
static bool take_node(struct hb_router_parts *parts, const struct ggml_tensor *t, int64_t n_expert) {
    bool sigmoid = t->op == GGML_OP_UNARY && ggml_get_unary_op(t) == GGML_UNARY_OP_SIGMOID;
    if (t->op == GGML_OP_SOFT_MAX || sigmoid) {
        parts->sigmoid |= sigmoid;
        parts->bias_of_choice = parts->bias;
        parts->bias = NULL;
        return true;
    }
    if (t->op == GGML_OP_ADD && parts->bias == NULL) {
        parts->bias = vector(t->src[1], n_expert);
        return parts->bias != NULL;
    }
    return t->op == GGML_OP_VIEW || t->op == GGML_OP_RESHAPE || t->op == GGML_OP_ARGSORT || t->op == GGML_OP_TOP_K;
}

/* What the input's row was multiplied with after it was normalised, or NULL. */
static const struct ggml_tensor *norm_of(const struct ggml_tensor *input) {
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

/* From the ids: the parts, and what the router gets. */
static bool walk(const struct ggml_tensor *ids, int64_t n_expert, struct hb_router_parts *parts,
                 const struct ggml_tensor **input) {
    const struct ggml_tensor *t = ids;
    *parts = (struct hb_router_parts) {0};
    for (int depth = 0; t != NULL && !is_router(t); t = t->src[0]) {
        if (++depth > SEARCH_DEPTH || !take_node(parts, t, n_expert)) {
            return false;
        }
    }
    if (t == NULL || t->src[0]->ne[1] != n_expert || !ggml_is_contiguous(t->src[1])) {
        return false;
    }
    parts->matrix = t->src[0];
    parts->norm = norm_of(t->src[1]);
    *input = t->src[1];
    return true;
}

void hb_router_see(const struct ggml_tensor *op) {
    const struct hb_weight *w = hb_segment_weight(op->src[0]);
    struct hb_router_parts parts;
    const struct ggml_tensor *input;
    int not_yet = 0;
    if (w != NULL && w->seen != NULL && atomic_load(&w->seen->known) == 0 &&
        walk(op->src[2], op->src[0]->ne[2], &parts, &input) && root(op->src[1]) == root(input) &&
        atomic_compare_exchange_strong(&w->seen->known, &not_yet, 1)) { /* several contexts ask at a time */
        w->seen->parts = parts;
        atomic_store(&w->seen->known, 2);
    }
}

void hb_router_forget(struct hb_seen *seen) {
    free(atomic_exchange(&seen->copies, NULL));
}

/* A MUL_MAT_ID that gets what the router gets, as was seen; or NULL. */
static const struct ggml_tensor *seen_node(const struct hb_segment *s, struct hb_seen **seen) {
    for (int i = 0; i < s->n_nodes; i++) {
        const struct ggml_tensor *node = s->nodes[i];
        const struct hb_weight *w = node->op == GGML_OP_MUL_MAT_ID ? hb_segment_weight(node->src[0]) : NULL;
        if (w != NULL && w->seen != NULL && atomic_load(&w->seen->known) == 2) {
            *seen = w->seen;
            return node;
        }
    }
    return NULL;
}

static bool is_here(const struct ggml_tensor *t) {
    return t == NULL || t->buffer == NULL || ggml_backend_buffer_is_host(t->buffer);
}

#define PARTS 4

static size_t parts_of(const struct hb_router_parts *parts, const struct ggml_tensor *all[PARTS]) {
    const struct ggml_tensor *in_order[PARTS] = {parts->matrix, parts->bias, parts->bias_of_choice, parts->norm};
    size_t elsewhere = 0;
    for (int i = 0; i < PARTS; i++) {
        all[i] = in_order[i];
        elsewhere += is_here(all[i]) ? 0 : ggml_nbytes(all[i]);
    }
    return elsewhere;
}

struct hb_seen *hb_router_to_fetch(const struct hb_segment *s) {
    int64_t n_expert = hb_model_catalog(s->model)->groups[s->group].n_expert;
    const struct ggml_tensor *input, *all[PARTS];
    struct hb_router_parts parts;
    struct hb_seen *seen = NULL;
    /* What was seen is looked at only where it is needed: the graph that had it may be gone otherwise. */
    bool missing = seen_node(s, &seen) != NULL && atomic_load(&seen->copies) == NULL &&
                   !walk(s->ids, n_expert, &parts, &input);
    return missing && parts_of(&seen->parts, all) > 0 ? seen : NULL;
}

void hb_router_fetch(struct hb_seen *seen) {
    const struct ggml_tensor *all[PARTS];
    float *copies = malloc(parts_of(&seen->parts, all)), *at = copies, *none = NULL;
    for (int i = 0; copies != NULL && i < PARTS; i++) {
        if (!is_here(all[i])) {
            ggml_backend_tensor_get(all[i], at, 0, ggml_nbytes(all[i]));
            at += ggml_nelements(all[i]);
        }
    }
    if (copies != NULL && !atomic_compare_exchange_strong(&seen->copies, &none, copies)) {
        free(copies); /* another context's thread was quicker */
    }
}

/* Its numbers; where they are on a device, their copy at `at`, which then begins behind them. */
static const float *numbers(const struct ggml_tensor *t, const float **at) {
    if (is_here(t)) {
        return t != NULL ? t->data : NULL;
    }
    const float *found = *at;
    *at += ggml_nelements(t);
    return found;
}

static bool set_numbers(struct hb_router *router, const struct hb_router_parts *parts, struct hb_seen *seen) {
    const struct ggml_tensor *all[PARTS];
    const float *at = seen != NULL ? atomic_load(&seen->copies) : NULL;
    if (parts_of(parts, all) > 0 && at == NULL) {
        return false;
    }
    router->matrix = numbers(parts->matrix, &at);
    router->bias = numbers(parts->bias, &at);
    router->bias_of_choice = numbers(parts->bias_of_choice, &at);
    router->norm = numbers(parts->norm, &at);
    return true;
}

bool hb_router_find(const struct hb_segment *s, struct hb_router *router, const struct ggml_tensor **input) {
    int64_t n_expert = hb_model_catalog(s->model)->groups[s->group].n_expert;
    struct hb_router_parts parts;
    struct hb_seen *seen = NULL;
    if (walk(s->ids, n_expert, &parts, input)) {
        if (!feeds_experts(s, *input)) {
            return false;
        }
    } else { /* another device chooses, and what is here is a copy of its choice */
        const struct ggml_tensor *node = seen_node(s, &seen);
        if (node == NULL || node->src[1]->type != GGML_TYPE_F32 || !ggml_is_contiguous(node->src[1])) {
            return false;
        }
        parts = seen->parts;
        *input = node->src[1];
    }
    *router = (struct hb_router) {
        .sigmoid = parts.sigmoid,
        .n_embd = (int32_t) parts.matrix->ne[0],
        .n_expert = (int32_t) n_expert,
        .n_used = (int32_t) s->ids->ne[0],
    };
    return set_numbers(router, &parts, seen);
}

const float *hb_router_row(const struct ggml_tensor *input, int64_t token) {
    return (const float *) ((const char *) input->data + (size_t) token * input->nb[1]);
}
