// llama.cpp tells what a context allocates only through a C++ function (of llama-ext.h), so this one file is C++. It
// must be compiled by the compiler family that compiled llama.cpp, which a source build does.
#include <cstddef>
#include <cstring>

#include "ggml-backend.h"
#include "hobbit.h"
#include "llama-ext.h"

static_assert(sizeof(hobbit_override) == sizeof(llama_model_tensor_buft_override));
static_assert(offsetof(hobbit_override, buffer_type) == offsetof(llama_model_tensor_buft_override, buft));

extern "C" void hobbit_context_memory(const struct llama_context * ctx, struct hobbit_context_memory * out) {
    *out = {};
    for (const auto & [buft, bytes] : llama_get_memory_breakdown(ctx)) {
        // the weights in our own buffer type are address space, not memory
        if (std::strcmp(ggml_backend_buft_name(buft), "Hobbit") != 0) {
            out->model_bytes += bytes.model;
        }
        out->kv_bytes += bytes.context;
        out->compute_bytes += bytes.compute;
    }
}
