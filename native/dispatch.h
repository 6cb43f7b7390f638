/* Who computes which expert of a layer: the CPU or the device, at the same time, so that the last one ends early.
 *
 * Four lanes work at the same time (hb_lane). An expert computed by the device costs the device's time, and a copy if it
 * is not there yet; one computed by the CPU the CPU's; either a read, if it is in no memory. The layer ends with the
 * last lane. The device gets those for which it is best suited, in the order of the ratio of both costs, up to the best
 * point; then whole experts are moved over while that has the layer end earlier: O(n log n). So the CPU
 * gets a share r_c / (r_c + r_d) of the work, by the rates of both, as Park, Jo and Egger have it; and an expert's
 * weights go to the device when its pairs are so many that the CPU would take longer, as Fiddler has it. Pure. */
#ifndef HB_DISPATCH_H
#define HB_DISPATCH_H

#include <stdbool.h>
#include <stdint.h>

#include "costs.h"
#include "hobbit.h"

struct hb_item {
    int32_t index; /* the caller's */
    int32_t n_pairs;
    uint64_t bytes;
    bool here, there;   /* its weights are in the host's memory, in the device's */
    bool may_be_there;  /* the device can compute it, or could if it had it */
    bool to_device;     /* the result */
    double ratio;       /* the rest is ours */
    double cpu, device, copy, read;
};

/* What a division takes, in ns. */
struct hb_division {
    int32_t n_device; /* items */
    double cpu, device; /* until each is done, if it has anything to do; reads and copies included */
};

/* Remembers of one model's layers what was chosen, so that what is not used is tried again some time: what that takes
 * longer is at most a hundredth of all. */
struct hb_dispatcher {
    int32_t mode; /* hobbit_dispatch */
    int32_t idle[2];  /* layers without the CPU, and without the device */
    double passed[2]; /* what these took, in ns */
    bool more; /* of the last layer: one expert more on the device would have done no harm */
};

void hb_dispatcher_set(struct hb_dispatcher *dispatcher, int32_t mode);
/* Choose for all items; their order changes. */
struct hb_division hb_dispatch(struct hb_dispatcher *dispatcher, const struct hb_costs *costs, struct hb_item *items,
                               int32_t n);
/* When a division would be done; the costs of its items are set. */
struct hb_division hb_dispatch_time(const struct hb_costs *costs, const struct hb_item *items, int32_t n);

#endif
