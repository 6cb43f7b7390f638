/* The store behind maps.h, for its own files. */
#ifndef HB_MAPS_IMPL_H
#define HB_MAPS_IMPL_H

#include "maps.h"

#define HB_MAPS_ONE 32767 /* a probability, or a unit vector's length, in fixed point */

/* Fixed point: a layer's probabilities sum to HB_MAPS_ONE and an embedding's length is that, but for rounding, so every
 * dot product of two of them fits 32 bits, in whatever order it is summed. Sums over layers are whole numbers that a
 * double holds exactly. */
struct hb_maps {
    int32_t n_layers, n_embd, capacity, distance;
    int32_t n_maps;
    int32_t *n_experts; /* [n_layers] */
    size_t *first;      /* [n_layers] experts of all layers before */

    /* Stored maps, m < n_maps. */
    int16_t *embeddings;     /* [capacity][n_embd] */
    int32_t *embedding_norm; /* [capacity] squared; 0: it has none */
    int16_t *probs;          /* [n_layers][capacity][n_experts[layer]] */
    int32_t *norm;           /* [n_layers][capacity] squared */

    /* The token that was begun. */
    int32_t observed; /* layers, those passed over included; -1: no token was begun */
    int16_t *embedding;
    int32_t own_embedding_norm;
    int16_t *own;    /* [sum of n_experts] */
    double own_norm; /* squared */
    /* With each stored map, over the observed layers. */
    int32_t *semantic; /* [capacity] dot products of embeddings */
    double *dot;       /* [capacity] */
    double *so_far;    /* [capacity] the stored map's squared norm */
    int32_t match;     /* -1: none is alike */
    float score;
    float *predicted; /* [largest of n_experts] */
};

int32_t hb_maps_dot(const int16_t *a, const int16_t *b, int32_t n);
/* Where the maps' probabilities of a layer are: capacity rows of n_experts[layer]. */
int16_t *hb_maps_layer(const struct hb_maps *maps, int32_t layer);

#endif
