#include "dispatch.h"

#include <stdlib.h>

/* Layers until it is asked whether a side that is not used can be tried, and then again; and the share of the time since
 * it was used that this may cost. */
#define PATIENCE 256
#define ASK_AGAIN 16
#define TRY_SHARE 0.01
/* Of looking for an item that is better off on the other side. */
#define ROUNDS 3
/* Of divisions that end at about the same time, that which keeps both less busy. */
#define BUSY_WEIGHT 0.01

/* Of the dispatcher's `idle`. */
enum { CPU, DEVICE };

/* What the two sides of a division have to do. */
struct loads {
    double cpu, device, copy, read; /* sums, in ns */
    double after_cpu, after_device; /* what is to be done after a read: sums, too */
    double copied; /* of `device`, that of what is copied */
    int32_t n_cpu, n_device, n_copied;
    int32_t read_cpu, read_device;  /* experts */
};

void hb_dispatcher_set(struct hb_dispatcher *d, int32_t mode) {
    *d = (struct hb_dispatcher) {.mode = mode, .more = true};
}

static double larger(double a, double b) {
    return a > b ? a : b;
}

static bool is_read(const struct hb_item *i, bool by_device) {
    return !i->here && !(by_device && i->there);
}

/* Take an item in, or with `sign` -1 out again. */
static void count(struct loads *l, const struct hb_item *i, bool by_device, int sign) {
    bool read = is_read(i, by_device);
    l->read += read ? sign * i->read : 0;
    if (by_device) {
        double copy = i->there ? 0 : i->copy;
        l->n_device += sign;
        l->device += sign * i->device;
        l->copy += sign * copy;
        l->copied += i->there ? 0 : sign * i->device;
        l->n_copied += i->there ? 0 : sign;
        l->read_device += sign * read;
        l->after_device += read ? sign * (copy + i->device) : 0;
    } else {
        l->n_cpu += sign;
        l->cpu += sign * i->cpu;
        l->read_cpu += sign * read;
        l->after_cpu += read ? sign * i->cpu : 0;
    }
}

/* What is read last is still to be computed: the mean of those. */
static double end(double fixed, double busy, double read, int32_t n_read, double after) {
    return fixed + larger(busy, n_read > 0 ? read + after / n_read : 0);
}

/* Copies and computing: by turns, in one batch; or what is there is computed meanwhile, and then what has come, in a
 * batch more. The first copy and the last expert have nothing to overlap with. */
static double device_busy(const struct hb_costs *c, const struct loads *l) {
    double turns = l->device + l->copy;
    if (!c->copies_overlap || l->n_copied == 0) {
        return turns;
    }
    double first = l->copy / l->n_copied, last = l->copied / l->n_copied, there = l->device - l->copied;
    double idle = first > there ? first - there : 0;
    double overlapped = hb_costs_fixed(c, HB_LANE_DEVICE) + larger(idle + l->device, l->copy + last);
    return overlapped < turns ? overlapped : turns;
}

static struct hb_division ends(const struct hb_costs *c, const struct loads *l) {
    struct hb_division t = {.n_device = l->n_device};
    if (l->n_cpu > 0) {
        t.cpu = end(hb_costs_fixed(c, HB_LANE_CPU), l->cpu, l->read, l->read_cpu, l->after_cpu);
    }
    if (l->n_device > 0) {
        double busy = device_busy(c, l);
        t.device = end(hb_costs_fixed(c, HB_LANE_DEVICE), busy, l->read, l->read_device, l->after_device);
    }
    return t;
}

static struct loads loads_of(const struct hb_item *items, int32_t n) {
    struct loads l = {0};
    for (int32_t i = 0; i < n; i++) {
        count(&l, &items[i], items[i].to_device, 1);
    }
    return l;
}

struct hb_division hb_dispatch_time(const struct hb_costs *c, const struct hb_item *items, int32_t n) {
    struct loads l = loads_of(items, n);
    return ends(c, &l);
}

static void set_costs(const struct hb_costs *c, struct hb_item *i) {
    i->cpu = hb_costs_expert(c, HB_LANE_CPU, i->n_pairs, i->bytes);
    i->device = hb_costs_expert(c, HB_LANE_DEVICE, i->n_pairs, i->bytes);
    i->copy = hb_costs_expert(c, HB_LANE_UPLOAD, 1, i->bytes);
    i->read = hb_costs_expert(c, HB_LANE_READ, 1, i->bytes);
    double there = i->device + (i->there ? 0 : i->copy) + (is_read(i, true) ? i->read : 0);
    i->ratio = i->may_be_there ? (i->cpu + (is_read(i, false) ? i->read : 0)) / there : -1;
}

static int by_ratio(const void *a, const void *b) {
    const struct hb_item *x = a, *y = b;
    return x->ratio > y->ratio ? -1 : x->ratio < y->ratio ? 1 : (x->index > y->index) - (x->index < y->index);
}

static double end_of(const struct hb_division *t) {
    return larger(t->cpu, t->device);
}

static double cost(const struct hb_division *t) {
    return end_of(t) + BUSY_WEIGHT * (t->cpu + t->device);
}

/* The best point of division from `least` to `most`. */
static struct hb_division divide(const struct hb_costs *c, struct hb_item *items, int32_t n, int32_t least,
                                 int32_t most) {
    struct hb_division best = {.n_device = -1};
    for (int32_t i = 0; i < n; i++) {
        items[i].to_device = false;
    }
    struct loads l = loads_of(items, n);
    for (int32_t k = 0; k <= most; k++) {
        struct hb_division t = ends(c, &l);
        if (k >= least && (best.n_device < 0 || cost(&t) < cost(&best))) {
            best = t;
        }
        if (k < most) {
            count(&l, &items[k], false, -1);
            count(&l, &items[k], true, 1);
        }
    }
    for (int32_t i = 0; i < best.n_device; i++) {
        items[i].to_device = true;
    }
    return best;
}

/* Items are whole, and have their copies and reads in common: move those over by which the layer ends earlier. */
static void improve(const struct hb_costs *c, struct hb_item *items, int32_t n, int32_t least, int32_t most,
                    struct hb_division *best) {
    struct loads l = loads_of(items, n);
    bool better = true;
    for (int round = 0; round < ROUNDS && better; round++) {
        better = false;
        for (int32_t i = 0; i < n; i++) {
            struct loads before = l;
            if (!items[i].may_be_there) {
                continue;
            }
            count(&l, &items[i], items[i].to_device, -1);
            count(&l, &items[i], !items[i].to_device, 1);
            struct hb_division t = ends(c, &l);
            if (t.n_device < least || t.n_device > most || cost(&t) >= cost(best)) {
                l = before;
                continue;
            }
            items[i].to_device = !items[i].to_device;
            *best = t;
            better = true;
        }
    }
}

static struct hb_division best(const struct hb_costs *c, struct hb_item *items, int32_t n, int32_t least,
                               int32_t most) {
    struct hb_division t = divide(c, items, n, least, most);
    improve(c, items, n, least, most, &t);
    return t;
}

/* Whether the layer would end no later if the device had one more: it is brought one now, or could compute one of the
 * CPU's, that which takes least. */
static bool wants_more(const struct hb_costs *c, const struct hb_item *items, int32_t n, const struct hb_division *now) {
    double least = -1;
    for (int32_t i = 0; i < n; i++) {
        if (items[i].to_device && !items[i].there) {
            return true;
        }
        bool can = items[i].may_be_there && !items[i].to_device;
        least = can && (least < 0 || items[i].device < least) ? items[i].device : least;
    }
    double device = now->n_device > 0 ? now->device : hb_costs_fixed(c, HB_LANE_DEVICE);
    return least < 0 || device + least <= end_of(now);
}

/* Count a layer that takes `ns`. Whether a side was idle for so long that it may be time to try it. */
static bool is_due(struct hb_dispatcher *d, int side, bool used, double ns) {
    d->idle[side] = used ? 0 : d->idle[side] + 1;
    d->passed[side] = used ? 0 : d->passed[side] + ns;
    return d->idle[side] >= PATIENCE && d->idle[side] % ASK_AGAIN == 0;
}

/* Whether what was divided so that an idle side is tried may take so much longer. */
static bool is_cheap(struct hb_dispatcher *d, int side, const struct hb_division *tried, double ns) {
    bool cheap = end_of(tried) - ns <= TRY_SHARE * d->passed[side];
    d->idle[side] = cheap ? 0 : d->idle[side];
    d->passed[side] = cheap ? 0 : d->passed[side];
    return cheap;
}

static struct hb_division choose(struct hb_dispatcher *d, const struct hb_costs *c, struct hb_item *items, int32_t n) {
    int32_t can = 0, there = 0;
    for (int32_t i = 0; i < n; i++) {
        can += items[i].may_be_there;
        there += items[i].may_be_there && items[i].there;
    }
    struct hb_division t = best(c, items, n, 0, can);
    double ns = end_of(&t);
    d->more = wants_more(c, items, n, &t);
    bool tries_device = there > 0 && is_due(d, DEVICE, t.n_device > 0, ns);
    bool tries_cpu = n > 1 && is_due(d, CPU, t.n_device < n, ns);
    if (!tries_device && !tries_cpu) {
        return t;
    }
    int32_t least = tries_device ? 1 : 0, most = tries_device || can < n ? can : n - 1;
    struct hb_division tried = best(c, items, n, least, most);
    return is_cheap(d, tries_device ? DEVICE : CPU, &tried, ns) ? tried : best(c, items, n, 0, can);
}

struct hb_division hb_dispatch(struct hb_dispatcher *d, const struct hb_costs *c, struct hb_item *items, int32_t n) {
    for (int32_t i = 0; i < n; i++) {
        set_costs(c, &items[i]);
        items[i].to_device = items[i].may_be_there && (d->mode == HOBBIT_DISPATCH_DEVICE || items[i].there);
    }
    if (d->mode != HOBBIT_DISPATCH_AUTO) {
        return hb_dispatch_time(c, items, n);
    }
    qsort(items, (size_t) n, sizeof items[0], by_ratio);
    return choose(d, c, items, n);
}
