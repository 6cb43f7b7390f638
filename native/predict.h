/* Layer level (HOBBIT, section 3.3): which experts the next layers will use, from what is known at this one. */
#ifndef HB_PREDICT_H
#define HB_PREDICT_H

#include "block.h"
#include "routing.h"
#include "segment.h"

/* Tell the model what to expect of the layers after the segment's. `memory` is work space; where it is short nothing is
 * predicted. Call it when the segment's own reads are under way. */
void hb_predict(struct hb_block *memory, const struct hb_segment *segment, const struct hb_routing *routing);
/* Whether that will look at the layer's router. */
bool hb_predict_wants_router(const struct hb_segment *segment);

#endif
