/* Computes experts on a device, in batches of those whose weights are there, while the caller does other things. The
 * arena is one stack for each role of each pool, as all backends want it: matrix after matrix without a gap. */
#ifndef HB_EXECUTOR_H
#define HB_EXECUTOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct hb_executor;
struct hb_replicas;
struct hb_routed;

enum hb_executed {
    HB_EXECUTED_NOT_YET,
    HB_EXECUTED_DONE,
    HB_EXECUTED_UNSUPPORTED, /* the device cannot compute this layer */
    HB_EXECUTED_TOO_LARGE,   /* this batch, for its memory */
    HB_EXECUTED_FAILED,      /* and it will be no better next time */
};

/* Begin with a segment, after hb_replicas_keep_inputs. */
void hb_executor_begin(struct hb_executor *executor, const struct hb_replicas *segment);
int64_t hb_executor_pairs(const struct hb_executor *executor, int32_t group); /* most of a batch */
/* Compute all pairs of these experts, whose slots on the device are set. They, and the segment's inputs, have to stay as
 * they are until it is finished. False when memory is short: nothing was started. */
bool hb_executor_start(struct hb_executor *executor, const struct hb_routed *const *experts, int n_experts);
/* Of the batch that was started. When it failed, `why` says so. */
enum hb_executed hb_executor_finish(struct hb_executor *executor, bool wait, char *why, size_t why_len);
/* After it is done: copy its rows to where the real graph expects them. */
void hb_executor_scatter(struct hb_executor *executor);
uint64_t hb_executor_ns(const struct hb_executor *executor); /* that the last batch took */

void hb_executor_free(struct hb_executor *executor); /* on the worker's thread; NULL is fine */

#endif
