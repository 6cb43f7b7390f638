/* An executor's parts: its memory, its costs, its batches. Of executor*.c only. */
#ifndef HB_EXECUTOR_IMPL_H
#define HB_EXECUTOR_IMPL_H

#include <pthread.h>
#include <stdatomic.h>

#include "device.h"
#include "dispatch.h"
#include "executor.h"
#include "model.h"
#include "replica.h"
#include "uses.h"

/* The matrices of one role in all slots of a bank. */
struct hb_device_stack {
    struct ggml_tensor tensor;
    ggml_backend_buffer_t buffer;
};

struct hb_device_bank {
    struct hb_device_stack roles[HB_GROUP_MATRICES];
    int32_t n_roles, n_slots;
};

struct hb_device_pool {
    struct hb_device_bank banks[HOBBIT_PRECISIONS];
};

struct hb_executor {
    struct hobbit_device *device;
    struct hb_catalog catalog; /* a copy: its thread may come back when there is no model any more */
    struct hb_device_pool *pools;
    int32_t *pool_of_group;
    int32_t n_pools;
    ggml_backend_buffer_t batch_buffer;
    struct hb_replicas replicas;
    /* The batch that is being computed: the worker's until it is done. */
    struct hb_task task;
    struct hb_stacks stacks;
    struct hb_uses uses;
    const struct hb_routed **experts;
    int n_experts, most_experts;
    enum hb_executed result;
    uint64_t ns;
    struct hb_costs costs;
    struct hb_dispatcher dispatcher;
    pthread_mutex_t copied_lock;
    uint64_t copied_bytes, copied_ns, n_copied; /* copies that were made, and not yet taken into the costs */
    atomic_uint_fast64_t busy_ns; /* of the thread that copies */
    uint64_t layer_at, layer_busy_ns; /* when the last layer began, and busy_ns then */
    double idle_ns; /* a layer, lately */
    int32_t n_layers; /* that it is the mean of, up to those of a pass */
};

struct hb_executor *hb_executor_new(struct hobbit_device *device, const struct hb_catalog *catalog,
                                    const struct hobbit_device_plan *plan);
/* Whether the groups of a pool have the same matrices, as large as the plan has them, and every pool has a group. */
bool hb_executor_fits(const struct hb_catalog *catalog, const struct hobbit_device_plan *plan);
/* On the worker's thread; false: there is no room. */
bool hb_executor_allocate(struct hb_executor *executor, const struct hobbit_device_plan *plan);
/* On the worker's threads, while no batch uses the slot. */
void hb_executor_copy(struct hb_executor *executor, struct hb_key key, int32_t slot, const char *data);
const struct hb_device_bank *hb_executor_bank(const struct hb_executor *executor, int32_t group, int32_t precision);
/* Measure what all of it takes; false: the device is lost, or memory is short. */
bool hb_executor_calibrate(struct hb_executor *executor, const struct hobbit_model *model,
                           const struct hobbit_device_plan *plan);

#endif
