/* A device of ggml's that can hold experts and compute them. Everything that is asked of it is asked on its worker's
 * threads: so all backends are asynchronous, and one that ends the process costs its device only (guard.h). There are
 * two, one for copies, where the device can do both at the same time. */
#ifndef HB_DEVICE_H
#define HB_DEVICE_H

#include "ggml-backend.h"
#include "hobbit.h"
#include "worker.h"

struct hb_executor;

struct hobbit_device {
    struct hb_worker *worker;
    int copies_on;   /* which of its threads */
    int patience_ms; /* how long it may take to get ready for a model, or HB_WORKER_FOREVER */
    ggml_backend_dev_t dev;
    ggml_backend_dev_t list[2]; /* it, if it takes layers, and a NULL */
    ggml_backend_t backend;
    ggml_backend_buffer_type_t buffer_type;
    struct hobbit_device_info info;
    char full_name[200]; /* with its description */
    struct hobbit_device_delays delays;
    struct hb_executor *executor; /* its arena for a model, or NULL */
    struct hb_task copied, closing, last;
};

/* Whether what lies in such buffers of a device is in the machine's own memory. */
bool hb_shares_memory(ggml_backend_dev_t dev, ggml_backend_buffer_type_t buffer_type);

#endif
