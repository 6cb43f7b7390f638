#include "forecast.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "odds.h"

#define MU 0.5f
/* For so many tokens, and every so many after them, a pair learns from right predictions too. */
#define ALL_AT_FIRST 256u
#define ALL_EVERY 4u

/* A pair of layers. */
struct link {
    float *matrix; /* [n_expert][n_embd] */
    float *z;      /* [n_expert] predicted last */
    int32_t *order; /* [n_used + 1] the largest of them */
    bool set;      /* the matrix is */
    bool pending;  /* z is of this token */
    uint32_t learned; /* tokens */
};

struct hb_forecast {
    int32_t n_groups, n_embd, n_expert, depth;
    float *x;           /* [n_groups][n_embd] what each router got last */
    struct link *links; /* [n_groups][depth]: of the later layer, and how many layers before */
    struct hb_odds odds[HB_FORECAST_DEPTH]; /* by how many layers ahead */
    float *choice; /* [n_expert] */
    bool *marked;  /* [n_expert] */
    char *memory;
};

static size_t of_link(int32_t n_embd, int32_t n_expert) {
    size_t n = (size_t) n_expert;
    return (n * (size_t) n_embd + n) * sizeof(float) + (n + 1) * sizeof(int32_t);
}

size_t hb_forecast_bytes(int32_t n_groups, int32_t n_embd, int32_t n_expert, int32_t depth) {
    size_t links = (size_t) n_groups * (size_t) depth;
    return sizeof(struct hb_forecast) + links * (sizeof(struct link) + of_link(n_embd, n_expert)) +
           (size_t) n_groups * (size_t) n_embd * sizeof(float) + (size_t) n_expert * (sizeof(float) + 1);
}

struct hb_forecast *hb_forecast_new(int32_t n_groups, int32_t n_embd, int32_t n_expert, int32_t depth) {
    struct hb_forecast *f = calloc(1, sizeof *f);
    size_t links = (size_t) n_groups * (size_t) depth, inputs = (size_t) n_groups * (size_t) n_embd;
    if (f == NULL) {
        return NULL;
    }
    *f = (struct hb_forecast) {.n_groups = n_groups, .n_embd = n_embd, .n_expert = n_expert, .depth = depth};
    f->links = calloc(links, sizeof *f->links);
    size_t numbers = inputs + (size_t) n_expert;
    f->memory = calloc(1, links * of_link(n_embd, n_expert) + numbers * sizeof(float) + (size_t) n_expert);
    if (f->links == NULL || f->memory == NULL) {
        hb_forecast_free(f);
        return NULL;
    }
    char *at = f->memory;
    for (size_t i = 0; i < links; i++, at += of_link(n_embd, n_expert)) {
        f->links[i].matrix = (float *) (void *) at;
        f->links[i].z = f->links[i].matrix + (size_t) n_expert * (size_t) n_embd;
        f->links[i].order = (int32_t *) (void *) (f->links[i].z + n_expert);
    }
    f->x = (float *) (void *) at;
    f->choice = f->x + inputs;
    f->marked = (bool *) (f->choice + n_expert);
    for (int32_t i = 0; i < HB_FORECAST_DEPTH; i++) {
        hb_odds_start(&f->odds[i]);
    }
    return f;
}

void hb_forecast_free(struct hb_forecast *f) {
    if (f != NULL) {
        free(f->links);
        free(f->memory);
        free(f);
    }
}

static struct link *link_of(struct hb_forecast *f, int32_t to, int32_t ahead) {
    return &f->links[to * f->depth + ahead - 1];
}

void hb_forecast_begin(struct hb_forecast *f) {
    for (int32_t i = 0; i < f->n_groups * f->depth; i++) {
        f->links[i].pending = false;
    }
}

/* The later layer normalises with other weights: its router's columns make up for that. */
static void set_matrix(struct link *link, const struct hb_router *from, const struct hb_router *to) {
    bool scale = from->norm != NULL && to->norm != NULL;
    for (int32_t e = 0; e < to->n_expert; e++) {
        const float *row = to->matrix + (int64_t) e * to->n_embd;
        float *out = link->matrix + (int64_t) e * to->n_embd;
        for (int32_t i = 0; i < to->n_embd; i++) {
            out[i] = !scale ? row[i] : from->norm[i] != 0 ? row[i] * to->norm[i] / from->norm[i] : 0;
        }
    }
    link->set = true;
}

/* The n largest of `choice`, which is used up, the largest first. */
static void largest(float *choice, int32_t n_expert, int32_t n, int32_t *order) {
    for (int32_t k = 0; k < n; k++) {
        int32_t best = 0;
        for (int32_t e = 1; e < n_expert; e++) {
            best = choice[e] > choice[best] ? e : best;
        }
        order[k] = best;
        choice[best] = -INFINITY;
    }
}

/* Of the k-th predicted expert. */
static int32_t bin_of(const struct link *link, int32_t k, int32_t n_used) {
    return hb_odds_bin(link->z[link->order[k]] - link->z[link->order[n_used]]);
}

bool hb_forecast_predict(struct hb_forecast *f, const struct hb_router *routers, int32_t from, int32_t ahead,
                         const float *x, bool learns, int32_t *experts, float *odds, float *p) {
    const struct hb_router *near = &routers[from], *far = &routers[from + ahead];
    if (ahead > f->depth || near->matrix == NULL || far->matrix == NULL || near->n_embd != f->n_embd ||
        far->n_embd != f->n_embd || far->n_expert > f->n_expert || far->n_used >= far->n_expert) {
        return false;
    }
    struct link *link = link_of(f, from + ahead, ahead);
    if (!link->set) {
        set_matrix(link, near, far);
    }
    struct hb_router learned = *far;
    learned.matrix = link->matrix;
    hb_router_logits(&learned, x, link->z);
    hb_router_probs(far, link->z, p, f->choice);
    largest(f->choice, far->n_expert, far->n_used + 1, link->order);
    for (int32_t k = 0; k < far->n_used; k++) {
        experts[k] = link->order[k];
        odds[k] = hb_odds(&f->odds[ahead - 1], bin_of(link, k, far->n_used));
    }
    memcpy(f->x + (size_t) from * (size_t) f->n_embd, x, (size_t) f->n_embd * sizeof *x);
    link->pending = learns;
    return true;
}

/* W_e += MU (z_e - W_e x) x / |x|^2 */
static void correct(struct hb_forecast *f, struct link *link, const struct hb_router *router, int32_t e,
                    const float *now, const float *before, float norm) {
    float z = hb_router_dot(router->matrix + (int64_t) e * f->n_embd, now, f->n_embd);
    float predicted = link->z[e] - (router->bias != NULL ? router->bias[e] : 0);
    float step = MU * (z - predicted) / norm, *row = link->matrix + (int64_t) e * f->n_embd;
    for (int32_t i = 0; i < f->n_embd && isfinite(step); i++) { /* one bad input must not spoil all that come */
        row[i] += step * before[i];
    }
}

static int32_t learn(struct hb_forecast *f, const struct hb_router *router, struct link *link, int32_t at,
                     int32_t ahead, const float *x, const int32_t *experts, int32_t n) {
    const float *before = f->x + (size_t) (at - ahead) * (size_t) f->n_embd;
    float norm = hb_router_dot(before, before, f->n_embd);
    int32_t right = 0;
    memset(f->marked, 0, (size_t) f->n_expert);
    for (int32_t i = 0; i < n; i++) {
        f->marked[experts[i]] = true;
    }
    bool all = link->learned < ALL_AT_FIRST || link->learned % ALL_EVERY == 0;
    for (int32_t k = 0; k < router->n_used; k++) {
        bool chosen = f->marked[link->order[k]];
        hb_odds_count(&f->odds[ahead - 1], bin_of(link, k, router->n_used), chosen);
        right += chosen;
        f->marked[link->order[k]] = all || !chosen;
    }
    f->marked[link->order[router->n_used]] |= all;
    link->learned++;
    for (int32_t e = 0; e < router->n_expert && norm > 0; e++) {
        if (f->marked[e]) {
            correct(f, link, router, e, x, before, norm);
        }
    }
    link->pending = false;
    return right;
}

int32_t hb_forecast_learn(struct hb_forecast *f, const struct hb_router *routers, int32_t at, const float *x,
                          const int32_t *experts, int32_t n, int32_t *predicted) {
    int32_t right = 0;
    *predicted = 0;
    for (int32_t ahead = 1; ahead <= f->depth && ahead <= at; ahead++) {
        struct link *link = link_of(f, at, ahead);
        if (!link->pending) {
            continue;
        }
        int32_t chosen = learn(f, &routers[at], link, at, ahead, x, experts, n);
        if (ahead == 1) {
            right = chosen;
            *predicted = routers[at].n_used;
        }
    }
    return right;
}
