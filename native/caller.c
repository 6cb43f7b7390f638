/* A thread for calls of llama.cpp that need a device: one that fails there never returns, and is told instead. */
#include <stdio.h>
#include <stdlib.h>

#include "device.h"
#include "guard.h"
#include "rpc.h"

#define PATIENCE_MS 5000

struct hobbit_caller {
    struct hb_worker *worker;
    struct hobbit_device *device; /* or NULL */
    const int32_t *cancelled;
};

/* A lost worker keeps it. */
struct hobbit_call {
    struct hb_task task;
    struct hobbit_caller *caller;
    hobbit_function *function;
    void *context;
    int cancelled_ms; /* for how long it has been waited for since it was cancelled */
    bool in_vain;
};

int32_t hobbit_caller_new(struct hobbit_device *device, const int32_t *cancelled, struct hobbit_caller **out) {
    struct hobbit_caller *c = calloc(1, sizeof *c);
    struct hb_worker *worker = hb_worker_new(1);
    const char *connection = device != NULL ? hb_rpc_connection(device->dev) : NULL;
    bool remote = device != NULL && hb_rpc_is_remote(device->dev);
    if (c == NULL || worker == NULL || !hb_guard_add(worker, connection, remote)) {
        free(c);
        (void) hb_worker_close(worker);
        return HOBBIT_NOMEM;
    }
    *c = (struct hobbit_caller) {worker, device, cancelled};
    *out = c;
    return HOBBIT_OK;
}

/* Nobody answers there any more, and nobody would tell: what failed did so on a thread that waits for ever. */
static bool device_is_lost(const struct hobbit_caller *c) {
    return c->device != NULL && hb_worker_is_lost(c->device->worker);
}

static void run(void *context) {
    struct hobbit_call *call = context;
    if (!device_is_lost(call->caller)) {
        call->function(call->context);
    }
    call->in_vain = device_is_lost(call->caller); /* before, or by now */
}

static int32_t tell(const struct hobbit_caller *c, char *err, size_t err_len) {
    char why[256];
    hb_worker_reason(c->worker, why, sizeof why);
    snprintf(err, err_len, "device %s was lost: %s; the model had layers there (-ngl): load it again",
             c->device != NULL ? c->device->full_name : "of -ngl", why);
    return HOBBIT_DEVICE;
}

int32_t hobbit_caller_start(struct hobbit_caller *c, hobbit_function *function, void *context,
                            struct hobbit_call **out, char *err, size_t err_len) {
    struct hobbit_call *call = *out = NULL;
    if (hb_worker_is_lost(c->worker)) {
        return tell(c, err, err_len);
    }
    call = calloc(1, sizeof *call);
    if (call == NULL) {
        snprintf(err, err_len, "out of memory");
        return HOBBIT_NOMEM;
    }
    *call = (struct hobbit_call) {
        .task = {.run = run, .context = call}, .caller = c, .function = function, .context = context};
    hb_worker_submit(c->worker, HB_COMPUTES, &call->task, false);
    *out = call;
    return HOBBIT_OK;
}

/* What computes experts there waits for the same device, with the model's lock. */
static void give_up(const struct hobbit_caller *c) {
    hb_worker_lose(c->worker, "it does not answer");
    if (c->device != NULL) {
        hb_worker_lose(c->device->worker, "it does not answer");
    }
}

int32_t hobbit_call_wait(struct hobbit_call *call, int32_t timeout_ms, int32_t *done, char *err, size_t err_len) {
    struct hobbit_caller *c = call->caller;
    *done = 0;
    if (!hb_worker_done(c->worker, &call->task, timeout_ms)) {
        call->cancelled_ms += __atomic_load_n(c->cancelled, __ATOMIC_RELAXED) != 0 ? timeout_ms : 0;
        if (call->cancelled_ms >= PATIENCE_MS) {
            give_up(c);
        }
        return hb_worker_is_lost(c->worker) ? tell(c, err, err_len) : HOBBIT_OK;
    }
    bool in_vain = call->in_vain;
    *done = 1 + (in_vain ? HOBBIT_DEVICE : HOBBIT_OK);
    free(call);
    if (in_vain) {
        char why[256];
        hb_worker_reason(c->device->worker, why, sizeof why);
        hb_worker_lose(c->worker, why);
        return tell(c, err, err_len);
    }
    return HOBBIT_OK;
}

void hobbit_caller_close(struct hobbit_caller *c) {
    if (c == NULL) {
        return;
    }
    if (!hb_worker_is_lost(c->worker)) {
        hb_guard_remove(c->worker);
    }
    if (hb_worker_close(c->worker)) {
        free(c);
    }
}
