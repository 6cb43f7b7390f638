#include "predict.h"

#include <math.h>

#include "model.h"
#include "os.h"
#include "router.h"
#include "scorer.h"

/* Predictions are made token by token: for more of them it would take too long. */
#define MOST_TOKENS 32
/* Where so many of a layer's experts will be used there is nothing to predict. */
#define NEARLY_ALL 0.95

/* Work space: [n_expert] each. */
struct space {
    int32_t *experts, *precisions;
    float *odds, *p;
};

static bool reserve(struct space *space, struct hb_block *memory, int32_t n_expert) {
    size_t bytes = (size_t) n_expert * sizeof(float);
    if (!hb_block_reserve(memory, 4 * hb_block_round(bytes))) {
        return false;
    }
    space->experts = hb_block_take(memory, bytes);
    space->precisions = hb_block_take(memory, bytes);
    space->odds = hb_block_take(memory, bytes);
    space->p = hb_block_take(memory, bytes);
    return true;
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

/* The experts that the layer chose: their number. */
static int32_t chosen(const struct hb_routing *routing, int32_t *experts) {
    int32_t n = 0;
    for (int32_t e = 0; e < routing->n_experts; e++) {
        if (n == 0 || experts[n - 1] != routing->experts[e].expert) {
            experts[n++] = routing->experts[e].expert;
        }
    }
    return n;
}

static void count(struct hobbit_model *model, int32_t predicted, int32_t right) {
    atomic_fetch_add(&hb_model_counters(model)->predicted, (uint64_t) predicted);
    atomic_fetch_add(&hb_model_counters(model)->predicted_right, (uint64_t) right);
}

static void learn(const struct hb_segment *s, const struct hb_routing *routing, const float *x, struct space *space) {
    int32_t predicted, n = chosen(routing, space->experts);
    int32_t right = hb_forecast_learn(hb_model_forecast(s->model), hb_model_routers(s->model), s->group, x,
                                      space->experts, n, &predicted);
    count(s->model, predicted, right);
}

/* Deeper while everything is cached (HOBBIT: adaptive depth). */
static void predict_by_gate(const struct hb_segment *s, const struct ggml_tensor *input, int32_t depth,
                            const struct space *space) {
    struct hb_forecast *forecast = hb_model_forecast(s->model);
    const struct hb_router *routers = hb_model_routers(s->model);
    int32_t left = hb_model_catalog(s->model)->n_groups - 1 - s->group;
    bool more = true;
    for (int32_t ahead = 1; more && ahead <= left && ahead <= depth; ahead++) {
        int32_t group = s->group + ahead, n_used = routers[group].n_used;
        for (int64_t token = 0; token < ggml_nrows(input); token++) {
            if (!hb_forecast_predict(forecast, routers, s->group, ahead, hb_router_row(input, token),
                                     ggml_nrows(input) == 1, space->experts, space->odds, space->p)) {
                return;
            }
            set_precisions(s->model, group, space, n_used);
            more = hb_model_expect(s->model, group, n_used, space->experts, space->precisions, space->odds) && more;
        }
    }
}

/* Whether this group or one after it has not room for all its experts. */
static bool any_streams(const struct hobbit_model *model, int32_t group) {
    for (; group < hb_model_catalog(model)->n_groups; group++) {
        if (hb_model_home(model, group) < 0) {
            return true;
        }
    }
    return false;
}

/* As deep as the gate. */
static void expect_by_map(const struct hb_segment *s, int32_t depth, const struct space *space) {
    struct hb_map_predictor *maps = hb_model_map_predictor(s->model);
    int32_t left = hb_model_catalog(s->model)->n_groups - 1 - s->group;
    bool more = true;
    for (int32_t ahead = 1; more && ahead <= left && ahead <= depth; ahead++) {
        int32_t group = s->group + ahead;
        int32_t n = hb_map_predictor_predict(maps, group, ahead, &hb_model_routers(s->model)[group], space->experts,
                                             space->odds, space->p);
        if (n == 0) {
            continue; /* that layer is not known */
        }
        set_precisions(s->model, group, space, n);
        more = hb_model_expect(s->model, group, n, space->experts, space->precisions, space->odds);
    }
}

/* `input` is NULL where the layer's router is not known. Maps are of single tokens: a pass of several is left out. */
static void predict_by_map(const struct hb_segment *s, const struct hb_routing *routing,
                           const struct ggml_tensor *input, int32_t depth, struct space *space) {
    struct hb_map_predictor *maps = hb_model_map_predictor(s->model);
    const struct hb_router *router = &hb_model_routers(s->model)[s->group];
    const float *x = input != NULL ? hb_router_row(input, 0) : NULL;
    int32_t predicted;
    if (s->group == 0) {
        hb_map_predictor_begin(maps, routing->n_tokens == 1, router, x);
    }
    if (routing->n_tokens > 1) {
        return;
    }
    int32_t n = chosen(routing, space->experts);
    int32_t right = hb_map_predictor_count(maps, s->group, space->experts, n, &predicted);
    count(s->model, predicted, right);
    if (x != NULL) {
        hb_map_predictor_observe(maps, s->group, router, x);
    }
    expect_by_map(s, depth, space);
    if (!any_streams(s->model, s->group + 1)) {
        hb_map_predictor_end(maps);
    }
}

/* All experts of the next layer, in the precision of what needs most. */
static void expect_all(const struct hb_segment *s, const struct space *space) {
    int32_t group = s->group + 1, n_expert = hb_model_catalog(s->model)->groups[group].n_expert;
    const struct hb_rule *rule = hb_model_rule(s->model);
    for (int32_t e = 0; e < n_expert; e++) {
        int32_t need = rule->active ? hb_scorer_need(0, rule->t1[group], rule->t2[group]) : HOBBIT_HIGH;
        space->experts[e] = e;
        space->odds[e] = 1;
        space->precisions[e] = rule->active ? hb_model_expectation(s->model, group, e, need) : need;
    }
    (void) hb_model_expect(s->model, group, n_expert, space->experts, space->precisions, space->odds);
}

/* Tokens choose independently, nearly enough. The last layer computes only those tokens whose logits somebody wants: as
 * many as last time, it is assumed. */
static bool uses_all(const struct hb_segment *s, int32_t group, int64_t n_tokens) {
    const struct hb_catalog *catalog = hb_model_catalog(s->model);
    int64_t rows = group + 1 == catalog->n_groups ? hb_model_last_rows(s->model) : n_tokens;
    double share = (double) s->ids->ne[0] / catalog->groups[group].n_expert;
    return 1 - pow(1 - share, (double) rows) >= NEARLY_ALL;
}

static void predict(const struct hb_segment *s, const struct hb_routing *routing, struct space *space) {
    struct hb_router found;
    const struct ggml_tensor *input = NULL;
    int32_t depth, kind = hb_model_predictor(s->model, &depth);
    bool more = s->group + 1 < hb_model_catalog(s->model)->n_groups;
    bool all = more && uses_all(s, s->group + 1, routing->n_tokens), few = !all && routing->n_tokens <= MOST_TOKENS;
    if (all) {
        expect_all(s, space);
    }
    if (kind != HOBBIT_PREDICT_NONE && few && hb_router_find(s, &found, &input)) {
        hb_model_routers(s->model)[s->group] = found;
    }
    if (kind == HOBBIT_PREDICT_GATE && s->group == 0) {
        hb_forecast_begin(hb_model_forecast(s->model));
    }
    if (kind == HOBBIT_PREDICT_MAP) {
        predict_by_map(s, routing, input, depth, space);
    } else if (kind == HOBBIT_PREDICT_GATE && input != NULL) {
        if (routing->n_tokens == 1) {
            learn(s, routing, hb_router_row(input, 0), space);
        }
        predict_by_gate(s, input, depth, space);
    }
}

static bool is_idle(const struct hb_segment *s) {
    return !any_streams(s->model, s->group) || hb_model_has_schedule(s->model);
}

bool hb_predict_wants_router(const struct hb_segment *s) {
    int32_t depth;
    return !is_idle(s) && hb_model_predictor(s->model, &depth) != HOBBIT_PREDICT_NONE;
}

void hb_predict(struct hb_block *memory, const struct hb_segment *s, const struct hb_routing *routing) {
    if (is_idle(s)) {
        return; /* there is room for all that follows; or it is not the routing that decides */
    }
    struct space space;
    uint64_t start = hb_now_ns();
    if (reserve(&space, memory, hb_model_catalog(s->model)->most_experts)) {
        predict(s, routing, &space);
    }
    atomic_fetch_add(&hb_model_counters(s->model)->predict_ns, hb_now_ns() - start);
}
