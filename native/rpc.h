/* Devices of llama.cpp's RPC servers: hobbit's own, so that llama.cpp uses none of them by itself. */
#ifndef HB_RPC_H
#define HB_RPC_H

#include <stdbool.h>
#include <stddef.h>

#include "ggml-backend.h"

size_t hb_rpc_n_devices(void);
ggml_backend_dev_t hb_rpc_device(size_t index);
bool hb_rpc_is_remote(ggml_backend_dev_t device);

#endif
