/* The device's part of a wave. */
#include "wave.h"

struct hb_key hb_wave_key(const struct hb_wave *w, const struct hb_routed *e) {
    return (struct hb_key) {w->segment->group, e->expert, e->precision};
}

static uint64_t bytes_of(const struct hb_wave *w, const struct hb_routed *e) {
    return hb_model_catalog(w->segment->model)->groups[w->segment->group].copies[e->precision].expert_bytes;
}

static struct hb_tier *tier_of(const struct hb_wave *w) {
    return hb_model_tier(w->segment->model);
}

/* --- who computes which --- */

/* Ask both memories for each expert; one that is on the device is pinned there. */
static int32_t ask(struct hb_wave *w, struct hb_item *items) {
    int32_t n = 0;
    int64_t most[HOBBIT_PRECISIONS];
    for (int32_t p = 0; p < HOBBIT_PRECISIONS; p++) {
        most[p] = hb_executor_pairs(w->device, w->replicas, p);
    }
    for (int32_t i = 0; i < w->routing->n_experts; i++) {
        struct hb_routed *e = &w->routing->experts[i];
        if (e->precision == HOBBIT_SKIP) {
            continue;
        }
        e->slot = hb_tier_look_up(tier_of(w), hb_wave_key(w, e), e->n_pairs);
        items[n++] = (struct hb_item) {
            .index = i,
            .n_pairs = e->n_pairs,
            .bytes = bytes_of(w, e),
            .here = hb_model_is_here(w->segment->model, hb_wave_key(w, e)),
            .there = e->slot >= 0,
            .may_be_there = e->n_pairs <= most[e->precision] && !hb_tier_declines(tier_of(w), hb_wave_key(w, e)),
        };
    }
    return n;
}

static void settle(struct hb_wave *w, const struct hb_item *item) {
    struct hb_routed *e = &w->routing->experts[item->index];
    e->to_device = item->to_device;
    if (item->there && item->to_device) {
        hb_model_hit_there(w->segment->model, hb_wave_key(w, e));
        e->state = HB_THERE;
        w->there++;
        return;
    }
    if (item->there) {
        hb_tier_release(tier_of(w), hb_wave_key(w, e));
    }
    hb_wave_look_up(w, e);
}

bool hb_split_look_up(struct hb_wave *w) {
    struct hb_dispatcher *dispatcher = hb_executor_dispatcher(w->device);
    if (!hb_block_reserve(w->items, (size_t) w->routing->n_experts * sizeof(struct hb_item))) {
        return false;
    }
    struct hb_item *items = hb_block_take(w->items, (size_t) w->routing->n_experts * sizeof *items);
    w->busy_ns = hb_executor_busy_ns(w->device);
    int32_t n = ask(w, items);
    const struct hb_costs *costs = hb_executor_costs(w->device);
    (void) hb_dispatch(dispatcher, costs, items, n);
    if (w->segment->group == 0 && n > 0) {
        int32_t pairs = hb_costs_break_even(costs, items[0].bytes);
        atomic_store(&hb_model_counters(w->segment->model)->break_even_pairs, (uint64_t) pairs);
    }
    uint64_t spare = hb_executor_spare(w->device, hb_model_catalog(w->segment->model)->n_groups);
    bool automatic = dispatcher->mode == HOBBIT_DISPATCH_AUTO;
    hb_tier_admit(tier_of(w), !automatic || dispatcher->more, automatic ? spare : UINT64_MAX);
    for (int32_t i = 0; i < n; i++) {
        settle(w, &items[i]);
    }
    return true;
}

/* --- what the device is to have --- */

void hb_wave_is_ready(struct hb_wave *w, struct hb_routed *e) {
    e->state = HB_READY;
    w->to_copy += e->to_device;
    w->ready += !e->to_device;
}

static void compute_here(struct hb_wave *w, struct hb_routed *e) {
    e->to_device = false;
    w->to_copy--;
    w->ready++;
}

/* Begin to copy what is here and to be computed there. */
static void copy(struct hb_wave *w) {
    struct hobbit_model *model = w->segment->model;
    for (int32_t i = 0; i < w->routing->n_experts && w->to_copy > 0; i++) {
        struct hb_routed *e = &w->routing->experts[i];
        if (e->state != HB_READY || !e->to_device) {
            continue;
        }
        enum hb_brought brought = hb_model_bring(model, hb_wave_key(w, e));
        if (brought == HB_BROUGHT_WAIT && w->copying + w->there + w->sent > 0) {
            return;
        }
        if (brought == HB_BROUGHT_WAIT || brought == HB_BROUGHT_NEVER) {
            compute_here(w, e);
            continue;
        }
        hb_model_release(model, hb_wave_key(w, e)); /* a copy that is under way has a pin of its own */
        e->state = HB_COPYING;
        w->to_copy--;
        w->copying++;
    }
}

/* Look for copies that have arrived; false: none has, nor any other than the wave's. */
static bool arrive(struct hb_wave *w) {
    bool any = hb_model_take_uploads(w->segment->model, false);
    for (int32_t i = 0; i < w->routing->n_experts && w->copying > 0 && tier_of(w) != NULL; i++) {
        struct hb_routed *e = &w->routing->experts[i];
        int32_t slot = e->state == HB_COPYING ? hb_tier_arrived(tier_of(w), hb_wave_key(w, e)) : -1;
        if (slot == -1) {
            continue;
        }
        any = true;
        w->copying--;
        e->slot = slot;
        e->state = slot >= 0 ? HB_THERE : HB_MISSING;
        e->to_device = slot >= 0;
        w->there += slot >= 0;
        w->next_missing = slot >= 0 ? w->next_missing : 0;
    }
    return any;
}

/* --- batches --- */

static void release_there(struct hb_wave *w, struct hb_routed *e, int32_t state) {
    if (tier_of(w) != NULL) {
        hb_tier_release(tier_of(w), hb_wave_key(w, e));
    }
    w->there -= e->state == HB_THERE;
    w->sent -= e->state == HB_SENT;
    w->done += state == HB_DONE;
    e->state = state;
    e->to_device = false;
}

/* Those in one state are done, or missing after all: then they are computed here. */
static void end_there(struct hb_wave *w, int32_t from, int32_t to) {
    for (int32_t i = 0; i < w->routing->n_experts; i++) {
        if (w->routing->experts[i].state == from) {
            release_there(w, &w->routing->experts[i], to);
        }
    }
    w->next_missing = to == HB_MISSING ? 0 : w->next_missing;
}

/* As many of one precision as fit a batch; those too large for any are computed here. */
static int choose(struct hb_wave *w, const struct hb_routed **experts) {
    int64_t most = 0, left = 0;
    int n = 0;
    for (int32_t i = 0; i < w->routing->n_experts; i++) {
        struct hb_routed *e = &w->routing->experts[i];
        if (n > 0 && e->precision != experts[0]->precision) {
            continue;
        }
        if (n == 0 && e->state == HB_THERE) {
            left = most = hb_executor_pairs(w->device, w->replicas, e->precision);
        }
        if (e->state == HB_THERE && e->n_pairs > most) {
            release_there(w, e, HB_MISSING);
            w->next_missing = 0;
        } else if (e->state == HB_THERE && e->n_pairs <= left) {
            left -= e->n_pairs;
            experts[n++] = e;
        }
    }
    return n;
}

static void send(struct hb_wave *w) {
    const struct hb_routed **experts = (const struct hb_routed **) w->batch->data;
    int n = choose(w, experts);
    if (n == 0 || !hb_executor_start(w->device, experts, n)) {
        end_there(w, HB_THERE, HB_MISSING);
        return;
    }
    const struct hb_costs *costs = hb_executor_costs(w->device);
    w->sent_work = 0;
    for (int i = 0; i < n; i++) {
        hb_routing_find(w->routing, experts[i]->expert, experts[i]->precision)->state = HB_SENT;
        w->sent_work += hb_costs_work(costs, HB_LANE_DEVICE, experts[i]->n_pairs, bytes_of(w, experts[i]));
    }
    w->sent = n;
    w->there -= n;
}

static void count_pairs(struct hb_wave *w) {
    struct hb_counters *counters = hb_model_counters(w->segment->model);
    for (int32_t i = 0; i < w->routing->n_experts; i++) {
        const struct hb_routed *e = &w->routing->experts[i];
        uint64_t n = e->state == HB_SENT ? (uint64_t) e->n_pairs : 0;
        atomic_fetch_add(&counters->device_pairs, n);
        atomic_fetch_add(&counters->device_low_pairs, e->precision == HOBBIT_LOW ? n : 0);
    }
}

static void take_in(struct hb_wave *w) {
    uint64_t ns = hb_executor_ns(w->device);
    hb_executor_scatter(w->device);
    hb_costs_learn(hb_executor_costs(w->device), HB_LANE_DEVICE, w->sent_work, (double) ns);
    atomic_fetch_add(&hb_model_counters(w->segment->model)->device_ns, ns);
    w->on_device = true;
    count_pairs(w);
    end_there(w, HB_SENT, HB_DONE);
}

/* The batch that was sent, if it is finished; false when the device is of no use any more. */
static bool take_back(struct hb_wave *w, bool wait) {
    struct hobbit_model *model = w->segment->model;
    struct hb_counters *counters = hb_model_counters(model);
    char why[480];
    uint64_t start = hb_now_ns();
    enum hb_executed executed = hb_executor_finish(w->device, wait, why, sizeof why);
    atomic_fetch_add(&counters->device_wait_ns, wait ? hb_now_ns() - start : 0);
    if (executed == HB_EXECUTED_NOT_YET) {
        return true;
    }
    if (executed == HB_EXECUTED_FAILED) {
        hb_model_device_failed(model, why);
        w->sent = w->there = 0;
        return false;
    }
    if (executed == HB_EXECUTED_DONE) {
        take_in(w);
        return true;
    }
    atomic_fetch_add(&counters->device_declined, 1);
    end_there(w, HB_SENT, HB_MISSING);
    if (executed == HB_EXECUTED_UNSUPPORTED) {
        end_there(w, HB_THERE, HB_MISSING);
        hb_model_decline(model, w->segment->group, hb_executor_precision(w->device));
    }
    return true;
}

/* What the copies take that were asked for, from now on: an upper bound, as part of it may be done. */
static double copies_ns(const struct hb_wave *w) {
    const struct hb_costs *costs = hb_executor_costs(w->device);
    double ns = 0;
    for (int32_t i = 0; i < w->routing->n_experts; i++) {
        const struct hb_routed *e = &w->routing->experts[i];
        bool copied = e->state == HB_COPYING || (e->state == HB_READY && e->to_device);
        ns += copied ? hb_costs_expert(costs, HB_LANE_UPLOAD, 1, bytes_of(w, e)) : 0;
    }
    return ns;
}

/* A batch is the better for what is on its way. Computing what is there takes what a batch costs; waiting, the time of
 * the copies in which nothing is computed. */
static bool is_time_to_send(const struct hb_wave *w) {
    if (w->sent > 0 || w->there == 0) {
        return false;
    }
    const struct hb_costs *costs = hb_executor_costs(w->device);
    return w->copying == 0 || (costs->copies_overlap && copies_ns(w) > hb_costs_fixed(costs, HB_LANE_DEVICE));
}

static bool serve(struct hb_wave *w, bool wait) {
    w->ended = hb_executor_ended(w->device);
    if (w->sent > 0 && !take_back(w, wait)) {
        return false;
    }
    (void) arrive(w);
    copy(w);
    if (is_time_to_send(w)) {
        send(w);
    }
    return tier_of(w) != NULL;
}

bool hb_split_serve(struct hb_wave *w) {
    return serve(w, false);
}

/* Rather than wait for a copy that has not begun, compute what takes no longer than all that the device has still to
 * do. */
static bool take_over(struct hb_wave *w) {
    const struct hb_costs *costs = hb_executor_costs(w->device);
    double copies = copies_ns(w), computes = 0, least = 0;
    struct hb_routed *smallest = NULL;
    if (hb_executor_dispatcher(w->device)->mode != HOBBIT_DISPATCH_AUTO || w->to_copy == 0) {
        return false;
    }
    for (int32_t i = 0; i < w->routing->n_experts; i++) {
        struct hb_routed *e = &w->routing->experts[i];
        if (!e->to_device || e->state == HB_MISSING || e->state == HB_LOADING) {
            continue;
        }
        computes += hb_costs_expert(costs, HB_LANE_DEVICE, e->n_pairs, bytes_of(w, e));
        double here = hb_costs_expert(costs, HB_LANE_CPU, e->n_pairs, bytes_of(w, e));
        if (e->state == HB_READY && (smallest == NULL || here < least)) {
            smallest = e;
            least = here;
        }
    }
    double left = !costs->copies_overlap ? copies + computes : copies > computes ? copies : computes;
    if (smallest == NULL || hb_costs_fixed(costs, HB_LANE_CPU) + least > hb_costs_fixed(costs, HB_LANE_DEVICE) + left) {
        return false;
    }
    compute_here(w, smallest);
    return true;
}

bool hb_split_wait(struct hb_wave *w) {
    int32_t to_copy = w->to_copy;
    copy(w); /* what has just been read */
    if (w->to_copy < to_copy || take_over(w)) {
        return tier_of(w) != NULL;
    }
    if (w->sent > 0 && w->copying > 0) { /* whichever ends first */
        uint64_t start = hb_now_ns();
        hb_executor_await(w->device, w->ended);
        atomic_fetch_add(&hb_model_counters(w->segment->model)->device_wait_ns, hb_now_ns() - start);
        return serve(w, false);
    }
    if (w->sent > 0) {
        return serve(w, true);
    }
    if (arrive(w)) { /* fetching may have taken it in before */
        return tier_of(w) != NULL;
    }
    /* A copy to be computed there, or one that has memory pinned that is needed here. */
    uint64_t start = hb_now_ns();
    bool taken = hb_model_take_uploads(w->segment->model, true);
    atomic_fetch_add(&hb_model_counters(w->segment->model)->device_wait_ns, hb_now_ns() - start);
    return tier_of(w) != NULL && (taken || w->there > 0);
}

/* --- the end --- */

void hb_split_computed_here(struct hb_wave *w, const struct hb_routed *const *experts, int n, uint64_t ns) {
    struct hb_costs *costs = hb_executor_costs(w->device);
    double work = 0;
    for (int i = 0; i < n; i++) {
        work += hb_costs_work(costs, HB_LANE_CPU, experts[i]->n_pairs, bytes_of(w, experts[i]));
    }
    hb_costs_learn(costs, HB_LANE_CPU, work, (double) ns);
    w->cpu_ns += ns;
}

void hb_split_has_read(struct hb_wave *w) {
    struct hb_costs *costs = hb_executor_costs(w->device);
    double work = hb_costs_work(costs, HB_LANE_READ, 1, w->read_bytes);
    hb_costs_learn(costs, HB_LANE_READ, work, (double) (hb_now_ns() - w->read_from));
}

void hb_split_drain(struct hb_wave *w) {
    if (w->sent > 0) {
        (void) take_back(w, true);
    }
    do {
        (void) arrive(w);
    } while (w->copying > 0 && hb_model_take_uploads(w->segment->model, true));
    end_there(w, HB_THERE, HB_DONE);
    for (int32_t i = 0; i < w->routing->n_experts; i++) {
        if (w->routing->experts[i].state == HB_READY && w->routing->experts[i].to_device) {
            compute_here(w, &w->routing->experts[i]);
        }
    }
}

void hb_split_end(struct hb_wave *w) {
    struct hb_counters *counters = hb_model_counters(w->segment->model);
    if (w->cpu_ns > 0 && w->on_device) {
        uint64_t device_ns = hb_executor_busy_ns(w->device) - w->busy_ns;
        atomic_fetch_add(&counters->split_ns, hb_now_ns() - w->begun);
        atomic_fetch_add(&counters->split_cpu_ns, w->cpu_ns);
        atomic_fetch_add(&counters->split_device_ns, device_ns);
        atomic_fetch_add(&counters->split_longer_ns, w->cpu_ns > device_ns ? w->cpu_ns : device_ns);
    }
    for (int32_t i = 0; i < w->routing->n_experts && tier_of(w) != NULL; i++) {
        hb_model_offer(w->segment->model, hb_wave_key(w, &w->routing->experts[i]));
    }
}
