/* How often each node of a batch is used, in a table like that of a graph that ggml built: backends fuse a node into the
 * only one that uses it. */
#ifndef HB_USES_H
#define HB_USES_H

#include <stdbool.h>
#include <stdint.h>

#include "segment.h"

#define HB_USES_SIZE (4 * HB_SEGMENT_NODES)

struct ggml_cgraph;

struct hb_uses {
    uint32_t used[(HB_USES_SIZE + 31) / 32];
    struct ggml_tensor *keys[HB_USES_SIZE];
    int32_t counts[HB_USES_SIZE];
};

/* Count for the nodes of the graph, at most HB_SEGMENT_NODES, and give it the table. What is wanted outside, or used
 * through a view, is used more than once. */
void hb_uses_count(struct hb_uses *uses, struct ggml_cgraph *graph, const bool *wanted_outside);

#endif
