#include <stdio.h>
#include <string.h>

#include "executor_impl.h"
#include "ggml-impl.h"
#include "site.h"

#define TICK_MS 50
#define PATIENCE_MS 5000

void hb_executor_begin(struct hb_executor *x, const struct hb_replicas *segment) {
    hb_replicas_adopt(&x->replicas, segment);
}

int64_t hb_executor_pairs(const struct hb_executor *x, const struct hb_replicas *segment, int32_t precision) {
    const struct hb_device_bank *bank = hb_executor_bank(x, segment->segment->group, precision);
    return bank->n_slots > 0 ? hb_replicas_place_pairs(segment, &x->replicas.place, bank->n_slots) : 0;
}

static void set_stacks(struct hb_executor *x, int32_t group, int32_t precision) {
    const struct hb_device_bank *bank = hb_executor_bank(x, group, precision);
    x->stacks = (struct hb_stacks) {.precision = precision, .n_slots = bank->n_slots};
    for (int32_t i = 0; i < bank->n_roles; i++) {
        x->stacks.roles[i].buffer = bank->roles[i].buffer;
        x->stacks.roles[i].base = bank->roles[i].tensor.data;
        x->stacks.roles[i].stride = bank->roles[i].tensor.nb[2];
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

static enum ggml_status compute(struct hb_executor *x) {
    struct ggml_cgraph graph = {
        .size = x->replicas.n_nodes, .n_nodes = x->replicas.n_nodes, .nodes = x->replicas.nodes};
    hb_uses_count(&x->uses, &graph, x->replicas.escaping);
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

/* A batch that ends after its device was given up has nobody to give its results to. */
static bool is_lost(const struct hb_executor *x) {
    return hb_worker_is_lost(x->device->worker);
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
    if (is_lost(x) || compute(x) != GGML_STATUS_SUCCESS || is_lost(x)) {
        return HB_EXECUTED_FAILED;
    }
    download(x);
    return HB_EXECUTED_DONE;
}

static void run(void *context) {
    struct hb_executor *x = context;
    const struct hobbit_device_delays *delays = &x->device->delays;
    uint64_t start = hb_now_ns(), n_pairs = 0;
    x->result = execute(x);
    if (is_lost(x)) {
        return;
    }
    for (int i = 0; i < x->n_experts && delays->pair_ns > 0; i++) {
        n_pairs += (uint64_t) x->experts[i]->n_pairs;
    }
    hb_site_sleep_until(start, delays->batch_ns + delays->pair_ns * n_pairs);
    x->ns = hb_now_ns() - start;
    atomic_fetch_add(&x->busy_ns, x->device->copies_on == HB_COMPUTES ? x->ns : 0);
}

bool hb_executor_start(struct hb_executor *x, const struct hb_routed *const *experts, int n_experts) {
    if (n_experts > x->most_experts) {
        return false;
    }
    memcpy(x->experts, experts, (size_t) n_experts * sizeof(experts[0]));
    x->n_experts = n_experts;
    set_stacks(x, x->replicas.segment->group, experts[0]->precision);
    x->task = (struct hb_task) {.run = run, .context = x};
    hb_worker_submit(x->device->worker, HB_COMPUTES, &x->task, true);
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
    snprintf(why, why_len, "device %s was lost: %s", x->device->full_name, reason);
    return HB_EXECUTED_FAILED;
}

uint64_t hb_executor_ended(const struct hb_executor *x) {
    return hb_worker_ended(x->device->worker);
}

void hb_executor_await(const struct hb_executor *x, uint64_t ended) {
    (void) hb_worker_wait(x->device->worker, ended, TICK_MS);
}

void hb_executor_scatter(struct hb_executor *x) {
    hb_replicas_scatter(&x->replicas, x->experts, x->n_experts);
}

uint64_t hb_executor_ns(const struct hb_executor *x) {
    return x->ns;
}

uint64_t hb_executor_busy_ns(const struct hb_executor *x) {
    return hb_worker_busy_ns(x->device->worker);
}

int32_t hb_executor_precision(const struct hb_executor *x) {
    return x->stacks.precision;
}
