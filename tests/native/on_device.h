/* What the tests of devices share: ggml's CPU in the place of one, and a way to keep it from beginning. */
#ifndef ON_DEVICE_H
#define ON_DEVICE_H

#include <pthread.h>
#include <unistd.h>

#include "device.h"
#include "layers.h"
#include "model_impl.h"

static inline struct hobbit_stats stats_of(const struct arm *arm) {
    struct hobbit_stats stats;
    hobbit_model_stats(arm->model, &stats);
    return stats;
}

static inline uint64_t whole_expert(int32_t precision) {
    uint64_t bytes = 0;
    for (enum role role = UP; role <= GATE_UP; role++) {
        bytes += has(file.variant, role) ? expert_bytes(precision, role) : 0;
    }
    return bytes;
}

static inline struct hobbit_device *open_device(void) {
    struct hobbit_device *device;
    char err[256];
    CHECK_EQUAL(hobbit_device_open("CPU", 1, &device, err, sizeof err), HOBBIT_OK);
    return device;
}

/* Wait for the copies that are on their way there. */
static inline void settle(const struct arm *arm) {
    hb_model_lock(arm->model);
    hb_model_end_uploads(arm->model);
    CHECK(hb_cache_is_valid(arm->model->cache));
    hb_model_unlock(arm->model);
}

static pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;

/* A task for a device's worker, urgent: it does nothing else until the gate is open. */
static inline void wait_at_the_gate(void *context) {
    (void) context;
    pthread_mutex_lock(&gate);
    pthread_mutex_unlock(&gate);
}

/* Keep one of a device's threads from doing anything, until the gate is unlocked. */
static inline void hold(struct hobbit_device *device, int thread, struct hb_task *waits) {
    *waits = (struct hb_task) {.run = wait_at_the_gate};
    pthread_mutex_lock(&gate);
    hb_worker_submit(device->worker, thread, waits, true);
    while (!hb_worker_is_busy(device->worker)) {
        usleep(100);
    }
}

#endif
