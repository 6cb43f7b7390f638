/* Gives each expert of a layer's routing its precision: by the model's rule and what is cached, or by a schedule. */
#ifndef HB_PRECISION_H
#define HB_PRECISION_H

#include <stdbool.h>

#include "block.h"
#include "routing.h"
#include "segment.h"

/* Where no rule and no schedule is in force all experts stay HIGH. `*token_scale` is set to [n_tokens] factors for the
 * gate weights, in `memory`, or to NULL. On failure false, and the model keeps the error. */
bool hb_precision_choose(struct hb_block *memory, const struct hb_segment *segment, struct hb_routing *routing,
                         const float **token_scale);

#endif
