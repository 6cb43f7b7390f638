/* Computes experts on a device, in batches of those whose weights are there, while the caller does other things. The
 * arena is one stack for each role and precision of each pool, as all backends want it: matrix after matrix without a gap. */
#ifndef HB_EXECUTOR_H
#define HB_EXECUTOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct hb_costs;
struct hb_dispatcher;
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
/* Most pairs of a batch of the segment. */
int64_t hb_executor_pairs(const struct hb_executor *executor, const struct hb_replicas *segment, int32_t precision);
/* Compute all pairs of these experts, of one precision, whose slots on the device are set. They, and the segment's
 * inputs, have to stay as they are until it is finished. False when memory is short: nothing was started. */
bool hb_executor_start(struct hb_executor *executor, const struct hb_routed *const *experts, int n_experts);
/* Of the batch that was started. When it failed, `why` says so. */
enum hb_executed hb_executor_finish(struct hb_executor *executor, bool wait, char *why, size_t why_len);
/* How many batches and copies have ended; and wait until it is another number, but not for long. */
uint64_t hb_executor_ended(const struct hb_executor *executor);
void hb_executor_await(const struct hb_executor *executor, uint64_t ended);
/* After it is done: copy its rows to where the real graph expects them. */
void hb_executor_scatter(struct hb_executor *executor);
uint64_t hb_executor_ns(const struct hb_executor *executor); /* that the last batch took */
uint64_t hb_executor_busy_ns(const struct hb_executor *executor); /* in which the device computed, copied, or both */
/* Of both sides, up to date with the copies that were made; and who gets what by them. */
struct hb_costs *hb_executor_costs(struct hb_executor *executor);
struct hb_dispatcher *hb_executor_dispatcher(struct hb_executor *executor);
/* A layer begins: how many bytes could be copied there in a pass of this many layers, in half of the time in which who
 * copies has had nothing to do lately. */
uint64_t hb_executor_spare(struct hb_executor *executor, int32_t n_layers);
int32_t hb_executor_precision(const struct hb_executor *executor); /* of the last batch */

void hb_executor_free(struct hb_executor *executor); /* on the worker's thread; NULL is fine */

#endif
