#include "uses.h"

#include <string.h>

#include "ggml-impl.h"

static void use(struct ggml_cgraph *graph, const struct ggml_tensor *t, int32_t times) {
    size_t at = ggml_hash_find(&graph->visited_hash_set, t);
    if (ggml_bitset_get(graph->visited_hash_set.used, at)) {
        graph->use_counts[at] += times;
    }
}

void hb_uses_count(struct hb_uses *uses, struct ggml_cgraph *graph, const bool *wanted_outside) {
    memset(uses, 0, sizeof *uses);
    graph->use_counts = uses->counts;
    graph->visited_hash_set = (struct ggml_hash_set) {.size = HB_USES_SIZE, .used = uses->used, .keys = uses->keys};
    for (int i = 0; i < graph->n_nodes; i++) {
        (void) ggml_hash_insert(&graph->visited_hash_set, graph->nodes[i]);
    }
    for (int i = 0; i < graph->n_nodes; i++) {
        use(graph, graph->nodes[i], wanted_outside[i] ? 2 : 0);
        for (int k = 0; k < GGML_MAX_SRC; k++) {
            const struct ggml_tensor *src = graph->nodes[i]->src[k];
            for (int32_t times = 1; src != NULL; times = 2, src = src->view_src) {
                use(graph, src, times);
            }
        }
    }
}
