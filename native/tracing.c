#include "tracing.h"

#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "model.h"
#include "router.h"
#include "shape.h"

#define PROB_ONE 65535.0f

/* What the segment has, and what is written of it, in work space. */
struct rows {
    int64_t n_rows, n_pairs, n_expert;
    int32_t *experts;
    float *weights;  /* NULL: not seen */
    uint16_t *probs; /* NULL: not wanted, or not known */
    float *z, *p, *choice;
};

static bool reserve(struct rows *r, struct hb_block *memory, bool weights, bool probs) {
    size_t pairs = (size_t) r->n_pairs, experts = (size_t) r->n_expert, all = (size_t) r->n_rows * experts;
    if (!hb_block_reserve(memory, hb_block_round(pairs * sizeof *r->experts) +
                                      hb_block_round(pairs * sizeof *r->weights) +
                                      (probs ? hb_block_round(all * sizeof *r->probs) : 0) +
                                      3 * hb_block_round(experts * sizeof *r->p))) {
        return false;
    }
    r->experts = hb_block_take(memory, pairs * sizeof *r->experts);
    r->weights = weights ? hb_block_take(memory, pairs * sizeof *r->weights) : NULL;
    r->probs = probs ? hb_block_take(memory, all * sizeof *r->probs) : NULL;
    r->z = hb_block_take(memory, experts * sizeof *r->z);
    r->p = hb_block_take(memory, experts * sizeof *r->p);
    r->choice = hb_block_take(memory, experts * sizeof *r->choice);
    return true;
}

static void read_pairs(struct rows *r, const struct hb_segment *s) {
    for (int64_t i = 0; i < r->n_pairs; i++) {
        int64_t n = i % s->ids->ne[0], row = i / s->ids->ne[0];
        r->experts[i] = *(const int32_t *) ((const char *) s->ids->data + (size_t) row * s->ids->nb[1] +
                                            (size_t) n * s->ids->nb[0]);
        if (r->weights != NULL) {
            r->weights[i] = *(const float *) hb_shape_row(s->weights, s->weights->data, n, row);
        }
    }
}

static void read_probs(struct rows *r, const struct hb_router *router, const struct ggml_tensor *input) {
    for (int64_t row = 0; row < r->n_rows; row++) {
        hb_router_logits(router, hb_router_row(input, row), r->z);
        hb_router_probs(router, r->z, r->p, r->choice);
        for (int64_t e = 0; e < r->n_expert; e++) {
            r->probs[row * r->n_expert + e] = (uint16_t) lrintf(r->p[e] * PROB_ONE);
        }
    }
}

bool hb_tracing_write(struct hb_block *memory, const struct hb_segment *s, const struct hb_owners *owners) {
    struct hb_trace *trace = hb_model_trace(s->model);
    if (trace == NULL) {
        return true;
    }
    struct hb_router router;
    const struct ggml_tensor *input;
    struct rows r = {.n_rows = s->ids->ne[1], .n_pairs = s->ids->ne[0] * s->ids->ne[1],
                     .n_expert = hb_model_catalog(s->model)->groups[s->group].n_expert};
    bool probs = (hb_trace_flags(trace) & HOBBIT_TRACE_PROBS) != 0 && hb_router_find(s, &router, &input);
    if (!reserve(&r, memory, s->weights != NULL, probs)) {
        hb_model_fail(s->model, "memory is short");
        return false;
    }
    read_pairs(&r, s);
    if (probs) {
        read_probs(&r, &router, input);
    }
    const struct hb_trace_layer layer = {.group = s->group, .n_used = (int32_t) s->ids->ne[0], .n_rows = r.n_rows,
                                         .experts = r.experts, .weights = r.weights, .probs = r.probs,
                                         .sequences = owners->sequences, .tokens = owners->tokens};
    if (!hb_trace_layer(trace, &layer)) {
        char text[256];
        snprintf(text, sizeof text, "the routing trace cannot be written: %s", strerror(errno));
        hb_model_fail(s->model, text);
        return false;
    }
    return true;
}
