#include <stdlib.h>

#include "calibrate.h"
#include "executor_impl.h"

static struct hb_site site_there(const struct hb_executor *x, struct hb_key key) {
    const struct hb_device_bank *bank = hb_executor_bank(x, key.group, key.precision);
    uint64_t expert_bytes = x->catalog.groups[key.group].copies[key.precision].expert_bytes;
    struct hb_site site = {.backend = x->device->backend, .n_stacks = bank->n_roles, .n_slots = bank->n_slots,
                           .expert_bytes = expert_bytes, .place = x->batch_buffer,
                           .batch_ns = x->device->delays.batch_ns, .pair_ns = x->device->delays.pair_ns};
    for (int32_t i = 0; i < bank->n_roles; i++) {
        site.stacks[i] = bank->roles[i].tensor;
    }
    return site;
}

struct one_copy {
    struct hb_executor *executor;
    struct hb_key key;
    const char *data;
};

static void copy_once(void *context) {
    const struct one_copy *c = context;
    hb_executor_copy(c->executor, c->key, 0, c->data);
}

/* A group of the pool that has the most of them and room for an expert; -1: none has. */
static int32_t group_to_measure(const struct hb_executor *x, int32_t precision) {
    int32_t chosen = -1, most = 0;
    for (int32_t p = 0; p < x->n_pools; p++) {
        int32_t n = 0, last = -1;
        for (int32_t g = 0; g < x->catalog.n_groups; g++) {
            n += x->pool_of_group[g] == p;
            last = x->pool_of_group[g] == p ? g : last;
        }
        if (x->pools[p].banks[precision].n_slots > 0 && n > most) {
            most = n;
            chosen = last;
        }
    }
    return chosen;
}

bool hb_executor_calibrate(struct hb_executor *x, const struct hobbit_model *m,
                           const struct hobbit_device_plan *plan) {
    struct hb_key key = {group_to_measure(x, HOBBIT_HIGH), 0, HOBBIT_HIGH};
    if (key.group < 0) {
        key = (struct hb_key) {group_to_measure(x, HOBBIT_LOW), 0, HOBBIT_LOW};
    }
    hb_dispatcher_set(&x->dispatcher, plan->dispatch);
    x->costs.copies_overlap = x->device->copies_on != HB_COMPUTES;
    if (key.group < 0) {
        x->dispatcher.mode = HOBBIT_DISPATCH_CPU;
        return true;
    }
    struct hb_arena arena = hb_model_arena(m, key.group, key.precision);
    struct one_copy *once = malloc(sizeof *once); /* a lost worker keeps it */
    if (once == NULL) {
        return false;
    }
    *once = (struct one_copy) {x, key, arena.base};
    const struct hb_calibration calibration = {
        .there = site_there(x, key),
        .copy = &x->catalog.groups[key.group].copies[key.precision],
        .arena = arena,
        .memory = &x->replicas.memory,
        .n_threads = plan->n_threads,
        .worker = x->device->worker,
        .patience_ms = x->device->patience_ms,
        .copy_once = copy_once,
        .context = once,
        .read_ns_per_mib = plan->read_ns_per_mib,
    };
    bool good = hb_calibrate(&calibration, &x->costs);
    if (hb_worker_is_lost(x->device->worker)) {
        return false;
    }
    free(once);
    x->layer_at = hb_now_ns();
    x->layer_busy_ns = atomic_load(&x->busy_ns);
    x->copied_bytes = x->copied_ns = x->n_copied = 0;
    return good;
}

struct hb_costs *hb_executor_costs(struct hb_executor *x) {
    pthread_mutex_lock(&x->copied_lock);
    uint64_t n = x->n_copied, ns = x->copied_ns, bytes = x->copied_bytes;
    x->copied_bytes = x->copied_ns = x->n_copied = 0;
    pthread_mutex_unlock(&x->copied_lock);
    if (n > 0) {
        double each = (double) bytes / (double) n;
        hb_costs_learn(&x->costs, HB_LANE_UPLOAD, hb_costs_work(&x->costs, HB_LANE_UPLOAD, 1, (uint64_t) each),
                       (double) ns / (double) n);
    }
    return &x->costs;
}

struct hb_dispatcher *hb_executor_dispatcher(struct hb_executor *x) {
    return &x->dispatcher;
}

/* What a layer more counts in the mean of the idle time, and the most that it is taken to have been idle: between two
 * answers it is for long. */
#define NEW_LAYER (1.0 / 64)
#define MOST_IDLE_NS 1e8

uint64_t hb_executor_spare(struct hb_executor *x, int32_t n_layers) {
    uint64_t now = hb_now_ns(), busy = atomic_load(&x->busy_ns);
    double idle = (double) (now - x->layer_at) - (double) (busy - x->layer_busy_ns);
    x->layer_at = now;
    x->layer_busy_ns = busy;
    idle = idle < 0 ? 0 : idle > MOST_IDLE_NS ? MOST_IDLE_NS : idle;
    x->idle_ns += (x->n_layers < n_layers ? 1.0 / (x->n_layers + 1) : NEW_LAYER) * (idle - x->idle_ns);
    x->n_layers += x->n_layers < n_layers;
    double each = hb_costs_expert(&x->costs, HB_LANE_UPLOAD, 1, 1 << 20);
    return x->n_layers < n_layers ? UINT64_MAX : (uint64_t) (x->idle_ns * n_layers / 2 / each * (1 << 20));
}

