/* A device of ggml's that can hold experts and compute them. Everything that is asked of it is asked on its worker's
 * thread: so all backends are asynchronous, and one that ends the process costs its device only (guard.h). */
#ifndef HB_DEVICE_H
#define HB_DEVICE_H

#include "ggml-backend.h"
#include "hobbit.h"
#include "worker.h"

struct hb_executor;

struct hobbit_device {
    struct hb_worker *worker;
    ggml_backend_dev_t dev;
    ggml_backend_t backend;
    ggml_backend_buffer_type_t buffer_type;
    struct hobbit_device_info info;
    struct hb_executor *executor; /* its arena for a model, or NULL */
    struct hb_task closing;
};

#endif
