/* A run of graph nodes whose MUL_MAT_IDs share one routing: what is computed at once. */
#ifndef HB_SEGMENT_H
#define HB_SEGMENT_H

#include <stdbool.h>
#include <stdint.h>

#include "catalog.h"
#include "ggml.h"

struct ggml_cgraph;
struct hobbit_model;
struct hb_seen;

#define HB_SEGMENT_NODES 64

/* What `extra` of an expert weight tensor points at. */
struct hb_weight {
    struct hobbit_model *model;
    const struct hb_matrix *matrix;
    struct hb_seen *seen; /* or NULL */
};

extern const char hb_buffer_type_name[]; /* identifies our weights, by address */

/* The tensor is in a buffer of ours. In a model that was loaded without memory its weight is unknown. */
bool hb_segment_is_streamed(const struct ggml_tensor *tensor);
/* The streamed matrix behind a weight tensor; NULL when there is none. */
const struct hb_weight *hb_segment_weight(const struct ggml_tensor *tensor);

struct hb_segment {
    struct ggml_tensor **nodes;
    int n_nodes;
    const struct ggml_cgraph *graph; /* the split it is a part of */
    struct hobbit_model *model;      /* NULL when no node is a MUL_MAT_ID: plain operations */
    int32_t group;
    const struct ggml_tensor *ids;   /* I32 [n_used, n_tokens] */
    const struct ggml_tensor *weights; /* F32 [1, n_used, n_tokens], the gate weights; NULL where they are not seen */
    bool escapes[HB_SEGMENT_NODES];  /* the node's value is wanted outside the segment */
};

/* The segment that begins at node `begin`. */
struct hb_segment hb_segment_next(const struct ggml_cgraph *graph, int begin);
/* Index of the node, or -1. */
int hb_segment_find(const struct hb_segment *segment, const struct ggml_tensor *tensor);

#endif
