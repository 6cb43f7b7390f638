#include "maps.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "block.h"
#include "maps_impl.h"

/* Far beyond any model, and such that nothing here overflows. */
#define MAX_LAYERS 4096
#define MAX_EXPERTS 4096
#define MAX_EMBD (1 << 20)
#define MAX_CAPACITY (1 << 20)

int32_t hb_maps_dot(const int16_t *a, const int16_t *b, int32_t n) {
    int32_t sum = 0;
    for (int32_t i = 0; i < n; i++) {
        sum += (int32_t) a[i] * b[i];
    }
    return sum;
}

int16_t *hb_maps_layer(const struct hb_maps *m, int32_t layer) {
    return m->probs + m->first[layer] * (size_t) m->capacity;
}

/* Creation. */

static bool is_shape(int32_t n_layers, const int32_t *n_experts, int32_t n_embd, int32_t capacity) {
    bool good = n_layers > 0 && n_layers <= MAX_LAYERS && n_embd >= 0 && n_embd <= MAX_EMBD && capacity > 0 &&
                capacity <= MAX_CAPACITY;
    for (int32_t l = 0; good && l < n_layers; l++) {
        good = n_experts[l] >= 0 && n_experts[l] <= MAX_EXPERTS;
    }
    return good;
}

static void *take(char *base, size_t *used, size_t size) {
    void *p = base != NULL ? base + *used : NULL;
    *used += hb_block_round(size);
    return p;
}

/* Divide the block at `base`; NULL: only add up. Returns its size. */
static size_t lay_out(struct hb_maps *m, char *base, const int32_t *n_experts) {
    size_t layers = (size_t) m->n_layers, capacity = (size_t) m->capacity, all = 0, most = 0, used = 0;
    for (size_t l = 0; l < layers; l++) {
        all += (size_t) n_experts[l];
        most = (size_t) n_experts[l] > most ? (size_t) n_experts[l] : most;
    }
    (void) take(base, &used, sizeof *m);
    m->n_experts = take(base, &used, layers * sizeof *m->n_experts);
    m->first = take(base, &used, layers * sizeof *m->first);
    m->embedding = take(base, &used, (size_t) m->n_embd * sizeof *m->embedding);
    m->own = take(base, &used, all * sizeof *m->own);
    m->predicted = take(base, &used, most * sizeof *m->predicted);
    m->semantic = take(base, &used, capacity * sizeof *m->semantic);
    m->dot = take(base, &used, capacity * sizeof *m->dot);
    m->so_far = take(base, &used, capacity * sizeof *m->so_far);
    m->embedding_norm = take(base, &used, capacity * sizeof *m->embedding_norm);
    m->norm = take(base, &used, layers * capacity * sizeof *m->norm);
    m->embeddings = take(base, &used, capacity * (size_t) m->n_embd * sizeof *m->embeddings);
    m->probs = take(base, &used, capacity * all * sizeof *m->probs);
    return used;
}

size_t hb_maps_bytes(int32_t n_layers, const int32_t *n_experts, int32_t n_embd, int32_t capacity) {
    struct hb_maps shape = {.n_layers = n_layers, .n_embd = n_embd, .capacity = capacity};
    return is_shape(n_layers, n_experts, n_embd, capacity) ? lay_out(&shape, NULL, n_experts) : 0;
}

struct hb_maps *hb_maps_new(int32_t n_layers, const int32_t *n_experts, int32_t n_embd, int32_t capacity,
                            int32_t distance) {
    size_t size = hb_maps_bytes(n_layers, n_experts, n_embd, capacity);
    struct hb_maps *m = size > 0 && distance >= 0 ? calloc(1, size) : NULL;
    if (m == NULL) {
        return NULL;
    }
    *m = (struct hb_maps) {.n_layers = n_layers, .n_embd = n_embd, .capacity = capacity, .distance = distance};
    (void) lay_out(m, (char *) m, n_experts);
    size_t all = 0;
    for (int32_t l = 0; l < n_layers; l++) {
        m->n_experts[l] = n_experts[l];
        m->first[l] = all;
        all += (size_t) n_experts[l];
    }
    m->observed = -1;
    return m;
}

void hb_maps_free(struct hb_maps *m) {
    free(m);
}

int32_t hb_maps_count(const struct hb_maps *m) {
    return m->n_maps;
}

/* The search. */

static float as_score(double cosine) {
    return cosine < 1 ? (float) cosine : 1; /* rounding may make it more */
}

static double cosine(double dot, double norm, double other_norm) {
    return dot > 0 && norm > 0 && other_norm > 0 ? dot / sqrt(norm * other_norm) : 0;
}

/* The largest cosine is where dot * dot / norm is largest: one root a search, not one a map. */
static void match_semantic(struct hb_maps *m) {
    double best = 0;
    m->match = -1;
    for (int32_t i = 0; i < m->n_maps; i++) {
        double dot = m->semantic[i], norm = m->embedding_norm[i];
        if (dot > 0 && dot * dot > best * norm) {
            best = dot * dot / norm;
            m->match = i;
        }
    }
    m->score = m->match >= 0 ? as_score(sqrt(best / m->own_embedding_norm)) : 0;
}

static void match_trajectory(struct hb_maps *m) {
    double best = 0;
    m->match = -1;
    for (int32_t i = 0; i < m->n_maps; i++) {
        double dot = m->dot[i], norm = m->so_far[i];
        if (dot > 0 && dot * dot > best * norm) {
            best = dot * dot / norm;
            m->match = i;
        }
    }
    m->score = m->match >= 0 ? as_score(sqrt(best / m->own_norm)) : 0;
}

/* To HB_MAPS_ONE times the unit vector. Returns its squared length: 0 where there is none. */
static int32_t quantize_embedding(const float *from, int32_t n, int16_t *to) {
    double sum = 0;
    for (int32_t i = 0; from != NULL && i < n; i++) {
        sum += (double) from[i] * from[i];
    }
    if (!(sum > 0 && isfinite(sum))) {
        memset(to, 0, (size_t) n * sizeof *to);
        return 0;
    }
    double scale = HB_MAPS_ONE / sqrt(sum);
    for (int32_t i = 0; i < n; i++) {
        double x = from[i] * scale;
        to[i] = (int16_t) (x < 0 ? x - 0.5 : x + 0.5);
    }
    return hb_maps_dot(to, to, n);
}

void hb_maps_begin(struct hb_maps *m, const float *embedding) {
    m->own_embedding_norm = quantize_embedding(embedding, m->n_embd, m->embedding);
    for (int32_t i = 0; i < m->n_maps; i++) {
        const int16_t *stored = m->embeddings + (size_t) i * (size_t) m->n_embd;
        m->semantic[i] = m->own_embedding_norm > 0 ? hb_maps_dot(m->embedding, stored, m->n_embd) : 0;
        m->dot[i] = m->so_far[i] = 0;
    }
    m->observed = 0;
    m->own_norm = 0;
    match_semantic(m);
}

/* To sum HB_MAPS_ONE. */
static void quantize_probs(const float *from, int32_t n, int16_t *to) {
    double sum = 0;
    for (int32_t i = 0; i < n; i++) {
        sum += from[i] > 0 ? from[i] : 0; /* no numbers are not */
    }
    if (!(sum > 0 && isfinite(sum))) {
        memset(to, 0, (size_t) n * sizeof *to);
        return;
    }
    double scale = HB_MAPS_ONE / sum;
    for (int32_t i = 0; i < n; i++) {
        to[i] = (int16_t) (from[i] > 0 ? from[i] * scale + 0.5 : 0);
    }
}

/* The token has nothing in the layers before `layer` that were passed over, but stored maps may. */
static void pass_over(struct hb_maps *m, int32_t layer) {
    for (; m->observed < layer; m->observed++) {
        const int32_t *norm = m->norm + (size_t) m->observed * (size_t) m->capacity;
        memset(m->own + m->first[m->observed], 0, (size_t) m->n_experts[m->observed] * sizeof *m->own);
        for (int32_t i = 0; i < m->n_maps; i++) {
            m->so_far[i] += norm[i];
        }
    }
}

void hb_maps_observe(struct hb_maps *m, int32_t layer, const float *probs) {
    if (m->observed < 0 || layer < m->observed || layer >= m->n_layers) {
        return;
    }
    pass_over(m, layer);
    int32_t n = m->n_experts[layer];
    int16_t *own = m->own + m->first[layer];
    const int16_t *stored = hb_maps_layer(m, layer);
    const int32_t *norm = m->norm + (size_t) layer * (size_t) m->capacity;
    quantize_probs(probs, n, own);
    m->own_norm += hb_maps_dot(own, own, n);
    for (int32_t i = 0; i < m->n_maps; i++) {
        m->dot[i] += hb_maps_dot(own, stored + (size_t) i * (size_t) n, n);
        m->so_far[i] += norm[i];
    }
    m->observed = layer + 1;
    if (m->observed >= m->distance || m->own_embedding_norm == 0) {
        match_trajectory(m);
    }
}

bool hb_maps_predict(const struct hb_maps *m, int32_t layer, const float **probs, float *score) {
    if (m->observed < 0 || m->match < 0 || layer < m->observed || layer >= m->n_layers ||
        m->norm[(size_t) layer * (size_t) m->capacity + (size_t) m->match] == 0) {
        return false;
    }
    int32_t n = m->n_experts[layer];
    const int16_t *stored = hb_maps_layer(m, layer) + (size_t) m->match * (size_t) n;
    for (int32_t i = 0; i < n; i++) {
        m->predicted[i] = stored[i] * (1.0f / HB_MAPS_ONE);
    }
    *probs = m->predicted;
    *score = m->score;
    return true;
}

/* The store's growth. */

/* The map with the largest RDY. */
static int32_t most_redundant(const struct hb_maps *m) {
    double share = m->distance < m->n_layers ? (double) m->distance / m->n_layers : 1, most = -1;
    int32_t at = 0;
    for (int32_t i = 0; i < m->n_maps; i++) {
        double redundancy = share * cosine(m->semantic[i], m->embedding_norm[i], m->own_embedding_norm) +
                            (1 - share) * cosine(m->dot[i], m->so_far[i], m->own_norm);
        if (redundancy > most) {
            most = redundancy;
            at = i;
        }
    }
    return at;
}

static void put(struct hb_maps *m, int32_t at) {
    size_t n_embd = (size_t) m->n_embd;
    memcpy(m->embeddings + (size_t) at * n_embd, m->embedding, n_embd * sizeof *m->embedding);
    m->embedding_norm[at] = m->own_embedding_norm;
    for (int32_t l = 0; l < m->n_layers; l++) {
        size_t n = (size_t) m->n_experts[l];
        const int16_t *own = m->own + m->first[l];
        memcpy(hb_maps_layer(m, l) + (size_t) at * n, own, n * sizeof *own);
        m->norm[(size_t) l * (size_t) m->capacity + (size_t) at] = hb_maps_dot(own, own, (int32_t) n);
    }
}

void hb_maps_end(struct hb_maps *m) {
    if (m->observed >= 0 && m->own_norm > 0) {
        pass_over(m, m->n_layers);
        put(m, m->n_maps < m->capacity ? m->n_maps++ : most_redundant(m));
    }
    m->observed = -1;
}

int32_t hb_maps_choose(const float *probs, int32_t n, float score, int32_t least, int32_t most, int32_t *experts) {
    float delta = score > 1 ? 0 : score > 0 ? 1 - score : 1, sum = 0, last = INFINITY;
    int32_t chosen = 0, at = -1;
    while (chosen < most && chosen < n && (chosen < least || sum < delta)) {
        int32_t next = -1;
        for (int32_t e = 0; e < n; e++) {
            bool left = probs[e] < last || (probs[e] == last && e > at);
            next = left && (next < 0 || probs[e] > probs[next]) ? e : next;
        }
        if (next < 0) {
            break; /* what is no number is not chosen */
        }
        experts[chosen++] = at = next;
        sum += last = probs[next];
    }
    return chosen;
}
