#include "map_predictor.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "odds.h"

/* As the paper does: the hint decides until one layer is known. */
#define DISTANCE 1
/* Half of what a stored probability is rounded to, so that every one has a logarithm. */
#define LEAST_P (0.5f / 32767)

/* What was predicted of a group, from so many groups before, for this token. */
struct pending {
    int32_t n; /* 0: nothing */
    int32_t experts[HB_MAP_MOST];
    int32_t bins[HB_MAP_MOST];
};

struct hb_map_predictor {
    struct hb_maps *maps;
    int32_t n_groups, n_embd, depth, most; /* experts of any group */
    bool begun, observed, has_new;
    struct hb_odds odds[HB_MAP_DEPTH];
    struct pending *pending; /* [n_groups][depth] */
    float *z, *p, *choice;   /* [most] */
    bool *marked;            /* [most] */
};

static size_t of_pending(int32_t n_groups, int32_t depth) {
    return (size_t) n_groups * (size_t) depth * sizeof(struct pending);
}

size_t hb_map_predictor_bytes(int32_t n_groups, const int32_t *n_experts, int32_t n_embd, int32_t capacity,
                              int32_t depth) {
    size_t maps = hb_maps_bytes(n_groups, n_experts, n_embd, capacity);
    if (maps == 0 || depth < 1 || depth > HB_MAP_DEPTH) {
        return 0;
    }
    size_t most = (size_t) hb_most_experts(n_groups, n_experts);
    return maps + sizeof(struct hb_map_predictor) + of_pending(n_groups, depth) + most * (3 * sizeof(float) + 1);
}

struct hb_map_predictor *hb_map_predictor_new(int32_t n_groups, const int32_t *n_experts, int32_t n_embd,
                                              int32_t capacity, int32_t depth) {
    struct hb_map_predictor *m = depth >= 1 && depth <= HB_MAP_DEPTH ? calloc(1, sizeof *m) : NULL;
    if (m == NULL) {
        return NULL;
    }
    m->maps = hb_maps_new(n_groups, n_experts, n_embd, capacity, DISTANCE);
    if (m->maps != NULL) {
        size_t most = (size_t) hb_most_experts(n_groups, n_experts);
        m->n_groups = n_groups, m->n_embd = n_embd, m->depth = depth, m->most = (int32_t) most;
        m->pending = calloc(1, of_pending(n_groups, depth));
        m->z = malloc(most * (3 * sizeof *m->z + 1) + 1);
    }
    if (m->maps == NULL || m->pending == NULL || m->z == NULL) {
        hb_map_predictor_free(m);
        return NULL;
    }
    m->p = m->z + m->most;
    m->choice = m->p + m->most;
    m->marked = (bool *) (m->choice + m->most);
    for (int32_t i = 0; i < HB_MAP_DEPTH; i++) {
        hb_odds_start(&m->odds[i]);
    }
    return m;
}

void hb_map_predictor_free(struct hb_map_predictor *m) {
    if (m != NULL) {
        hb_maps_free(m->maps);
        free(m->pending);
        free(m->z);
        free(m);
    }
}

struct hb_maps *hb_map_predictor_maps(struct hb_map_predictor *m) {
    return m->maps;
}

static struct pending *pending_of(struct hb_map_predictor *m, int32_t to, int32_t ahead) {
    return &m->pending[to * m->depth + ahead - 1];
}

void hb_map_predictor_begin(struct hb_map_predictor *m, bool single, const struct hb_router *router,
                            const float *x) {
    for (int32_t i = 0; i < m->n_groups * m->depth; i++) {
        m->pending[i].n = 0; /* of a token that was broken off */
    }
    m->begun = single;
    m->observed = false;
    if (single) {
        hb_maps_begin(m->maps, x != NULL && router->n_embd == m->n_embd ? x : NULL);
    }
}

static int32_t count(struct hb_map_predictor *m, struct pending *pending, int32_t ahead) {
    int32_t right = 0;
    for (int32_t k = 0; k < pending->n; k++) {
        bool chosen = m->marked[pending->experts[k]];
        hb_odds_count(&m->odds[ahead - 1], pending->bins[k], chosen);
        right += chosen;
    }
    pending->n = 0;
    return right;
}

int32_t hb_map_predictor_count(struct hb_map_predictor *m, int32_t at, const int32_t *experts, int32_t n,
                               int32_t *predicted) {
    int32_t right = 0;
    *predicted = pending_of(m, at, 1)->n;
    memset(m->marked, 0, (size_t) m->most);
    for (int32_t i = 0; i < n; i++) {
        m->marked[experts[i]] = true;
    }
    for (int32_t ahead = 1; ahead <= m->depth; ahead++) {
        int32_t chosen = count(m, pending_of(m, at, ahead), ahead);
        right = ahead == 1 ? chosen : right;
    }
    return right;
}

/* What the router chooses by is of any scale and may have any offset where it is no softmax. */
static void lower(const struct hb_router *router, float *choice) {
    float least = choice[0];
    for (int32_t e = 1; e < router->n_expert; e++) {
        least = choice[e] < least ? choice[e] : least;
    }
    for (int32_t e = 0; e < router->n_expert; e++) {
        choice[e] -= least;
    }
}

void hb_map_predictor_observe(struct hb_map_predictor *m, int32_t at, const struct hb_router *router,
                              const float *x) {
    if (!m->begun || router->n_expert > m->most) {
        return;
    }
    hb_router_logits(router, x, m->z);
    hb_router_probs(router, m->z, m->p, m->choice);
    if (router->sigmoid || router->bias_of_choice != NULL) {
        lower(router, m->choice);
    }
    hb_maps_observe(m->maps, at, m->choice);
    m->observed = true;
}

/* Returns how many to predict; one more than a token uses is in `order` in any case. */
static int32_t choose(const float *p, const struct hb_router *router, float score, int32_t *order) {
    int32_t n_used = router->n_used, most = 2 * n_used < HB_MAP_MOST ? 2 * n_used : HB_MAP_MOST;
    int32_t n = hb_maps_choose(p, router->n_expert, score, n_used + 1, most, order);
    float sum = 0;
    for (int32_t k = 0; k < n_used; k++) {
        sum += p[order[k]];
    }
    return sum >= 1 - score ? n_used : n;
}

static float logarithm(float p) {
    return logf(p + LEAST_P);
}

int32_t hb_map_predictor_predict(struct hb_map_predictor *m, int32_t to, int32_t ahead,
                                 const struct hb_router *router, int32_t *experts, float *odds, float *p) {
    const float *found;
    float score;
    int32_t n_used = router->n_used, order[HB_MAP_MOST];
    if (!m->begun || router->matrix == NULL || ahead > m->depth || n_used < 1 || n_used >= router->n_expert ||
        n_used >= HB_MAP_MOST || !hb_maps_predict(m->maps, to, &found, &score)) {
        return 0;
    }
    int32_t n = choose(found, router, score, order);
    float line = logarithm(found[order[n_used]]);
    struct pending *pending = pending_of(m, to, ahead);
    pending->n = n;
    for (int32_t k = 0; k < n; k++) {
        pending->experts[k] = experts[k] = order[k];
        pending->bins[k] = hb_odds_bin(logarithm(found[order[k]]) - line);
        odds[k] = hb_odds(&m->odds[ahead - 1], pending->bins[k]);
    }
    memcpy(p, found, (size_t) router->n_expert * sizeof *p);
    return n;
}

void hb_map_predictor_end(struct hb_map_predictor *m) {
    if (m->begun) {
        hb_maps_end(m->maps);
        m->has_new |= m->observed;
    }
    m->begun = false;
}

bool hb_map_predictor_has_new(const struct hb_map_predictor *m) {
    return m->has_new;
}
