#include "executor.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "device.h"
#include "ggml-impl.h"
#include "model.h"
#include "replica.h"

#define TICK_MS 50
#define PATIENCE_MS 5000

/* The matrices of one role in all slots of a pool. */
struct stack {
    struct ggml_tensor tensor;
    ggml_backend_buffer_t buffer;
};

struct pool {
    struct stack roles[HB_GROUP_MATRICES];
    int32_t n_roles, n_slots;
};

struct hb_executor {
    struct hobbit_device *device;
    const struct hb_catalog *catalog;
    struct pool *pools;
    int32_t *pool_of_group;
    int32_t n_pools;
    ggml_backend_buffer_t batch_buffer;
    struct hb_replicas replicas;
    /* The batch that is being computed: the worker's until it is done. */
    struct hb_task task;
    struct hb_stacks stacks;
    const struct hb_routed **experts;
    int n_experts, most_experts;
    enum hb_executed result;
    uint64_t ns;
};

/* --- memory --- */

static bool new_stack(struct hb_executor *x, struct stack *stack, const struct hb_matrix *m, int32_t n_slots) {
    struct ggml_tensor *t = &stack->tensor;
    *t = (struct ggml_tensor) {.type = (enum ggml_type) m->type, .ne = {m->ne0, m->ne1, n_slots, 1}};
    t->nb[0] = ggml_type_size(t->type);
    t->nb[1] = ggml_row_size(t->type, m->ne0);
    t->nb[2] = m->expert_bytes;
    t->nb[3] = m->expert_bytes * (uint64_t) n_slots;
    size_t bytes = ggml_backend_buft_get_alloc_size(x->device->buffer_type, t);
    stack->buffer = ggml_backend_buft_alloc_buffer(x->device->buffer_type, bytes);
    if (stack->buffer == NULL) {
        return false;
    }
    ggml_backend_buffer_set_usage(stack->buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    /* Some kernels read beyond a row, into the next slot, and multiply that by zero: it must not be a NaN. */
    ggml_backend_buffer_clear(stack->buffer, 0);
    return ggml_backend_tensor_alloc(stack->buffer, t, ggml_backend_buffer_get_base(stack->buffer)) ==
           GGML_STATUS_SUCCESS;
}

static bool new_pool(struct hb_executor *x, int32_t index, int32_t n_slots) {
    struct pool *pool = &x->pools[index];
    int32_t group = 0;
    while (x->pool_of_group[group] != index) {
        group++;
    }
    const struct hb_copy *copy = &x->catalog->groups[group].copies[HOBBIT_HIGH];
    bool good = true;
    pool->n_slots = n_slots;
    for (int32_t i = 0; good && n_slots > 0 && i < copy->n_matrices; i++) {
        good = new_stack(x, &pool->roles[i], copy->matrices[i], n_slots);
        pool->n_roles++;
    }
    return good;
}

static bool new_batch_memory(struct hb_executor *x, uint64_t bytes) {
    struct hb_place *place = &x->replicas.place;
    x->batch_buffer = ggml_backend_buft_alloc_buffer(x->device->buffer_type, bytes);
    if (x->batch_buffer == NULL) {
        return false;
    }
    ggml_backend_buffer_set_usage(x->batch_buffer, GGML_BACKEND_BUFFER_USAGE_COMPUTE);
    size_t align = ggml_backend_buft_get_alignment(x->device->buffer_type);
    *place = (struct hb_place) {.buffer = x->batch_buffer, .base = ggml_backend_buffer_get_base(x->batch_buffer),
                                .bytes = bytes, .align = align > HB_BLOCK_ALIGN ? align : HB_BLOCK_ALIGN};
    return hb_block_reserve(&x->replicas.memory, hb_block_round(bytes));
}

void hb_executor_free(struct hb_executor *x) {
    if (x == NULL) {
        return;
    }
    for (int32_t i = 0; x->pools != NULL && i < x->n_pools; i++) {
        for (int32_t r = 0; r < x->pools[i].n_roles; r++) {
            ggml_backend_buffer_free(x->pools[i].roles[r].buffer);
        }
    }
    ggml_backend_buffer_free(x->batch_buffer);
    hb_replicas_free(&x->replicas);
    free(x->experts);
    free(x->pools);
    free(x->pool_of_group);
    free(x);
}

struct allocation {
    struct hb_executor *executor;
    const struct hobbit_device_plan *plan;
    bool good;
};

static void allocate(void *context) {
    struct allocation *a = context;
    a->good = new_batch_memory(a->executor, a->plan->batch_bytes);
    for (int32_t i = 0; a->good && i < a->plan->n_pools; i++) {
        a->good = new_pool(a->executor, i, a->plan->pools[i].n_slots);
    }
}

/* Groups of a pool have the same matrices, and every pool has a group. */
static bool fits(const struct hb_catalog *c, const struct hobbit_device_plan *plan) {
    const struct hb_copy *first[64] = {NULL};
    if (plan->n_pools < 1 || plan->n_pools > 64 || plan->batch_bytes == 0) {
        return false;
    }
    for (int32_t g = 0; g < c->n_groups; g++) {
        int32_t p = plan->pool_of_group[g];
        const struct hb_copy *copy = &c->groups[g].copies[HOBBIT_HIGH];
        if (p < 0 || p >= plan->n_pools || plan->pools[p].n_slots < 0 ||
            plan->pools[p].expert_bytes != copy->expert_bytes) {
            return false;
        }
        first[p] = first[p] == NULL ? copy : first[p];
        for (int32_t i = 0; i < copy->n_matrices; i++) {
            const struct hb_matrix *a = copy->matrices[i], *b = first[p]->matrices[i];
            if (copy->n_matrices != first[p]->n_matrices || a->type != b->type || a->ne0 != b->ne0 ||
                a->ne1 != b->ne1) {
                return false;
            }
        }
    }
    for (int32_t p = 0; p < plan->n_pools; p++) {
        if (first[p] == NULL) {
            return false;
        }
    }
    return true;
}

/* On the worker's thread, between batches. */
static void copy_expert(struct hb_executor *x, int32_t group, int32_t slot, const char *data) {
    const struct hb_copy *copy = &x->catalog->groups[group].copies[HOBBIT_HIGH];
    struct pool *pool = &x->pools[x->pool_of_group[group]];
    for (int32_t i = 0; i < copy->n_matrices && !hb_worker_is_lost(x->device->worker); i++) {
        const struct hb_matrix *m = copy->matrices[i];
        ggml_backend_tensor_set(&pool->roles[i].tensor, data + m->slot_offset, (size_t) slot * m->expert_bytes,
                                m->expert_bytes);
    }
}

static struct hb_executor *new_executor(struct hobbit_device *d, const struct hb_catalog *catalog,
                                        const struct hobbit_device_plan *plan) {
    struct hb_executor *x = calloc(1, sizeof *x);
    size_t groups = (size_t) catalog->n_groups * sizeof *x->pool_of_group;
    if (x == NULL) {
        return NULL;
    }
    x->device = d;
    x->catalog = catalog;
    x->n_pools = plan->n_pools;
    x->most_experts = catalog->most_experts * HOBBIT_PRECISIONS;
    x->pools = calloc((size_t) plan->n_pools, sizeof *x->pools);
    x->experts = calloc((size_t) x->most_experts, sizeof *x->experts);
    x->pool_of_group = malloc(groups);
    if (x->pools == NULL || x->experts == NULL || x->pool_of_group == NULL) {
        free(x->pools);
        free(x->experts);
        free(x->pool_of_group);
        free(x);
        return NULL;
    }
    memcpy(x->pool_of_group, plan->pool_of_group, groups);
    return x;
}

static struct hb_tier *new_tier(struct hb_executor *x, const struct hobbit_device_plan *plan) {
    int32_t n_groups = x->catalog->n_groups;
    int32_t *n_expert = calloc((size_t) n_groups, sizeof *n_expert), *n_slots = NULL;
    uint64_t *expert_bytes = calloc((size_t) plan->n_pools, sizeof *expert_bytes);
    struct hb_tier *tier = NULL;
    n_slots = calloc((size_t) plan->n_pools, sizeof *n_slots);
    if (n_expert != NULL && n_slots != NULL && expert_bytes != NULL) {
        for (int32_t g = 0; g < n_groups; g++) {
            n_expert[g] = x->catalog->groups[g].n_expert;
        }
        for (int32_t i = 0; i < plan->n_pools; i++) {
            n_slots[i] = plan->pools[i].n_slots;
            expert_bytes[i] = plan->pools[i].expert_bytes;
        }
        tier = hb_tier_new(&(struct hb_tier_device) {x, x->device->worker, copy_expert},
                           &(struct hb_tier_sizes) {n_groups, plan->n_pools, n_expert, plan->pool_of_group,
                                                    expert_bytes, n_slots, plan->token_bytes});
    }
    free(n_expert);
    free(n_slots);
    free(expert_bytes);
    return tier;
}

int32_t hobbit_model_use_device(struct hobbit_model *m, struct hobbit_device *d, const struct hobbit_device_plan *plan,
                                char *err, size_t err_len) {
    const struct hb_catalog *catalog = hb_model_catalog(m);
    if (!hb_model_ready(m) || hb_model_tier(m) != NULL || d->executor != NULL || !fits(catalog, plan)) {
        snprintf(err, err_len, "the plan of the device does not fit the model's experts");
        return HOBBIT_ARG;
    }
    struct hb_executor *x = d->executor = new_executor(d, catalog, plan); /* freed with the device */
    struct hb_tier *tier = x != NULL ? new_tier(x, plan) : NULL;
    if (tier == NULL) {
        snprintf(err, err_len, "out of memory");
        return HOBBIT_NOMEM;
    }
    struct allocation a = {.executor = x, .plan = plan};
    if (!hb_worker_call(d->worker, allocate, &a)) {
        char why[256];
        hb_worker_reason(d->worker, why, sizeof why);
        snprintf(err, err_len, "device %s was lost: %s", d->info.name, why);
        hb_tier_abandon(tier);
        hb_tier_free(tier);
        return HOBBIT_DEVICE;
    }
    if (!a.good) {
        snprintf(err, err_len, "device %s has no room for the experts that were planned for it", d->info.name);
        hb_tier_free(tier);
        return HOBBIT_DEVICE;
    }
    hb_model_set_tier(m, tier);
    return HOBBIT_OK;
}

/* --- batches --- */

void hb_executor_begin(struct hb_executor *x, const struct hb_replicas *segment) {
    hb_replicas_adopt(&x->replicas, segment);
}

int64_t hb_executor_pairs(const struct hb_executor *x, int32_t group) {
    const struct pool *pool = &x->pools[x->pool_of_group[group]];
    return pool->n_slots > 0 ? hb_replicas_place_pairs(&x->replicas, pool->n_slots) : 0;
}

static void set_stacks(struct hb_executor *x, int32_t group) {
    const struct pool *pool = &x->pools[x->pool_of_group[group]];
    x->stacks = (struct hb_stacks) {.precision = HOBBIT_HIGH, .n_slots = pool->n_slots};
    for (int32_t i = 0; i < pool->n_roles; i++) {
        x->stacks.roles[i].buffer = pool->roles[i].buffer;
        x->stacks.roles[i].base = pool->roles[i].tensor.data;
        x->stacks.roles[i].stride = pool->roles[i].tensor.nb[2];
    }
}

static void upload(struct hb_executor *x) {
    struct hb_replicas *r = &x->replicas;
    struct ggml_tensor all = {.type = GGML_TYPE_I8, .ne = {(int64_t) r->n_inputs_bytes, 1, 1, 1},
                              .nb = {1, r->n_inputs_bytes, r->n_inputs_bytes, r->n_inputs_bytes}};
    all.buffer = r->place.buffer;
    all.data = r->place.base;
    ggml_backend_tensor_set(&all, r->memory.data, 0, r->n_inputs_bytes);
}

static void download(struct hb_executor *x) {
    struct hb_replicas *r = &x->replicas;
    for (int i = 0; i < r->n_nodes; i++) {
        char *rows = hb_replicas_escaping(r, i);
        if (rows != NULL) {
            ggml_backend_tensor_get(r->nodes[i], rows, 0, ggml_nbytes(r->nodes[i]));
        }
    }
}

/* Its hash table is empty, as no node of it is in the real graph's: nothing is known of how often each is used. */
static enum ggml_status compute(struct hb_executor *x) {
    ggml_bitset_t used = 0;
    struct ggml_tensor *key = NULL;
    int32_t use_count = 0;
    struct ggml_cgraph graph = {.size = x->replicas.n_nodes, .n_nodes = x->replicas.n_nodes,
                                .nodes = x->replicas.nodes, .use_counts = &use_count,
                                .visited_hash_set = {.size = 1, .used = &used, .keys = &key}};
    return ggml_backend_graph_compute(x->device->backend, &graph);
}

static bool is_supported(const struct hb_executor *x) {
    for (int i = 0; i < x->replicas.n_nodes; i++) {
        if (!ggml_backend_dev_supports_op(x->device->dev, x->replicas.nodes[i])) {
            return false;
        }
    }
    return true;
}

static enum hb_executed execute(struct hb_executor *x) {
    hb_replicas_build_there(&x->replicas, &x->stacks, x->experts, x->n_experts);
    if (!hb_replicas_place(&x->replicas)) {
        return HB_EXECUTED_TOO_LARGE;
    }
    if (!is_supported(x)) {
        return HB_EXECUTED_UNSUPPORTED;
    }
    upload(x);
    if (compute(x) != GGML_STATUS_SUCCESS) {
        return HB_EXECUTED_FAILED;
    }
    download(x);
    return HB_EXECUTED_DONE;
}

static void run(void *context) {
    struct hb_executor *x = context;
    uint64_t start = hb_now_ns();
    x->result = execute(x);
    x->ns = hb_now_ns() - start;
}

bool hb_executor_start(struct hb_executor *x, const struct hb_routed *const *experts, int n_experts) {
    if (n_experts > x->most_experts) {
        return false;
    }
    memcpy(x->experts, experts, (size_t) n_experts * sizeof(experts[0]));
    x->n_experts = n_experts;
    set_stacks(x, x->replicas.segment->group);
    x->task = (struct hb_task) {.run = run, .context = x};
    hb_worker_submit(x->device->worker, &x->task, true);
    return true;
}

/* Wait for it; of a computation that is cancelled not for ever. */
static bool wait_for(struct hb_executor *x) {
    struct hb_worker *worker = x->device->worker;
    int patience = PATIENCE_MS / TICK_MS;
    while (!hb_worker_done(worker, &x->task, TICK_MS) && !hb_worker_is_lost(worker)) {
        patience -= hb_model_cancelled(x->replicas.segment->model);
        if (patience == 0) {
            hb_worker_lose(worker, "it does not answer");
        }
    }
    return hb_worker_done(worker, &x->task, 0);
}

enum hb_executed hb_executor_finish(struct hb_executor *x, bool wait, char *why, size_t why_len) {
    struct hb_worker *worker = x->device->worker;
    if (wait ? wait_for(x) : hb_worker_done(worker, &x->task, 0)) {
        if (x->result == HB_EXECUTED_FAILED) {
            snprintf(why, why_len, "device %s failed to compute", x->device->info.name);
        }
        return x->result;
    }
    if (!hb_worker_is_lost(worker)) {
        return HB_EXECUTED_NOT_YET;
    }
    char reason[256];
    hb_worker_reason(worker, reason, sizeof reason);
    const struct hobbit_device_info *info = &x->device->info;
    snprintf(why, why_len, "device %s (%s) was lost: %s", info->name, info->description, reason);
    return HB_EXECUTED_FAILED;
}

void hb_executor_scatter(struct hb_executor *x) {
    hb_replicas_scatter(&x->replicas, x->experts, x->n_experts);
}

uint64_t hb_executor_ns(const struct hb_executor *x) {
    return x->ns;
}
