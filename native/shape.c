#include "shape.h"

#define SEARCH_DEPTH 8

bool hb_shape_is_view(const struct ggml_tensor *t) {
    return t->op == GGML_OP_VIEW || t->op == GGML_OP_RESHAPE || t->op == GGML_OP_PERMUTE ||
           t->op == GGML_OP_TRANSPOSE || t->op == GGML_OP_NONE;
}

bool hb_shape_is_row_view(const struct ggml_tensor *t) {
    const struct ggml_tensor *of = t->src[0];
    return t->op == GGML_OP_VIEW && of != NULL && of->view_src == NULL && t->view_src == of && t->type == of->type &&
           t->nb[0] == of->nb[0] && t->ne[1] == of->ne[1] && t->ne[2] == of->ne[2] && t->ne[3] == 1 &&
           (t->ne[1] == 1 || t->nb[1] == of->nb[1]) && (t->ne[2] == 1 || t->nb[2] == of->nb[2]) &&
           t->view_offs + (size_t) t->ne[0] * t->nb[0] <= of->nb[1];
}

char *hb_shape_row(const struct ggml_tensor *t, const char *data, int64_t n, int64_t token) {
    size_t offset = (size_t) (t->ne[1] == 1 ? 0 : n) * t->nb[1] + (size_t) (t->ne[2] == 1 ? 0 : token) * t->nb[2];
    return (char *) (uintptr_t) data + offset;
}

static bool is_row_wise(const struct ggml_tensor *op) {
    switch (op->op) {
        case GGML_OP_GLU:
        case GGML_OP_UNARY:
        case GGML_OP_SQR:
        case GGML_OP_SCALE:
        case GGML_OP_CLAMP:
        case GGML_OP_MUL:
        case GGML_OP_ADD_ID:
            return op->view_src == NULL && op->type == GGML_TYPE_F32 && ggml_is_contiguous(op);
        default:
            return false;
    }
}

/* The MUL_MAT_ID of ours that feeds this tensor through operations we support, or NULL. */
static const struct ggml_tensor *feeder(const struct ggml_tensor *t, hb_is_streamed *is_streamed, int depth) {
    if (t == NULL || depth == 0) {
        return NULL;
    }
    if (t->op == GGML_OP_MUL_MAT_ID) {
        return is_streamed(t->src[0]) ? t : NULL;
    }
    if (hb_shape_is_row_view(t)) {
        return feeder(t->src[0], is_streamed, depth - 1);
    }
    if (!is_row_wise(t)) {
        return NULL;
    }
    const struct ggml_tensor *found = feeder(t->src[0], is_streamed, depth - 1);
    return found != NULL || t->op == GGML_OP_ADD_ID ? found : feeder(t->src[1], is_streamed, depth - 1);
}

/* An operand that is gathered row by row, or used as it is. */
static bool is_pair_operand(const struct ggml_tensor *t, int64_t n_used, int64_t n_tokens) {
    return t->type == GGML_TYPE_F32 && t->nb[0] == sizeof(float) && t->ne[3] == 1 &&
           (t->ne[1] == 1 || t->ne[1] == n_used) && (t->ne[2] == 1 || t->ne[2] == n_tokens);
}

bool hb_shape_supports(const struct ggml_tensor *op, hb_is_streamed *is_streamed) {
    if (op->op == GGML_OP_NONE) {
        return is_streamed(op); /* the scheduler asks who may hold a weight */
    }
    const struct ggml_tensor *mmid = feeder(op, is_streamed, SEARCH_DEPTH);
    if (mmid == NULL || hb_shape_is_view(op)) {
        return false;
    }
    int64_t n_used = mmid->ne[1], n_tokens = mmid->ne[2];
    if (op->ne[1] != n_used || op->ne[2] != n_tokens || op->ne[3] != 1) {
        return false;
    }
    if (op->op == GGML_OP_MUL_MAT_ID) {
        return op->src[2]->type == GGML_TYPE_I32 && is_pair_operand(op->src[1], n_used, n_tokens);
    }
    if (op->op == GGML_OP_ADD_ID) {
        return op->src[2] == mmid->src[2] && is_pair_operand(op->src[0], n_used, n_tokens);
    }
    for (int i = 0; i < GGML_MAX_SRC && op->src[i] != NULL; i++) {
        if (!is_pair_operand(op->src[i], n_used, n_tokens)) {
            return false;
        }
    }
    return true;
}
