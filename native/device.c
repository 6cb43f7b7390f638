#include "device.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "executor.h"
#include "guard.h"
#include "rpc.h"
#include "segment.h"

/* Ours computes experts that stream, and has no memory of its own. */
static bool can_hold_experts(ggml_backend_dev_t dev) {
    return strcmp(ggml_backend_dev_name(dev), hb_buffer_type_name) != 0;
}

static ggml_backend_dev_t find(const char *name) {
    for (size_t i = 0; i < ggml_backend_dev_count() + hb_rpc_n_devices(); i++) {
        size_t n = ggml_backend_dev_count();
        ggml_backend_dev_t dev = i < n ? ggml_backend_dev_get(i) : hb_rpc_device(i - n);
        if (strcmp(ggml_backend_dev_name(dev), name) == 0 && can_hold_experts(dev)) {
            return dev;
        }
    }
    return NULL;
}

void hobbit_device_names(char *names, size_t length) {
    size_t used = 0, n = ggml_backend_dev_count();
    names[0] = '\0';
    for (size_t i = 0; i < n + hb_rpc_n_devices(); i++) {
        ggml_backend_dev_t dev = i < n ? ggml_backend_dev_get(i) : hb_rpc_device(i - n);
        if (can_hold_experts(dev) && used < length) {
            used += (size_t) snprintf(names + used, length - used, "%s%s", used > 0 ? ", " : "",
                                      ggml_backend_dev_name(dev));
        }
    }
}

/* Whether it copies while it computes. To a server all goes one way, one after another. The CPU is a device in tests. */
static bool can_overlap(ggml_backend_dev_t dev) {
    struct ggml_backend_dev_props props;
    if (hb_rpc_is_remote(dev)) {
        return false;
    }
    ggml_backend_dev_get_props(dev, &props);
    return props.caps.async || props.type == GGML_BACKEND_DEVICE_TYPE_CPU;
}

static void set_threads(const struct hobbit_device *d, int32_t n_threads) {
    ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(d->dev);
    ggml_backend_set_n_threads_t set = (ggml_backend_set_n_threads_t) (uintptr_t)
        ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
    if (set != NULL && n_threads > 0) {
        set(d->backend, n_threads);
    }
}

struct opening {
    struct hb_task task;
    struct hobbit_device *device;
    int32_t n_threads;
};

/* An integrated GPU's memory, and Apple's, is the machine's. */
bool hb_shares_memory(ggml_backend_dev_t dev, ggml_backend_buffer_type_t buffer_type) {
#if defined(__APPLE__) && defined(__aarch64__)
    return true;
#endif
    enum ggml_backend_dev_type type = ggml_backend_dev_type(dev);
    return type == GGML_BACKEND_DEVICE_TYPE_IGPU || type == GGML_BACKEND_DEVICE_TYPE_CPU ||
           type == GGML_BACKEND_DEVICE_TYPE_ACCEL || ggml_backend_buft_is_host(buffer_type);
}

static void open_backend(void *context) {
    const struct opening *o = context;
    struct hobbit_device *d = o->device;
    size_t free, total;
    ggml_backend_dev_memory(d->dev, &free, &total);
    d->info.free_bytes = free;
    d->info.total_bytes = total;
    snprintf(d->info.name, sizeof d->info.name, "%s", ggml_backend_dev_name(d->dev));
    hb_rpc_describe(d->dev, d->info.description, sizeof d->info.description);
    snprintf(d->full_name, sizeof d->full_name, "%s (%s)", d->info.name, d->info.description);
    d->buffer_type = ggml_backend_dev_buffer_type(d->dev);
    d->info.shares_memory = hb_shares_memory(d->dev, d->buffer_type);
    d->copies_on = can_overlap(d->dev) ? HB_COPIES : HB_COMPUTES;
    d->backend = ggml_backend_dev_init(d->dev, NULL);
    if (d->backend != NULL) {
        set_threads(d, o->n_threads);
    }
}

/* A server that hangs says nothing; what is in this machine may compile its kernels first, for minutes. */
#define ANSWERS_MS 10000
#define GETS_READY_MS 30000

int32_t hobbit_device_open(const char *name, int32_t n_threads, struct hobbit_device **out, char *err,
                           size_t err_len) {
    ggml_backend_dev_t dev = find(name);
    if (dev == NULL) {
        char names[256];
        hobbit_device_names(names, sizeof names);
        snprintf(err, err_len, "there is no device %s: there is %s", name, names);
        return HOBBIT_ARG;
    }
    const char *connection = hb_rpc_connection(dev);
    bool remote = hb_rpc_is_remote(dev);
    if (hb_guard_has_failed(connection)) {
        snprintf(err, err_len, "device %s was lost in this process%s", name,
                 remote ? ": connect to its server again (--rpc)" : ": start again");
        return HOBBIT_DEVICE;
    }
    /* A server has one client: to try it while it is ours fills its queue. */
    if (remote && !hb_guard_has(connection) && !hb_rpc_answers(dev, err, err_len)) {
        return HOBBIT_DEVICE;
    }
    struct hobbit_device *d = calloc(1, sizeof *d);
    struct opening *opening = malloc(sizeof *opening); /* a lost worker keeps it */
    struct hb_worker *worker = hb_worker_new(HB_WORKER_THREADS);
    if (d == NULL || opening == NULL || worker == NULL || !hb_guard_add(worker, connection, remote)) {
        free(d);
        free(opening);
        (void) hb_worker_close(worker);
        snprintf(err, err_len, "out of memory");
        return HOBBIT_NOMEM;
    }
    d->worker = worker;
    d->dev = dev;
    d->patience_ms = remote ? GETS_READY_MS : HB_WORKER_FOREVER;
    *opening = (struct opening) {{.run = open_backend, .context = opening}, d, n_threads};
    bool called = hb_worker_call(d->worker, &opening->task, remote ? ANSWERS_MS : HB_WORKER_FOREVER);
    if (!called || d->backend == NULL) {
        char why[256] = "it cannot be initialised";
        if (!called) {
            hb_worker_reason(d->worker, why, sizeof why);
            hb_guard_fail(d->worker); /* perhaps it is gone, and nothing tells: the next one is to connect anew */
        } else {
            free(opening);
        }
        snprintf(err, err_len, "device %s cannot be used: %s", name, why);
        hobbit_device_close(d);
        return HOBBIT_DEVICE;
    }
    free(opening);
    *out = d;
    return HOBBIT_OK;
}

void hobbit_device_describe(const struct hobbit_device *d, struct hobbit_device_info *out) {
    *out = d->info;
}

int32_t hobbit_device_takes_layers(const struct hobbit_device *d) {
    enum ggml_backend_dev_type type = ggml_backend_dev_type(d->dev);
    return type == GGML_BACKEND_DEVICE_TYPE_GPU || type == GGML_BACKEND_DEVICE_TYPE_IGPU;
}

int32_t hobbit_device_is_remote(const struct hobbit_device *d) {
    return hb_rpc_is_remote(d->dev);
}

void *hobbit_device_for_layers(struct hobbit_device *d) {
    d->list[0] = hobbit_device_takes_layers(d) ? d->dev : NULL;
    return d->list;
}

void hobbit_device_delay(struct hobbit_device *d, const struct hobbit_device_delays *delays) {
    d->delays = *delays;
    d->copies_on = delays->turns ? HB_COMPUTES : d->copies_on;
}

static void close_backend(void *context) {
    struct hobbit_device *d = context;
    hb_executor_free(d->executor);
    ggml_backend_free(d->backend);
}

/* The device was given up, and its thread came back: it gives back what the device has, and the connection. */
static void close_late(void *context) {
    struct hobbit_device *d = context;
    if (!d->closing.done) {
        close_backend(d);
    }
    hb_guard_remove(d->worker);
}

static void nothing(void *context) {
    (void) context;
}

#define PATIENCE_MS 5000

/* Of a lost device nothing can be freed here: a thread may be in the middle of it. */
static void leave(struct hobbit_device *d) {
    struct hb_worker *worker = d->worker;
    d->last = (struct hb_task) {.run = close_late, .context = d};
    if (d->copies_on == HB_COMPUTES) { /* else another thread may still use it */
        hb_worker_last(worker, &d->last);
    }
    (void) hb_worker_close(worker);
}

/* Wait for what its other thread still copies. */
void hobbit_device_close(struct hobbit_device *d) {
    if (d == NULL) {
        return;
    }
    struct hb_worker *worker = d->worker;
    if (hb_worker_is_lost(worker)) {
        leave(d);
        return;
    }
    d->copied = (struct hb_task) {.run = nothing, .context = d};
    hb_worker_submit(worker, HB_COPIES, &d->copied, false);
    bool quiet = hb_worker_done(worker, &d->copied, PATIENCE_MS);
    d->closing = (struct hb_task) {.run = close_backend, .context = d};
    if (quiet) {
        hb_worker_submit(worker, HB_COMPUTES, &d->closing, false);
    }
    if (quiet && hb_worker_done(worker, &d->closing, PATIENCE_MS)) {
        hb_guard_remove(worker);
        (void) hb_worker_close(worker);
        free(d);
    } else {
        hb_worker_lose(worker, "it does not answer");
        leave(d);
    }
}
