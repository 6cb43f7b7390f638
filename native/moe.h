/* Computes a split: the expert part of a layer, with ggml's own kernels on streamed weights.
 *
 * A segment is computed in place when all its experts are cached, or else in batches of those experts that are in
 * memory: the hits first, while the misses are read, then the arrivals. A row of the result depends on its own
 * (token, expert) pair only, and all rows of one copy of an expert are computed together, so the grouping does not
 * change a bit of it. (A rule that is per token divides the rows of an expert by need: ggml's K-quant kernels may round
 * fewer rows otherwise.)
 *
 * A workspace belongs to one llama_context; the model's lock serialises the workspaces on one model.
 */
#ifndef HB_MOE_H
#define HB_MOE_H

#include <stdbool.h>

#include "ggml.h"

struct ggml_cgraph;
struct hb_moe;

/* Whether we compute this operation: the single statement of what a split may hold. */
bool hb_moe_supports(const struct ggml_tensor *op);

struct hb_moe *hb_moe_new(void); /* NULL when memory is short */
void hb_moe_free(struct hb_moe *moe);
void hb_moe_set_n_threads(struct hb_moe *moe, int n_threads);
void hb_moe_set_abort_callback(struct hb_moe *moe, ggml_abort_callback callback, void *data);
enum ggml_status hb_moe_compute(struct hb_moe *moe, const struct ggml_cgraph *graph);

#endif
