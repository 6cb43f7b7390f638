/* What an expert costs at start, on a device and here, measured at the same time: they share the memory's bandwidth. */
#ifndef HB_CALIBRATE_H
#define HB_CALIBRATE_H

#include <stdbool.h>

#include "model.h"
#include "site.h"
#include "worker.h"

struct hb_calibration {
    struct hb_site there;
    /* The same experts here: where their matrices are in a slot of the arena, which holds nothing yet, and memory for
     * activations, as much as the device has. */
    const struct hb_copy *copy;
    struct hb_arena arena;
    const struct hb_block *memory;
    int32_t n_threads; /* of the CPU */
    struct hb_worker *worker; /* the device's */
    int patience_ms; /* after which it is lost, or HB_WORKER_FOREVER */
    void (*copy_once)(void *context); /* an expert to the device, on its worker's thread */
    void *context;
    uint64_t read_ns_per_mib; /* 0: unknown */
};

/* It takes up to a second. What cannot be measured there is said to take for ever. False: the worker is lost, or memory
 * is short. */
bool hb_calibrate(const struct hb_calibration *calibration, struct hb_costs *costs);

#endif
