/* A model is given a device. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "executor_impl.h"

static struct hb_tier *new_tier(struct hb_executor *x, const struct hobbit_device_plan *plan) {
    int32_t n_groups = x->catalog.n_groups;
    int32_t *n_expert = calloc((size_t) n_groups, sizeof *n_expert);
    if (n_expert == NULL) {
        return NULL;
    }
    for (int32_t g = 0; g < n_groups; g++) {
        n_expert[g] = x->catalog.groups[g].n_expert;
    }
    const struct hb_tier_device device = {.name = x->device->full_name, .executor = x, .worker = x->device->worker,
                                          .thread = x->device->copies_on, .copy = hb_executor_copy};
    const struct hb_tier_sizes sizes = {n_groups, plan->n_pools, n_expert, plan->pool_of_group, plan->pools,
                                        plan->token_bytes};
    struct hb_tier *tier = hb_tier_new(&device, &sizes);
    free(n_expert);
    return tier;
}

/* A lost worker keeps it. */
struct allocation {
    struct hb_task task;
    struct hb_executor *executor;
    struct hobbit_device_plan plan;
    bool good;
    struct hobbit_device_pool pools[];
};

static void allocate(void *context) {
    struct allocation *a = context;
    a->good = hb_executor_allocate(a->executor, &a->plan);
}

static struct allocation *new_allocation(struct hb_executor *x, const struct hobbit_device_plan *plan) {
    size_t bytes = (size_t) plan->n_pools * sizeof plan->pools[0];
    struct allocation *a = malloc(sizeof *a + bytes);
    if (a != NULL) {
        *a = (struct allocation) {.task = {.run = allocate, .context = a}, .executor = x, .plan = *plan};
        memcpy(a->pools, plan->pools, bytes);
        a->plan.pools = a->pools;
        a->plan.pool_of_group = NULL; /* the executor has its own */
    }
    return a;
}

/* Servers clear what they allocate, which takes its time. */
#define LEAST_BYTES_PER_MS ((128 << 20) / 1000)

static int patience_ms(const struct hobbit_device *d, const struct hobbit_device_plan *plan) {
    uint64_t bytes = plan->batch_bytes;
    for (int32_t i = 0; i < plan->n_pools; i++) {
        for (int32_t p = 0; p < HOBBIT_PRECISIONS; p++) {
            bytes += (uint64_t) plan->pools[i].n_slots[p] * plan->pools[i].expert_bytes[p];
        }
    }
    return d->patience_ms == HB_WORKER_FOREVER ? HB_WORKER_FOREVER : d->patience_ms + (int) (bytes / LEAST_BYTES_PER_MS);
}

/* What it was in the middle of may read the model's experts when it comes back. */
static int32_t lost(struct hobbit_model *m, struct hobbit_device *d, struct hb_tier *tier, char *err, size_t err_len) {
    char why[256] = "memory is short";
    if (hb_worker_is_lost(d->worker)) {
        hb_worker_reason(d->worker, why, sizeof why);
        hb_model_keep_space(m);
    }
    hb_tier_free(tier);
    snprintf(err, err_len, "device %s cannot be used: %s", d->info.name, why);
    return HOBBIT_DEVICE;
}

int32_t hobbit_model_use_device(struct hobbit_model *m, struct hobbit_device *d, const struct hobbit_device_plan *plan,
                                char *err, size_t err_len) {
    const struct hb_catalog *catalog = hb_model_catalog(m);
    if (!hb_model_ready(m) || hb_model_tier(m) != NULL || d->executor != NULL || !hb_executor_fits(catalog, plan)) {
        snprintf(err, err_len, "the plan of the device does not fit the model's experts");
        return HOBBIT_ARG;
    }
    struct hb_executor *x = d->executor = hb_executor_new(d, catalog, plan); /* freed with the device */
    struct hb_tier *tier = x != NULL ? new_tier(x, plan) : NULL;
    struct allocation *a = tier != NULL ? new_allocation(x, plan) : NULL;
    if (a == NULL) {
        hb_tier_free(tier);
        snprintf(err, err_len, "out of memory");
        return HOBBIT_NOMEM;
    }
    if (!hb_worker_call(d->worker, &a->task, patience_ms(d, plan))) {
        return lost(m, d, tier, err, err_len);
    }
    bool good = a->good;
    free(a);
    if (!good) {
        snprintf(err, err_len, "device %s has no room for the experts that were planned for it", d->info.name);
        hb_tier_free(tier);
        return HOBBIT_DEVICE;
    }
    if (!hb_executor_calibrate(x, m, plan)) {
        return lost(m, d, tier, err, err_len);
    }
    hb_model_set_tier(m, tier);
    return HOBBIT_OK;
}

int32_t hobbit_model_set_dispatch(struct hobbit_model *m, int32_t mode) {
    if (mode < HOBBIT_DISPATCH_AUTO || mode > HOBBIT_DISPATCH_SPLIT) {
        return HOBBIT_ARG;
    }
    hb_model_lock(m);
    struct hb_tier *tier = hb_model_tier(m);
    if (tier != NULL) {
        hb_dispatcher_set(hb_executor_dispatcher(hb_tier_executor(tier)), mode);
    }
    hb_model_unlock(m);
    return tier != NULL ? HOBBIT_OK : HOBBIT_ARG;
}

