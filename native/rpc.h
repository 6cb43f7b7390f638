/* Devices of llama.cpp's RPC servers: hobbit's own, so that llama.cpp uses none of them by itself. */
#ifndef HB_RPC_H
#define HB_RPC_H

#include <stdbool.h>
#include <stddef.h>

#include "ggml-backend.h"

size_t hb_rpc_n_devices(void);
ggml_backend_dev_t hb_rpc_device(size_t index);
bool hb_rpc_is_remote(ggml_backend_dev_t device);
/* What stands for its connection in guard.h: all devices of a server have the same. */
const char *hb_rpc_connection(ggml_backend_dev_t device);
/* HOST:PORT of a remote device, as people write it; ggml's description of another. */
void hb_rpc_describe(ggml_backend_dev_t device, char *text, size_t length);
/* Whether a remote device's server can be reached; else why not. ggml would take that for the end, holding its locks. */
bool hb_rpc_answers(ggml_backend_dev_t device, char *err, size_t err_len);

#endif
