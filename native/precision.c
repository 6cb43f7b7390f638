#include "precision.h"

#include "model.h"
#include "needs.h"
#include "scorer.h"
#include "shape.h"

static float weight_of(const struct hb_segment *s, int64_t n, int64_t token) {
    return *(const float *) hb_shape_row(s->weights, s->weights->data, n, token);
}

static void count_scores(int64_t *bins, const float *scores, int n) {
    for (int i = 0; i < n; i++) {
        if (scores[i] > 0) {
            int bin = (int) (scores[i] * HOBBIT_SCORE_BINS);
            bins[bin < HOBBIT_SCORE_BINS ? bin : HOBBIT_SCORE_BINS - 1]++;
        }
    }
}

/* scores[token * n_used + n] of each pair. */
static void score_pairs(const struct hb_segment *s, const struct hb_routing *r, float *scores) {
    int64_t *histogram = hb_model_gathered(s->model)->scores;
    for (int64_t t = 0; t < r->n_tokens; t++) {
        float weights[HB_SCORER_EXPERTS], *of_token = scores + t * r->n_used;
        for (int32_t n = 0; n < r->n_used; n++) {
            weights[n] = weight_of(s, n, t);
        }
        hb_scorer_scores(weights, r->n_used, of_token);
        if (histogram != NULL) {
            count_scores(histogram + (int64_t) s->group * HOBBIT_SCORE_BINS, of_token, r->n_used);
        }
    }
}

/* From what is needed to what each expert gets. */
static void choose(const struct hb_segment *s, struct hb_routing *r) {
    for (int32_t e = 0; e < r->n_experts; e++) {
        struct hb_routed *expert = &r->experts[e];
        expert->precision = hb_model_choose(s->model, s->group, expert->expert, expert->precision);
    }
}

static bool apply_schedule(const struct hb_segment *s, struct hb_routing *r, int32_t *experts, int32_t *precisions) {
    for (int32_t e = 0; e < r->n_experts; e++) {
        experts[e] = r->experts[e].expert;
        precisions[e] = r->experts[e].precision;
    }
    if (!hb_model_schedule(s->model, s->group, r->n_experts, experts, precisions)) {
        return false;
    }
    for (int32_t e = 0; e < r->n_experts; e++) {
        r->experts[e].precision = precisions[e];
    }
    return true;
}

/* After skips: what a token's other gate weights are multiplied with to have the old sum. */
static void scale_tokens(const struct hb_segment *s, const struct hb_routing *r, float *scale, float *left) {
    for (int64_t t = 0; t < r->n_tokens; t++) {
        scale[t] = left[t] = 0;
    }
    for (int32_t e = 0; e < r->n_experts; e++) {
        for (int32_t i = r->experts[e].first; i < r->experts[e].first + r->experts[e].n_pairs; i++) {
            float weight = weight_of(s, r->n[i], r->token[i]);
            scale[r->token[i]] += weight;
            left[r->token[i]] += r->experts[e].precision == HOBBIT_SKIP ? 0 : weight;
        }
    }
    for (int64_t t = 0; t < r->n_tokens; t++) {
        scale[t] = left[t] > 0 && scale[t] > left[t] ? scale[t] / left[t] : 1;
    }
}

bool hb_precision_choose(struct hb_block *memory, const struct hb_segment *s, struct hb_routing *r,
                         const float **token_scale) {
    const struct hb_rule *rule = hb_model_rule(s->model);
    bool scheduled = hb_model_has_schedule(s->model);
    *token_scale = NULL;
    if (!rule->active && !scheduled && hb_model_gathered(s->model)->scores == NULL) {
        return true;
    }
    size_t n_pairs = (size_t) r->n_pairs, n_tokens = (size_t) r->n_tokens;
    if (!hb_block_reserve(memory, hb_block_round(n_pairs * sizeof(float)) + hb_block_round(n_pairs) +
                                      2 * hb_block_round(n_pairs * sizeof(int32_t)) +
                                      2 * hb_block_round(n_tokens * sizeof(float)))) {
        hb_model_fail(s->model, "memory is short");
        return false;
    }
    bool seen = s->weights != NULL && r->n_used <= HB_SCORER_EXPERTS;
    struct hb_counters *counters = hb_model_counters(s->model);
    atomic_fetch_add(seen ? &counters->scored : &counters->unscored, (uint64_t) r->n_pairs);
    if (!seen && rule->active && !hb_needs_alike(rule, s->group)) {
        hb_model_fail(s->model, "the gate weights of this model are not where hobbit looks for them: use -Q exact");
        return false;
    }
    if (!seen && rule->active) {
        hb_needs_all(rule, s->group, r);
    }
    if (seen) {
        float *scores = hb_block_take(memory, n_pairs * sizeof *scores);
        score_pairs(s, r, scores);
        if (rule->active) {
            hb_needs_set(rule, s->group, r, scores, hb_block_take(memory, n_pairs));
        }
    }
    if (rule->active) {
        choose(s, r);
    }
    if (scheduled) {
        int32_t *experts = hb_block_take(memory, n_pairs * sizeof *experts);
        if (!apply_schedule(s, r, experts, hb_block_take(memory, n_pairs * sizeof *experts))) {
            return false;
        }
    }
    if (seen && rule->renormalise) {
        float *scale = hb_block_take(memory, n_tokens * sizeof *scale);
        scale_tokens(s, r, scale, hb_block_take(memory, n_tokens * sizeof *scale));
        *token_scale = scale;
    }
    return true;
}
