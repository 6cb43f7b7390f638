/* What it takes to compute, copy and read experts: measured at start, and again with all that is done.
 *
 * A batch on a lane takes   fixed + scale * (the sum of its experts' work)   ns. The work of an expert is its bytes times
 * the ns a byte that were measured for about so many pairs at start; fixed and scale follow what batches take now: they
 * are the state of a Kalman filter, and wander. Pure: the caller measures. */
#ifndef HB_COSTS_H
#define HB_COSTS_H

#include <stdbool.h>
#include <stdint.h>

enum hb_lane {
    HB_LANE_CPU,    /* computes what is in the host's memory */
    HB_LANE_DEVICE, /* computes what is in its own */
    HB_LANE_UPLOAD, /* copies from the host's memory to the device's */
    HB_LANE_READ,   /* reads from the disk into the host's memory */
    HB_LANES,
};

#define HB_CURVE_POINTS 8

/* ns a byte of weights by the number of pairs, which ascends. Between the points it is interpolated; beyond the last
 * one it goes on as between the last two. */
struct hb_curve {
    int32_t n_points;
    struct {
        double pairs, ns_per_byte;
    } points[HB_CURVE_POINTS];
};

/* The fit of one lane. */
struct hb_line {
    double fixed, scale;
    double variance[3]; /* of fixed, of both, of scale: in units of the first measurement's fixed part, and 1 */
    double unit;
};

struct hb_costs {
    bool copies_overlap; /* what is copied to the device is while it computes, else by turns */
    struct hb_curve curves[HB_LANES];
    struct hb_line lines[HB_LANES];
};

/* As measured at start: a lane's fixed part in ns, and its curve, of at least one point. */
void hb_costs_set(struct hb_costs *costs, enum hb_lane lane, double fixed_ns, const struct hb_curve *curve);
/* The work of an expert, in ns as of the start. */
double hb_costs_work(const struct hb_costs *costs, enum hb_lane lane, int32_t n_pairs, uint64_t bytes);
/* What it adds to a batch, in ns as of now; and what any batch takes besides. */
double hb_costs_expert(const struct hb_costs *costs, enum hb_lane lane, int32_t n_pairs, uint64_t bytes);
double hb_costs_fixed(const struct hb_costs *costs, enum hb_lane lane);
/* From how many pairs on an expert that is only here is done sooner on the device, its copy included, than here: that of
 * `bytes`, alone, as Fiddler asks it. 0: never. */
int32_t hb_costs_break_even(const struct hb_costs *costs, uint64_t bytes);
/* A batch of so much work took so long. One measurement counts for no more than MOST_SURPRISE times what was expected:
 * what took much longer was perhaps interrupted. */
void hb_costs_learn(struct hb_costs *costs, enum hb_lane lane, double work, double ns);

#endif
