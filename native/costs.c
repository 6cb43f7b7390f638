#include "costs.h"

/* Both parts wander by so much between measurements; but they are never less certain than at start. */
#define WANDER 1e-4
#define FIRST_VARIANCE 1.0
/* A measurement may deviate by about so much, relative to itself. */
#define NOISE 0.1
#define MOST_SURPRISE 4.0
#define LEAST_SCALE 0.01
/* A batch takes at least so long: what a thread needs to be told of it. */
#define LEAST_FIXED_NS 1000.0
/* No ubatch has more rows. */
#define MOST_PAIRS 65536

void hb_costs_set(struct hb_costs *c, enum hb_lane lane, double fixed_ns, const struct hb_curve *curve) {
    double fixed = fixed_ns > LEAST_FIXED_NS ? fixed_ns : LEAST_FIXED_NS;
    c->curves[lane] = *curve;
    c->lines[lane] = (struct hb_line) {
        .fixed = fixed, .scale = 1, .variance = {FIRST_VARIANCE, 0, FIRST_VARIANCE}, .unit = fixed};
}

static double ns_per_byte(const struct hb_curve *c, double pairs) {
    int32_t last = c->n_points - 1, at = 0;
    if (last == 0 || pairs <= c->points[0].pairs) {
        return c->points[0].ns_per_byte;
    }
    while (at + 2 < c->n_points && pairs > c->points[at + 1].pairs) {
        at++;
    }
    double from = c->points[at].pairs, to = c->points[at + 1].pairs;
    double a = c->points[at].ns_per_byte, b = c->points[at + 1].ns_per_byte;
    double value = a + (b - a) * (pairs - from) / (to - from);
    return value > 0 ? value : b; /* noise may have the last two descend */
}

double hb_costs_work(const struct hb_costs *c, enum hb_lane lane, int32_t n_pairs, uint64_t bytes) {
    return ns_per_byte(&c->curves[lane], n_pairs) * (double) bytes;
}

double hb_costs_expert(const struct hb_costs *c, enum hb_lane lane, int32_t n_pairs, uint64_t bytes) {
    return c->lines[lane].scale * hb_costs_work(c, lane, n_pairs, bytes);
}

double hb_costs_fixed(const struct hb_costs *c, enum hb_lane lane) {
    return c->lines[lane].fixed;
}

static bool pays_to_copy(const struct hb_costs *c, int32_t n_pairs, uint64_t bytes) {
    double there = hb_costs_fixed(c, HB_LANE_UPLOAD) + hb_costs_expert(c, HB_LANE_UPLOAD, 1, bytes) +
                   hb_costs_fixed(c, HB_LANE_DEVICE) + hb_costs_expert(c, HB_LANE_DEVICE, n_pairs, bytes);
    return there < hb_costs_fixed(c, HB_LANE_CPU) + hb_costs_expert(c, HB_LANE_CPU, n_pairs, bytes);
}

int32_t hb_costs_break_even(const struct hb_costs *c, uint64_t bytes) {
    int32_t most = 1, least = 0; /* does not pay */
    while (most <= MOST_PAIRS && !pays_to_copy(c, most, bytes)) {
        least = most;
        most *= 2;
    }
    while (most <= MOST_PAIRS && most - least > 1) {
        int32_t middle = least + (most - least) / 2;
        *(pays_to_copy(c, middle, bytes) ? &most : &least) = middle;
    }
    return most <= MOST_PAIRS ? most : 0;
}

static double within(double value, double least, double most) {
    return value < least ? least : value > most ? most : value;
}

/* The features of a measurement are 1 and w = work / unit; what is fitted is fixed / unit and scale. */
void hb_costs_learn(struct hb_costs *c, enum hb_lane lane, double work, double ns) {
    struct hb_line *l = &c->lines[lane];
    double *p = l->variance, w = work / l->unit, expected = l->fixed / l->unit + l->scale * w;
    double got = within(ns / l->unit, expected / MOST_SURPRISE, expected * MOST_SURPRISE);
    double noise = (NOISE * got) * (NOISE * got);
    double p1 = p[0] + p[1] * w, p2 = p[1] + p[2] * w; /* variance times features */
    double total = p1 + w * p2 + noise;
    double k1 = p1 / total, k2 = p2 / total, error = got - expected;
    l->fixed = within(l->fixed + l->unit * k1 * error, LEAST_FIXED_NS, l->fixed * MOST_SURPRISE);
    l->scale = within(l->scale + k2 * error, LEAST_SCALE, l->scale * MOST_SURPRISE);
    p[0] = p[0] - k1 * p1;
    p[1] = p[1] - k1 * p2;
    p[2] = p[2] - k2 * p2;
    p[0] += p[0] + WANDER < FIRST_VARIANCE ? WANDER : 0;
    p[2] += p[2] + WANDER < FIRST_VARIANCE ? WANDER : 0;
}
