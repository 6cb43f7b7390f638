#include "segment.h"

#include <string.h>

#include "ggml-backend.h"
#include "ggml-impl.h"
#include "shape.h"

const char hb_buffer_type_name[] = "Hobbit";

#define WEIGHTED "ffn_moe_weighted"

bool hb_segment_is_streamed(const struct ggml_tensor *t) {
    return t->buffer != NULL &&
           ggml_backend_buft_name(ggml_backend_buffer_get_type(t->buffer)) == hb_buffer_type_name;
}

const struct hb_weight *hb_segment_weight(const struct ggml_tensor *t) {
    return hb_segment_is_streamed(t) ? t->extra : NULL;
}

int hb_segment_find(const struct hb_segment *s, const struct ggml_tensor *t) {
    for (int i = 0; i < s->n_nodes; i++) {
        if (s->nodes[i] == t) {
            return i;
        }
    }
    return -1;
}

static int uses_within(const struct hb_segment *s, const struct ggml_tensor *t) {
    int uses = 0;
    for (int i = 0; i < s->n_nodes; i++) {
        for (int j = 0; j < GGML_MAX_SRC; j++) {
            uses += s->nodes[i]->src[j] == t;
        }
    }
    return uses;
}

/* A node escapes when the whole graph uses it more often than the segment does, itself or through a view. */
static void find_escapes(struct hb_segment *s) {
    struct ggml_cgraph part = *s->graph;
    part.nodes = s->nodes;
    part.n_nodes = s->n_nodes;
    for (int i = s->n_nodes - 1; i >= 0; i--) {
        const struct ggml_tensor *node = s->nodes[i];
        int uses = ggml_node_get_use_count(&part, i);
        s->escapes[i] = uses == 0 || uses > uses_within(s, node) || (node->flags & GGML_TENSOR_FLAG_OUTPUT) != 0;
        for (int j = i + 1; j < s->n_nodes; j++) {
            s->escapes[i] |= s->escapes[j] && s->nodes[j]->view_src == node;
        }
    }
}

/* Reads a node of the segment through a view that does not keep its rows: that node has to be complete first. */
static bool needs_complete(const struct hb_segment *s, const struct ggml_tensor *node) {
    for (int i = 0; i < GGML_MAX_SRC; i++) {
        const struct ggml_tensor *src = node->src[i];
        if (src != NULL && src->view_src != NULL && !hb_shape_is_view(node) && !hb_shape_is_row_view(src) &&
            hb_segment_find(s, src->view_src) >= 0) {
            return true;
        }
    }
    return false;
}

/* Row for row with the routing of the segment. */
static bool fits_routing(const struct hb_segment *s, const struct ggml_tensor *node) {
    return s->ids == NULL || hb_shape_is_view(node) ||
           (node->ne[1] == s->ids->ne[0] && node->ne[2] == s->ids->ne[1] &&
            (node->op != GGML_OP_ADD_ID || node->src[2] == s->ids));
}

/* The experts' outputs times the gate weights. Other factors for each expert have the same shapes, so that llama.cpp's
 * name for it decides. */
static const struct ggml_tensor *gate_weights(const struct ggml_tensor *node) {
    const struct ggml_tensor *w = node->src[1];
    bool weighs = node->op == GGML_OP_MUL && strncmp(node->name, WEIGHTED, sizeof WEIGHTED - 1) == 0;
    return weighs && w->ne[0] == 1 && w->ne[1] == node->ne[1] && w->ne[2] == node->ne[2] ? w : NULL;
}

struct hb_segment hb_segment_next(const struct ggml_cgraph *graph, int begin) {
    struct hb_segment s = {.nodes = graph->nodes + begin, .graph = graph};
    for (int i = begin; i < graph->n_nodes && s.n_nodes < HB_SEGMENT_NODES; i++) {
        const struct ggml_tensor *node = graph->nodes[i];
        if (needs_complete(&s, node)) {
            break;
        }
        const struct hb_weight *w = node->op == GGML_OP_MUL_MAT_ID ? hb_segment_weight(node->src[0]) : NULL;
        if (w != NULL) {
            bool same = s.ids == node->src[2] && s.group == w->matrix->group && s.model == w->model;
            if (s.n_nodes > 0 && !same) {
                break;
            }
            s.ids = node->src[2];
            s.group = w->matrix->group;
            s.model = w->model;
        } else if (!fits_routing(&s, node)) {
            break;
        }
        if (gate_weights(node) != NULL) {
            s.weights = gate_weights(node);
        }
        s.n_nodes++;
    }
    find_escapes(&s);
    return s;
}
