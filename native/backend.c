#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ggml-backend-impl.h"
#include "hobbit.h"
#include "model.h"
#include "moe.h"
#include "os.h"
#include "router.h"
#include "segment.h"

/* ggml's interfaces, in its order: buffer, buffer type, backend, device, registry. The logic is elsewhere. */

/* --- buffer: address space that stands for expert weights; no expert byte is ever in it --- */

/* One a model; `tensors` are those whose names are changed for the time of loading. */
struct weights_type {
    struct ggml_backend_buffer_type buft;
    struct hobbit_model *model;
    struct ggml_tensor *tensors[]; /* one a matrix of the catalog, or NULL */
};

struct weights_buffer {
    struct weights_type *type;
    void *base;
    size_t size;
    struct hb_weight *weights; /* one a matrix of the catalog; and as many of these */
    struct hb_seen *seen;
};

static void buffer_free(ggml_backend_buffer_t buffer) {
    struct weights_buffer *b = buffer->context;
    for (int32_t i = 0; i < hb_model_catalog(b->type->model)->n_matrices; i++) {
        if (b->weights[i].model != NULL) {
            b->type->tensors[i] = NULL; /* freed too; loading failed if it is still there */
        }
        hb_router_forget(&b->seen[i]);
    }
    hb_space_release(b->base, b->size);
    free(b->seen);
    free(b->weights);
    free(b);
}

static void *buffer_base(ggml_backend_buffer_t buffer) {
    return ((struct weights_buffer *) buffer->context)->base;
}

static enum ggml_status buffer_init_tensor(ggml_backend_buffer_t buffer, struct ggml_tensor *tensor) {
    struct weights_buffer *b = buffer->context;
    const struct hb_catalog *catalog = hb_model_catalog(b->type->model);
    const struct hb_matrix *m = hb_catalog_find(catalog, tensor->name);
    if (m == NULL || (int32_t) tensor->type != m->type || tensor->ne[0] != m->ne0 || tensor->ne[1] != m->ne1 ||
        tensor->ne[2] != catalog->groups[m->group].n_expert || tensor->nb[2] != m->expert_bytes) {
        return GGML_STATUS_FAILED;
    }
    struct hb_weight *weight = &b->weights[m - catalog->matrices];
    *weight = (struct hb_weight) {b->type->model, m, &b->seen[m - catalog->matrices]};
    tensor->extra = weight;
    /* The loader passes over tensors it finds no data for by name. Under its own name it would allocate, fill and
     * throw away a copy of each expert tensor. */
    b->type->tensors[m - catalog->matrices] = tensor;
    ggml_set_name(tensor, "");
    return GGML_STATUS_SUCCESS;
}

/* Nothing to keep, should the loader ask all the same. */
static void buffer_set_tensor(ggml_backend_buffer_t buffer, struct ggml_tensor *tensor, const void *data,
                              size_t offset, size_t size) {
    (void) buffer, (void) tensor, (void) data, (void) offset, (void) size;
}

static void buffer_get_tensor(ggml_backend_buffer_t buffer, const struct ggml_tensor *tensor, void *data,
                              size_t offset, size_t size) {
    const struct hb_weight *w = tensor->extra;
    (void) buffer;
    if (w == NULL || !hb_model_read(w->model, w->matrix, data, offset, size)) {
        memset(data, 0, size); /* the model remembers that it failed */
    }
}

static void buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) {
    (void) buffer, (void) value;
}

static const struct ggml_backend_buffer_i buffer_interface = {
    .free_buffer = buffer_free,
    .get_base = buffer_base,
    .init_tensor = buffer_init_tensor,
    .set_tensor = buffer_set_tensor,
    .get_tensor = buffer_get_tensor,
    .clear = buffer_clear,
};

/* --- buffer type: one a model --- */

static const char *buft_name(ggml_backend_buffer_type_t buft) {
    (void) buft;
    return hb_buffer_type_name;
}

static ggml_backend_buffer_t buft_alloc(ggml_backend_buffer_type_t buft, size_t size) {
    struct weights_buffer *b = calloc(1, sizeof *b);
    if (b == NULL) {
        return NULL;
    }
    b->type = buft->context;
    b->size = size > 0 ? size : HB_PAGE;
    size_t n_matrices = (size_t) hb_model_catalog(b->type->model)->n_matrices;
    b->weights = calloc(n_matrices, sizeof *b->weights);
    b->seen = calloc(n_matrices, sizeof *b->seen);
    if (b->weights == NULL || b->seen == NULL || hb_space_reserve(&b->base, b->size) != 0) {
        free(b->seen);
        free(b->weights);
        free(b);
        return NULL;
    }
    return ggml_backend_buffer_init(buft, buffer_interface, b, size);
}

static size_t buft_alignment(ggml_backend_buffer_type_t buft) {
    (void) buft;
    return 32;
}

static bool buft_is_host(ggml_backend_buffer_type_t buft) {
    (void) buft;
    return false;
}

static const struct ggml_backend_buffer_type_i buft_interface = {
    .get_name = buft_name,
    .alloc_buffer = buft_alloc,
    .get_alignment = buft_alignment,
    .is_host = buft_is_host,
};

/* --- backend: one a llama_context --- */

static const char *backend_name(ggml_backend_t backend) {
    (void) backend;
    return hb_buffer_type_name;
}

static void backend_free(ggml_backend_t backend) {
    hb_moe_free(backend->context);
    free(backend);
}

static enum ggml_status backend_compute(ggml_backend_t backend, struct ggml_cgraph *graph) {
    return hb_moe_compute(backend->context, graph);
}

static const struct ggml_backend_i backend_interface = {
    .get_name = backend_name,
    .free = backend_free,
    .graph_compute = backend_compute,
};

static ggml_guid_t backend_guid(void) {
    static ggml_guid guid = {0x68, 0x6f, 0x62, 0x62, 0x69, 0x74, 0x2d, 0x6d,
                             0x6f, 0x65, 0x2d, 0x31, 0x9c, 0x41, 0x5e, 0x07};
    return &guid;
}

/* --- device: one, for all models --- */

static const char *device_name(ggml_backend_dev_t device) {
    (void) device;
    return hb_buffer_type_name;
}

static const char *device_description(ggml_backend_dev_t device) {
    (void) device;
    return "MoE experts streamed from disk";
}

static void device_memory(ggml_backend_dev_t device, size_t *free, size_t *total) {
    (void) device;
    *free = *total = 0;
}

/* An accelerator joins every context on its own and comes before the CPU. */
static enum ggml_backend_dev_type device_type(ggml_backend_dev_t device) {
    (void) device;
    return GGML_BACKEND_DEVICE_TYPE_ACCEL;
}

static void device_props(ggml_backend_dev_t device, struct ggml_backend_dev_props *props) {
    *props = (struct ggml_backend_dev_props) {
        .name = device_name(device),
        .description = device_description(device),
        .type = device_type(device),
    };
}

static ggml_backend_t device_init(ggml_backend_dev_t device, const char *params) {
    (void) params;
    struct hb_moe *moe = hb_moe_new();
    struct ggml_backend *backend = calloc(1, sizeof *backend);
    if (moe == NULL || backend == NULL) {
        hb_moe_free(moe);
        free(backend);
        return NULL;
    }
    *backend = (struct ggml_backend) {backend_guid(), backend_interface, device, moe};
    return backend;
}

/* Results live where the CPU's do, so that neither side copies. */
static ggml_backend_buffer_type_t device_buffer_type(ggml_backend_dev_t device) {
    (void) device;
    return ggml_backend_cpu_buffer_type();
}

static bool device_supports_op(ggml_backend_dev_t device, const struct ggml_tensor *op) {
    (void) device;
    bool supported = hb_moe_supports(op);
    if (supported && op->op == GGML_OP_MUL_MAT_ID) {
        hb_router_see(op); /* llama.cpp asks before it divides the graph */
    }
    return supported;
}

static bool device_supports_buft(ggml_backend_dev_t device, ggml_backend_buffer_type_t buft) {
    (void) device;
    return buft->iface.get_name == buft_name || ggml_backend_buft_is_host(buft);
}

static const struct ggml_backend_device_i device_interface = {
    .get_name = device_name,
    .get_description = device_description,
    .get_memory = device_memory,
    .get_type = device_type,
    .get_props = device_props,
    .init_backend = device_init,
    .get_buffer_type = device_buffer_type,
    .supports_op = device_supports_op,
    .supports_buft = device_supports_buft,
};

/* --- registry --- */

static struct ggml_backend_reg registry;

static struct ggml_backend_device the_device = {.iface = device_interface, .reg = &registry};

static const char *reg_name(ggml_backend_reg_t reg) {
    (void) reg;
    return hb_buffer_type_name;
}

static size_t reg_device_count(ggml_backend_reg_t reg) {
    (void) reg;
    return 1;
}

static ggml_backend_dev_t reg_device(ggml_backend_reg_t reg, size_t index) {
    (void) reg;
    return index == 0 ? &the_device : NULL;
}

static void set_n_threads(ggml_backend_t backend, int n_threads) {
    hb_moe_set_n_threads(backend->context, n_threads);
}

static void set_abort_callback(ggml_backend_t backend, ggml_abort_callback callback, void *data) {
    hb_moe_set_abort_callback(backend->context, callback, data);
}

static void *reg_proc_address(ggml_backend_reg_t reg, const char *name) {
    (void) reg;
    if (strcmp(name, "ggml_backend_set_n_threads") == 0) {
        return (void *) (uintptr_t) set_n_threads;
    }
    if (strcmp(name, "ggml_backend_set_abort_callback") == 0) {
        return (void *) (uintptr_t) set_abort_callback;
    }
    return NULL;
}

static struct ggml_backend_reg registry = {
    .api_version = GGML_BACKEND_API_VERSION,
    .iface = {
        .get_name = reg_name,
        .get_device_count = reg_device_count,
        .get_device = reg_device,
        .get_proc_address = reg_proc_address,
    },
};

/* --- our own interface, where it needs ggml --- */

int32_t hobbit_register(char *err, size_t err_len) {
    ggml_backend_reg_t cpu = ggml_backend_reg_by_name("CPU"); /* compiled with the installed ggml */
    if (cpu != NULL && cpu->api_version != GGML_BACKEND_API_VERSION) {
        snprintf(err, err_len, "hobbit is built for version %d of ggml's backend interface, the installed one has %d",
                 GGML_BACKEND_API_VERSION, cpu->api_version);
        return HOBBIT_UNSUPPORTED;
    }
    if (ggml_backend_reg_by_name(hb_buffer_type_name) == NULL) {
        ggml_backend_register(&registry);
    }
    return HOBBIT_OK;
}

void *hobbit_buffer_type_new(struct hobbit_model *model) {
    size_t n_matrices = (size_t) hb_model_catalog(model)->n_matrices;
    struct weights_type *type = calloc(1, sizeof *type + n_matrices * sizeof type->tensors[0]);
    if (type != NULL) {
        type->buft = (struct ggml_backend_buffer_type) {buft_interface, &the_device, type};
        type->model = model;
    }
    return type;
}

void hobbit_buffer_type_loaded(void *buffer_type) {
    struct weights_type *type = buffer_type;
    const struct hb_catalog *catalog = hb_model_catalog(type->model);
    for (int32_t i = 0; i < catalog->n_matrices; i++) {
        if (type->tensors[i] != NULL) {
            ggml_set_name(type->tensors[i], catalog->matrices[i].name);
            type->tensors[i] = NULL;
        }
    }
}

void hobbit_buffer_type_free(void *buffer_type) {
    free(buffer_type);
}

void *hobbit_host_buffer_type(void) {
    return ggml_backend_cpu_buffer_type();
}

static bool abort_callback(void *data) {
    return __atomic_load_n((const int32_t *) data, __ATOMIC_RELAXED) != 0;
}

void *hobbit_abort_callback(void) {
    return (void *) (uintptr_t) abort_callback;
}

/* A stock llama.cpp program may load this library as a dynamic backend. */
HOBBIT_API ggml_backend_reg_t ggml_backend_init(void);
ggml_backend_reg_t ggml_backend_init(void) {
    return &registry;
}
