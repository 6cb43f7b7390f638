#include <stdlib.h>
#include <string.h>

#include "executor_impl.h"
#include "site.h"

static bool new_stack(struct hb_executor *x, struct hb_device_stack *stack, const struct hb_matrix *m, int32_t n_slots) {
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

static bool new_bank(struct hb_executor *x, struct hb_device_bank *bank, const struct hb_copy *copy, int32_t n_slots) {
    bool good = true;
    bank->n_slots = n_slots;
    for (int32_t i = 0; good && n_slots > 0 && i < copy->n_matrices; i++) {
        good = new_stack(x, &bank->roles[i], copy->matrices[i], n_slots);
        bank->n_roles++;
    }
    return good;
}

static bool new_pool(struct hb_executor *x, int32_t index, const struct hobbit_device_pool *size) {
    int32_t group = 0;
    while (x->pool_of_group[group] != index) {
        group++;
    }
    bool good = true;
    for (int32_t p = 0; good && p < HOBBIT_PRECISIONS; p++) {
        good = new_bank(x, &x->pools[index].banks[p], &x->catalog.groups[group].copies[p], size->n_slots[p]);
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

static void free_bank(struct hb_device_bank *bank) {
    for (int32_t i = 0; i < bank->n_roles; i++) {
        ggml_backend_buffer_free(bank->roles[i].buffer);
    }
}

void hb_executor_free(struct hb_executor *x) {
    if (x == NULL) {
        return;
    }
    for (int32_t i = 0; x->pools != NULL && i < x->n_pools; i++) {
        for (int32_t p = 0; p < HOBBIT_PRECISIONS; p++) {
            free_bank(&x->pools[i].banks[p]);
        }
    }
    ggml_backend_buffer_free(x->batch_buffer);
    hb_replicas_free(&x->replicas);
    pthread_mutex_destroy(&x->copied_lock);
    hb_catalog_close(&x->catalog);
    free(x->experts);
    free(x->pools);
    free(x->pool_of_group);
    free(x);
}

bool hb_executor_allocate(struct hb_executor *x, const struct hobbit_device_plan *plan) {
    bool good = new_batch_memory(x, plan->batch_bytes);
    for (int32_t i = 0; good && i < plan->n_pools; i++) {
        good = new_pool(x, i, &plan->pools[i]);
    }
    return good;
}

static bool are_alike(const struct hb_copy *a, const struct hb_copy *b) {
    bool alike = a->n_matrices == b->n_matrices;
    for (int32_t i = 0; alike && i < a->n_matrices; i++) {
        const struct hb_matrix *m = a->matrices[i], *n = b->matrices[i];
        alike = m->type == n->type && m->ne0 == n->ne0 && m->ne1 == n->ne1;
    }
    return alike;
}

/* The group's copies fit the slots, and are like those of the pool's first group. */
static bool group_fits(const struct hb_group *group, const struct hb_group *first,
                       const struct hobbit_device_pool *pool) {
    for (int32_t p = 0; p < HOBBIT_PRECISIONS; p++) {
        const struct hb_copy *copy = &group->copies[p];
        bool used = p == HOBBIT_HIGH || pool->n_slots[p] > 0;
        if (pool->n_slots[p] < 0 || (used && (copy->n_matrices == 0 || pool->expert_bytes[p] != copy->expert_bytes ||
                                              !are_alike(copy, &first->copies[p])))) {
            return false;
        }
    }
    return true;
}

bool hb_executor_fits(const struct hb_catalog *c, const struct hobbit_device_plan *plan) {
    const struct hb_group *first[64] = {NULL};
    if (plan->n_pools < 1 || plan->n_pools > 64 || plan->batch_bytes == 0) {
        return false;
    }
    for (int32_t g = 0; g < c->n_groups; g++) {
        int32_t p = plan->pool_of_group[g];
        if (p < 0 || p >= plan->n_pools) {
            return false;
        }
        first[p] = first[p] == NULL ? &c->groups[g] : first[p];
        if (!group_fits(&c->groups[g], first[p], &plan->pools[p])) {
            return false;
        }
    }
    for (int32_t p = 0; p < plan->n_pools; p++) {
        if (first[p] == NULL) {
            return false;
        }
    }
    return true;
}

const struct hb_device_bank *hb_executor_bank(const struct hb_executor *x, int32_t group, int32_t precision) {
    return &x->pools[x->pool_of_group[group]].banks[precision];
}

void hb_executor_copy(struct hb_executor *x, struct hb_key key, int32_t slot, const char *data) {
    const struct hb_worker *worker = x->device->worker;
    if (hb_worker_is_lost(worker)) {
        return;
    }
    const struct hb_copy *copy = &x->catalog.groups[key.group].copies[key.precision];
    const struct hb_device_bank *bank = hb_executor_bank(x, key.group, key.precision);
    uint64_t start = hb_now_ns(), bytes = copy->expert_bytes;
    /* Lost meanwhile, there may be no model any more. */
    for (int32_t i = 0; !hb_worker_is_lost(worker) && i < copy->n_matrices; i++) {
        const struct hb_matrix *m = copy->matrices[i];
        struct ggml_tensor stack = bank->roles[i].tensor;
        ggml_backend_tensor_set(&stack, data + m->slot_offset, (size_t) slot * m->expert_bytes,
                                m->expert_bytes);
    }
    hb_site_sleep_until(start, x->device->delays.copy_ns_per_mib * bytes >> 20);
    uint64_t ns = hb_now_ns() - start;
    pthread_mutex_lock(&x->copied_lock);
    x->copied_bytes += bytes;
    x->copied_ns += ns;
    x->n_copied++;
    pthread_mutex_unlock(&x->copied_lock);
    atomic_fetch_add(&x->busy_ns, ns);
}

struct hb_executor *hb_executor_new(struct hobbit_device *d, const struct hb_catalog *catalog,
                                    const struct hobbit_device_plan *plan) {
    struct hb_executor *x = calloc(1, sizeof *x);
    size_t groups = (size_t) catalog->n_groups * sizeof *x->pool_of_group;
    if (x == NULL) {
        return NULL;
    }
    x->device = d;
    x->n_pools = plan->n_pools;
    x->most_experts = catalog->most_experts * HOBBIT_PRECISIONS;
    x->pools = calloc((size_t) plan->n_pools, sizeof *x->pools);
    x->experts = calloc((size_t) x->most_experts, sizeof *x->experts);
    x->pool_of_group = malloc(groups);
    bool copied = hb_catalog_copy(&x->catalog, catalog);
    if (!copied || x->pools == NULL || x->experts == NULL || x->pool_of_group == NULL) {
        hb_catalog_close(&x->catalog);
        free(x->pools);
        free(x->experts);
        free(x->pool_of_group);
        free(x);
        return NULL;
    }
    memcpy(x->pool_of_group, plan->pool_of_group, groups);
    pthread_mutex_init(&x->copied_lock, NULL);
    return x;
}

