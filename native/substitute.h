/* Cache-aware routing (Skliar et al., "Cache-Conditional Experts", arXiv 2412.00099), the rule that others have: here
 * so that hobbit's own is compared with it in one engine.
 *
 *   z'_e = z_e + lambda * D * m_e
 *
 * z are the router's logits, m_e is 1 where expert e is cached, D is the mean so far of max z - min z in this layer.
 * z' only selects; the gate weights are those that z gives to the selected. The best expert by z always stays. */
#ifndef HB_SUBSTITUTE_H
#define HB_SUBSTITUTE_H

#include <stdbool.h>

#include "block.h"
#include "segment.h"

/* Change the segment's ids and gate weights, where they are, by the model's lambda; nothing where that is 0. For
 * routers that are a softmax over all experts of a linear layer. On failure false, and the model keeps the error. */
bool hb_substitute(struct hb_block *memory, const struct hb_segment *segment);

#endif
