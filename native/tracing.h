/* Writes the routing of segments to the model's trace. */
#ifndef HB_TRACING_H
#define HB_TRACING_H

#include <stdbool.h>

#include "block.h"
#include "rows.h"
#include "segment.h"

/* What the router chose for a segment whose ids are known to be experts of its group; nothing where there is no trace.
 * `owners` says whose its rows are; `memory` is work space. On failure false, and the model keeps the error. */
bool hb_tracing_write(struct hb_block *memory, const struct hb_segment *segment, const struct hb_owners *owners);

#endif
