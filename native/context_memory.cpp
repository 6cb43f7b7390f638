// llama.cpp tells what a context allocates only through a C++ function (of llama-ext.h), so this one file is C++. It
// must be compiled by the compiler family that compiled llama.cpp, which a source build does.
#include <cstddef>
#include <cstdio>
#include <cstring>

#include "ggml-backend.h"
#include "hobbit.h"
#include "llama-ext.h"

extern "C" {
#include "device.h"
}

static_assert(sizeof(hobbit_override) == sizeof(llama_model_tensor_buft_override));
static_assert(offsetof(hobbit_override, buffer_type) == offsetof(llama_model_tensor_buft_override, buft));

// Of the device by this name, which is new at its first use; NULL when there are too many.
static hobbit_device_memory * device_memory(struct hobbit_context_memory * all, const char * name) {
    for (int32_t i = 0; i < all->n_devices; i++) {
        if (std::strcmp(all->devices[i].name, name) == 0) {
            return &all->devices[i];
        }
    }
    if (all->n_devices == sizeof all->devices / sizeof *all->devices) {
        return nullptr;
    }
    hobbit_device_memory * device = &all->devices[all->n_devices++];
    std::snprintf(device->name, sizeof device->name, "%s", name);
    return device;
}

template <typename Memory>
static void add(Memory * to, uint64_t model, uint64_t kv, uint64_t compute) {
    to->model_bytes += model;
    to->kv_bytes += kv;
    to->compute_bytes += compute;
}

extern "C" void hobbit_context_memory(const struct llama_context * ctx, struct hobbit_context_memory * out) {
    *out = {};
    for (const auto & [buft, bytes] : llama_get_memory_breakdown(ctx)) {
        ggml_backend_dev_t dev = ggml_backend_buft_get_device(buft);
        // the weights in our own buffer type are address space, not memory
        uint64_t model = std::strcmp(ggml_backend_buft_name(buft), "Hobbit") != 0 ? bytes.model : 0;
        hobbit_device_memory * own = nullptr;
        if (dev != nullptr && !hb_shares_memory(dev, buft) && model + bytes.context + bytes.compute > 0) {
            own = device_memory(out, ggml_backend_dev_name(dev));
        }
        if (own != nullptr) {
            add(own, model, bytes.context, bytes.compute);
        } else {
            add(out, model, bytes.context, bytes.compute);
        }
    }
}
