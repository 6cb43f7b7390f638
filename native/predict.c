#include "predict.h"

#include <stdlib.h>
#include <string.h>

#include "model.h"
#include "os.h"
#include "router.h"
#include "scorer.h"

/* A ubatch of more tokens uses nearly every expert of each layer: there is nothing to predict. */
#define MOST_TOKENS 8

/* Work space, and what it is for. */
struct space {
    float *x, *z, *p, *choice; /* [n_embd], [n_expert] three times */
    int32_t *experts, *precisions; /* [n_expert] */
};

static bool reserve(struct space *space, struct hb_block *memory, int32_t n_embd, int32_t n_expert) {
    size_t row = (size_t) n_embd * sizeof(float), experts = (size_t) n_expert * sizeof(float);
    if (!hb_block_reserve(memory, hb_block_round(row) + 5 * hb_block_round(experts))) {
        return false;
    }
    space->x = hb_block_take(memory, row);
    space->z = hb_block_take(memory, experts);
    space->p = hb_block_take(memory, experts);
    space->choice = hb_block_take(memory, experts);
    space->experts = hb_block_take(memory, experts);
    space->precisions = hb_block_take(memory, experts);
    return true;
}

/* The later layer's router would get a later input, normalised with that layer's weights; the one that is here does for
 * it, with the one norm's weights in place of the other's. */
static void input_for(const struct hb_router *from, const struct hb_router *to, const float *x, float *out) {
    if (from->norm == NULL || to->norm == NULL || from->norm == to->norm) {
        memcpy(out, x, (size_t) from->n_embd * sizeof *x);
        return;
    }
    for (int32_t i = 0; i < from->n_embd; i++) {
        out[i] = from->norm[i] != 0 ? x[i] * to->norm[i] / from->norm[i] : 0;
    }
}

/* The k experts with the largest values of `choice`, which is used up, the largest first. */
static void choose(float *choice, int32_t n_expert, int32_t k, int32_t *experts) {
    for (int32_t n = 0; n < k; n++) {
        int32_t best = 0;
        for (int32_t e = 1; e < n_expert; e++) {
            best = choice[e] > choice[best] ? e : best;
        }
        experts[n] = best;
        choice[best] = -1e30f;
    }
}

/* The precision that each would get: its gate weight is about its p among the chosen. */
static void set_precisions(struct hobbit_model *model, int32_t group, const struct space *space, int32_t n_used) {
    const struct hb_rule *rule = hb_model_rule(model);
    float weights[HB_SCORER_EXPERTS], scores[HB_SCORER_EXPERTS];
    bool scored = rule->active && n_used <= HB_SCORER_EXPERTS;
    for (int32_t n = 0; scored && n < n_used; n++) {
        weights[n] = space->p[space->experts[n]];
    }
    if (scored) {
        hb_scorer_scores(weights, n_used, scores);
    }
    for (int32_t n = 0; n < n_used; n++) {
        int32_t need = scored ? hb_scorer_need(scores[n], rule->t1[group], rule->t2[group]) : HOBBIT_HIGH;
        space->precisions[n] = rule->active ? hb_model_expectation(model, group, space->experts[n], need) : need;
    }
}

/* Whether everything expected of that layer is cached. */
static bool predict_layer(struct hobbit_model *model, int32_t group, const struct hb_router *from, const float *x,
                          const struct space *space) {
    const struct hb_router *to = hb_model_router(model, group);
    if (to->matrix == NULL || to->n_embd != from->n_embd) {
        return false;
    }
    input_for(from, to, x, space->x);
    hb_router_logits(to, space->x, space->z);
    hb_router_probs(to, space->z, space->p, space->choice);
    choose(space->choice, to->n_expert, to->n_used, space->experts);
    set_precisions(model, group, space, to->n_used);
    return hb_model_expect(model, group, to->n_used, space->experts, space->precisions);
}

/* Deeper while everything is cached (HOBBIT: adaptive depth). */
static void predict_by_gate(const struct hb_segment *s, const struct hb_router *from, const struct ggml_tensor *input,
                            int32_t depth, const struct space *space) {
    int32_t last = hb_model_catalog(s->model)->n_groups - 1;
    bool more = true;
    for (int32_t group = s->group + 1; more && group <= last && group <= s->group + depth; group++) {
        for (int64_t token = 0; token < input->ne[1]; token++) {
            more = predict_layer(s->model, group, from, hb_router_row(input, token), space) && more;
        }
    }
}

/* All experts of the next layer, in the precision of what needs most. */
static void expect_all(const struct hb_segment *s, const struct space *space) {
    int32_t group = s->group + 1, n_expert = hb_model_catalog(s->model)->groups[group].n_expert;
    const struct hb_rule *rule = hb_model_rule(s->model);
    for (int32_t e = 0; e < n_expert; e++) {
        int32_t need = rule->active ? hb_scorer_need(0, rule->t1[group], rule->t2[group]) : HOBBIT_HIGH;
        space->experts[e] = e;
        space->precisions[e] = rule->active ? hb_model_expectation(s->model, group, e, need) : need;
    }
    (void) hb_model_expect(s->model, group, n_expert, space->experts, space->precisions);
}

void hb_predict(struct hb_block *memory, const struct hb_segment *s) {
    const struct hb_catalog *catalog = hb_model_catalog(s->model);
    struct hb_router *known = hb_model_router(s->model, s->group), found;
    const struct ggml_tensor *input;
    int32_t depth, most_experts = 0;
    if (hb_model_home(s->model, s->group) >= 0 || hb_model_has_schedule(s->model)) {
        return; /* there is room for everything; or it is not the routing that decides */
    }
    for (int32_t g = 0; g < catalog->n_groups; g++) {
        most_experts = catalog->groups[g].n_expert > most_experts ? catalog->groups[g].n_expert : most_experts;
    }
    bool gate = hb_router_find(s, &found, &input);
    struct space space;
    if (gate) {
        *known = found;
    }
    if (s->group + 1 == catalog->n_groups || !reserve(&space, memory, known->n_embd, most_experts)) {
        return;
    }
    uint64_t start = hb_now_ns();
    if (s->ids->ne[1] > MOST_TOKENS) {
        expect_all(s, &space);
    } else if (gate && hb_model_predictor(s->model, &depth) == HOBBIT_PREDICT_GATE) {
        predict_by_gate(s, known, input, depth, &space);
    }
    atomic_fetch_add(&hb_model_counters(s->model)->predict_ns, hb_now_ns() - start);
}
