/* Expert layers as llama.cpp builds them, computed on weights that stream from a file (two files, with low copies) or,
 * to compare with, by the CPU on the same weights in memory. */
#ifndef LAYERS_H
#define LAYERS_H

#include "files.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "hobbit.h"

#define LAYERS 2
#define EXPERTS 8
#define EMBD 256
#define FF 256
#define MAX_USED 3
#define MAX_TOKENS 24
#define N_MATRICES 4

enum role { UP, GATE, DOWN, GATE_UP };

/* What an architecture may do differently in its expert layers. */
struct variant {
    const char *name;
    enum ggml_type type, low_type;
    bool fused, gated, biased, scaled, weights_first;
    int n_used;
};

static const struct variant variants[] = {
    {.name = "Q8_0", .type = GGML_TYPE_Q8_0, .low_type = GGML_TYPE_Q4_0, .gated = true, .n_used = 3},
    {.name = "Q4_K, fused", .type = GGML_TYPE_Q4_K, .low_type = GGML_TYPE_Q3_K, .fused = true, .n_used = 2},
    {.name = "Q6_K, biased", .type = GGML_TYPE_Q6_K, .low_type = GGML_TYPE_Q4_1,
     .gated = true, .biased = true, .n_used = 3},
    {.name = "F16, no gate", .type = GGML_TYPE_F16, .low_type = GGML_TYPE_Q8_0, .n_used = 2},
    {.name = "F32, scaled", .type = GGML_TYPE_F32, .low_type = GGML_TYPE_F16,
     .gated = true, .scaled = true, .n_used = 2},
    {.name = "Q8_0, weights first", .type = GGML_TYPE_Q8_0, .low_type = GGML_TYPE_Q4_0,
     .gated = true, .weights_first = true, .n_used = 1},
};
#ifdef __SANITIZE_THREAD__ /* slow, and threads do the same for all */
enum { N_VARIANTS = 1 };
#else
enum { N_VARIANTS = sizeof variants / sizeof variants[0] };
#endif

/* --- the weights: in files, and in memory for the arm to compare with --- */

static struct {
    const struct variant *variant;
    struct {
        enum ggml_type type;
        const char *path;
        uint64_t size;
        char *data;
        uint64_t offset[LAYERS][N_MATRICES]; /* 0: no such matrix */
    } copies[HOBBIT_PRECISIONS];
    float bias[LAYERS][N_MATRICES][EXPERTS * 2 * FF];
} file;

static inline bool has(const struct variant *v, enum role role) {
    return role == DOWN || (role == GATE_UP ? v->fused : role == UP ? !v->fused : v->gated);
}

static inline int64_t rows_of(enum role role) {
    return role == GATE_UP ? 2 * FF : role == DOWN ? EMBD : FF;
}

static inline uint64_t expert_bytes(int precision, enum role role) {
    return ggml_row_size(file.copies[precision].type, EMBD) * (uint64_t) rows_of(role);
}

static inline void random_floats(float *out, int64_t n, uint64_t *seed) {
    for (int64_t i = 0; i < n; i++) {
        out[i] = ((float) check_random(seed, 1 << 20) / (1 << 19) - 1.0f) * 0.2f;
    }
}

static inline void add_matrix(int layer, enum role role, uint64_t *seed) {
    int64_t rows = rows_of(role) * EXPERTS;
    float *values = malloc((size_t) (rows * EMBD) * sizeof(float));
    CHECK(values != NULL);
    random_floats(values, rows * EMBD, seed);
    random_floats(file.bias[layer][role], EXPERTS * rows_of(role), seed);
    for (int p = 0; p < HOBBIT_PRECISIONS; p++) {
        uint64_t bytes = expert_bytes(p, role) * EXPERTS, at = file.copies[p].size;
        file.copies[p].offset[layer][role] = at;
        file.copies[p].size += bytes + 32;
        file.copies[p].data = realloc(file.copies[p].data, file.copies[p].size);
        CHECK(file.copies[p].data != NULL);
        char *data = file.copies[p].data + at;
        CHECK_EQUAL(ggml_quantize_chunk(file.copies[p].type, values, data, 0, rows, EMBD, NULL), bytes);
        memset(data + bytes, 0, 32); /* a gap, so that offsets are not all alike */
    }
    free(values);
}

static inline void make_weights(const struct variant *v) {
    uint64_t seed = 11;
    file.variant = v;
    memset(file.copies, 0, sizeof file.copies);
    for (int p = 0; p < HOBBIT_PRECISIONS; p++) {
        file.copies[p].type = p == HOBBIT_LOW ? v->low_type : v->type;
        file.copies[p].size = 96;
        file.copies[p].data = calloc(1, file.copies[p].size);
    }
    for (int layer = 0; layer < LAYERS; layer++) {
        for (enum role role = UP; role <= GATE_UP; role++) {
            if (has(v, role)) {
                add_matrix(layer, role, &seed);
            }
        }
    }
    for (int p = 0; p < HOBBIT_PRECISIONS; p++) {
        file.copies[p].path = file_make(1);
        FILE *out = fopen(file.copies[p].path, "wb");
        CHECK(out != NULL && fwrite(file.copies[p].data, 1, file.copies[p].size, out) == file.copies[p].size &&
              fclose(out) == 0);
    }
}

static inline void free_weights(void) {
    for (int p = 0; p < HOBBIT_PRECISIONS; p++) {
        free(file.copies[p].data);
        file.copies[p].data = NULL;
    }
    files_remove();
}

/* --- an arm: the graph's weights, and the backends that compute it --- */

struct arm {
    struct hobbit_model *model; /* NULL in the arm to compare with */
    void *buffer_type;
    int32_t cancelled;
    struct ggml_context *weights_ctx, *bias_ctx;
    ggml_backend_buffer_t weights_buffer, bias_buffer;
    struct ggml_tensor *weights[LAYERS][N_MATRICES], *biases[LAYERS][N_MATRICES];
    struct ggml_tensor *low_weights[LAYERS][N_MATRICES]; /* of the arm to compare with */
    const uint8_t (*mixture)[MAX_USED * MAX_TOKENS];     /* the precision of each pair; NULL: all high */
    ggml_backend_t backends[2];
    ggml_backend_sched_t sched;
};

static inline struct ggml_context *new_context(void) {
    struct ggml_context *ctx = ggml_init((struct ggml_init_params) {.mem_size = 1 << 20, .no_alloc = true});
    CHECK(ctx != NULL);
    return ctx;
}

/* Slots of the cache. Without low ones the model has no low copies; with them they share their bytes. */
struct room {
    int32_t high, low;
};

static bool first_at_home; /* besides, there is room for all high copies of the first layer */

static inline int32_t at_most(uint64_t n, int32_t limit) {
    return n < (uint64_t) limit ? (int32_t) n : limit;
}

static inline void allocate(struct hobbit_model *m, struct room room) {
    struct hobbit_pool pool = {0};
    for (int p = 0; p < HOBBIT_PRECISIONS; p++) {
        for (int layer = 0; layer < LAYERS; layer++) {
            uint64_t bytes = hobbit_model_slot_bytes(m, layer, p);
            pool.slot_bytes[p] = bytes > pool.slot_bytes[p] ? bytes : pool.slot_bytes[p];
        }
    }
    uint64_t high = pool.slot_bytes[HOBBIT_HIGH], low = pool.slot_bytes[HOBBIT_LOW];
    pool.bytes = (uint64_t) room.high * high + (uint64_t) room.low * low;
    pool.n_slots[HOBBIT_HIGH] = at_most(pool.bytes / high, LAYERS * EXPERTS);
    pool.n_slots[HOBBIT_LOW] = low > 0 ? at_most(pool.bytes / low, LAYERS * EXPERTS) : 0;
    struct hobbit_pool pools[] = {pool, {.bytes = EXPERTS * high, .slot_bytes = {high}, .n_slots = {EXPERTS}}};
    int32_t n_pools = first_at_home ? 2 : 1, pool_of_group[LAYERS] = {n_pools - 1};
    char err[256];
    CHECK_EQUAL(hobbit_model_allocate(m, pools, n_pools, pool_of_group, err, sizeof err), HOBBIT_OK);
}

static inline struct hobbit_model *open_model(int32_t io, struct room room, bool with_low, const int32_t *cancelled) {
    static const struct hobbit_group groups[LAYERS] = {{0, EXPERTS}, {1, EXPERTS}};
    struct hobbit_matrix matrices[LAYERS * HOBBIT_PRECISIONS * N_MATRICES];
    char names[LAYERS * HOBBIT_PRECISIONS * N_MATRICES][16], err[256];
    int32_t n = 0;
    for (int layer = 0; layer < LAYERS; layer++) {
        for (int p = 0; p <= with_low; p++) {
            for (enum role role = UP; role <= GATE_UP; role++) {
                if (has(file.variant, role)) {
                    snprintf(names[n], sizeof names[n], "%d.%d", layer, role);
                    matrices[n] = (struct hobbit_matrix) {
                        .name = names[n], .group = layer, .precision = p, .file = p,
                        .type = (int32_t) file.copies[p].type, .ne0 = EMBD, .ne1 = rows_of(role),
                        .offset = file.copies[p].offset[layer][role], .expert_bytes = expert_bytes(p, role),
                    };
                    n++;
                }
            }
        }
    }
    const struct hobbit_file files[] = {{file.copies[HOBBIT_HIGH].path, file.copies[HOBBIT_HIGH].size},
                                        {file.copies[HOBBIT_LOW].path, file.copies[HOBBIT_LOW].size}};
    struct hobbit_options options = {
        .files = files, .n_files = 1 + with_low, .matrices = matrices, .n_matrices = n,
        .groups = groups, .n_groups = LAYERS, .io = io, .io_threads = 1, .cancelled = cancelled,
        .extents = &(struct hobbit_extent) {.length = 1, .source = HOBBIT_SOURCE_HOLE}, .n_extents = 1,
    };
    struct hobbit_model *m = NULL;
    CHECK_EQUAL(hobbit_model_open(&options, &m, err, sizeof err), HOBBIT_OK);
    allocate(m, room);
    return m;
}

static inline void make_tensors(struct arm *arm, bool in_memory) {
    arm->weights_ctx = new_context();
    arm->bias_ctx = new_context();
    for (int layer = 0; layer < LAYERS; layer++) {
        for (enum role role = UP; role <= GATE_UP; role++) {
            if (!has(file.variant, role)) {
                continue;
            }
            int64_t rows = rows_of(role), n_expert = EXPERTS + in_memory; /* and one for the pairs of others */
            struct ggml_tensor *w = ggml_new_tensor_3d(arm->weights_ctx, file.variant->type, EMBD, rows, n_expert);
            ggml_format_name(w, "%d.%d", layer, role);
            arm->weights[layer][role] = w;
            if (in_memory) {
                arm->low_weights[layer][role] =
                    ggml_new_tensor_3d(arm->weights_ctx, file.variant->low_type, EMBD, rows, n_expert);
            }
            arm->biases[layer][role] = ggml_new_tensor_2d(arm->bias_ctx, GGML_TYPE_F32, rows, n_expert);
        }
    }
}

static inline void fill_tensor(struct ggml_tensor *t, const void *data, size_t bytes) {
    ggml_backend_tensor_set(t, data, 0, bytes);
    if (ggml_nbytes(t) > bytes) {
        ggml_backend_tensor_set(t, data, bytes, ggml_nbytes(t) - bytes);
    }
}

static inline void fill_tensors(struct arm *arm) {
    for (int layer = 0; layer < LAYERS; layer++) {
        for (enum role role = UP; role <= GATE_UP; role++) {
            if (!has(file.variant, role)) {
                continue;
            }
            fill_tensor(arm->biases[layer][role], file.bias[layer][role],
                        (size_t) (EXPERTS * rows_of(role)) * sizeof(float));
            for (int p = 0; p < HOBBIT_PRECISIONS; p++) {
                struct ggml_tensor *w = (p == HOBBIT_LOW ? arm->low_weights : arm->weights)[layer][role];
                if (w != NULL) {
                    fill_tensor(w, file.copies[p].data + file.copies[p].offset[layer][role],
                                EXPERTS * expert_bytes(p, role));
                }
            }
        }
    }
}

static inline ggml_backend_t new_streaming_backend(void) {
    char err[256];
    CHECK(hobbit_register(err, sizeof err) == HOBBIT_OK);
    ggml_backend_t backend = ggml_backend_dev_init(ggml_backend_dev_by_name("Hobbit"), NULL);
    CHECK(backend != NULL);
    return backend;
}

static inline void set_threads(const struct arm *arm, int n) {
    for (int i = 0; i < 2; i++) {
        if (arm->backends[i] != NULL) {
            ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(arm->backends[i]));
            ggml_backend_set_n_threads_t set = (ggml_backend_set_n_threads_t) (uintptr_t)
                ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
            set(arm->backends[i], n);
        }
    }
}

static inline void add_backends(struct arm *arm) {
    int n = 0;
    if (arm->model != NULL) {
        arm->backends[n++] = new_streaming_backend();
    }
    arm->backends[n++] = ggml_backend_cpu_init();
    arm->sched = ggml_backend_sched_new(arm->backends, NULL, n, 512, false, false);
    set_threads(arm, 1);
}

static inline struct arm *open_any_arm(struct room room, bool with_low, int32_t io) {
    struct arm *arm = calloc(1, sizeof *arm);
    CHECK(arm != NULL);
    make_tensors(arm, room.high == 0);
    ggml_backend_buffer_type_t type = ggml_backend_cpu_buffer_type();
    if (room.high > 0) {
        arm->model = open_model(io, room, with_low, &arm->cancelled);
        type = arm->buffer_type = hobbit_buffer_type_new(arm->model);
    }
    arm->weights_buffer = ggml_backend_alloc_ctx_tensors_from_buft(arm->weights_ctx, type);
    arm->bias_buffer = ggml_backend_alloc_ctx_tensors_from_buft(arm->bias_ctx, ggml_backend_cpu_buffer_type());
    CHECK(arm->weights_buffer != NULL && arm->bias_buffer != NULL);
    if (arm->model != NULL) {
        hobbit_buffer_type_loaded(arm->buffer_type);
    }
    ggml_backend_buffer_set_usage(arm->weights_buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    ggml_backend_buffer_set_usage(arm->bias_buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    fill_tensors(arm);
    add_backends(arm);
    return arm;
}

/* `n_slots` of the cache; 0: weights in memory, on the CPU alone. */
static inline struct arm *open_arm(int32_t n_slots, int32_t io) {
    return open_any_arm((struct room) {n_slots, 0}, false, io);
}

/* Of two precisions. */
static inline struct arm *open_mixed_arm(struct room room, int32_t io) {
    return open_any_arm(room, true, io);
}

static inline void close_arm(struct arm *arm) {
    ggml_backend_sched_free(arm->sched);
    for (int i = 0; i < 2; i++) {
        if (arm->backends[i] != NULL) {
            ggml_backend_free(arm->backends[i]);
        }
    }
    ggml_backend_buffer_free(arm->weights_buffer);
    ggml_backend_buffer_free(arm->bias_buffer);
    ggml_free(arm->weights_ctx);
    ggml_free(arm->bias_ctx);
    hobbit_model_close(arm->model);
    hobbit_buffer_type_free(arm->buffer_type);
    free(arm);
}

/* --- the graph: as llama.cpp builds it --- */

struct input {
    int n_tokens;
    float values[EMBD * MAX_TOKENS];
    float weights[MAX_USED * MAX_TOKENS];
    int32_t table[EXPERTS * MAX_TOKENS]; /* experts by rank; the first n_used of each token are used */
};

/* The experts of one layer, in one precision. */
struct layer {
    struct ggml_context *ctx;
    const struct arm *arm;
    int index;
    struct ggml_tensor *ids, *weights;
    bool low;
};

static inline struct ggml_tensor *multiply(const struct layer *l, enum role role, struct ggml_tensor *x) {
    struct ggml_tensor *w = (l->low ? l->arm->low_weights : l->arm->weights)[l->index][role];
    struct ggml_tensor *y = ggml_mul_mat_id(l->ctx, w, x, l->ids);
    if (file.variant->scaled) {
        y = ggml_mul(l->ctx, y, l->weights);
    }
    return file.variant->biased ? ggml_add_id(l->ctx, y, l->arm->biases[l->index][role], l->ids) : y;
}

static inline struct ggml_tensor *activate(const struct layer *l, struct ggml_tensor *x) {
    const struct variant *v = file.variant;
    struct ggml_context *ctx = l->ctx;
    if (v->fused) {
        struct ggml_tensor *both = multiply(l, GATE_UP, x);
        struct ggml_tensor *gate = ggml_view_3d(ctx, both, FF, both->ne[1], both->ne[2], both->nb[1], both->nb[2], 0);
        struct ggml_tensor *up = ggml_view_3d(ctx, both, FF, both->ne[1], both->ne[2], both->nb[1], both->nb[2],
                                              FF * sizeof(float));
        return ggml_swiglu_split(ctx, gate, up);
    }
    struct ggml_tensor *up = multiply(l, UP, x);
    if (!v->gated) {
        return ggml_sqr(ctx, ggml_relu(ctx, up));
    }
    return ggml_swiglu_split(ctx, multiply(l, GATE, x), up);
}

/* What each pair adds, [EMBD, n_used, n_tokens]. */
static inline struct ggml_tensor *experts(const struct layer *l, struct ggml_tensor *x) {
    struct ggml_tensor *cur = multiply(l, DOWN, activate(l, x));
    if (!file.variant->weights_first) {
        cur = ggml_mul(l->ctx, cur, l->weights);
        ggml_format_name(cur, "ffn_moe_weighted-%d", l->index);
    }
    return cur;
}

/* A ggml_custom2_op_t: of each pair its row of the high or low result, or zeros. `data` has a precision a pair. */
static inline void mix(struct ggml_tensor *dst, const struct ggml_tensor *high, const struct ggml_tensor *low, int ith,
                       int nth, void *data) {
    const uint8_t *precisions = data;
    size_t row = EMBD * sizeof(float);
    (void) ith, (void) nth;
    for (int64_t i = 0; i < dst->ne[1] * dst->ne[2]; i++) {
        char *to = (char *) dst->data + (size_t) i * row;
        if (precisions[i] == HOBBIT_SKIP) {
            memset(to, 0, row);
        } else {
            memcpy(to, (char *) (precisions[i] == HOBBIT_LOW ? low : high)->data + (size_t) i * row, row);
        }
    }
}

/* ggml_custom1_op_ts: the pairs of other precisions go to an expert of their own, as ggml's kernels may depend on the
 * number of rows that an expert has. */
static inline void pick(struct ggml_tensor *dst, const struct ggml_tensor *ids, const uint8_t *precisions, int which) {
    int32_t *to = dst->data;
    for (int64_t i = 0; i < ids->ne[0] * ids->ne[1]; i++) {
        const char *row = (const char *) ids->data + (size_t) (i / ids->ne[0]) * ids->nb[1];
        to[i] = precisions[i] == which ? ((const int32_t *) row)[i % ids->ne[0]] : EXPERTS;
    }
}

static inline void pick_high(struct ggml_tensor *dst, const struct ggml_tensor *ids, int ith, int nth, void *data) {
    (void) ith, (void) nth;
    pick(dst, ids, data, HOBBIT_HIGH);
}

static inline void pick_low(struct ggml_tensor *dst, const struct ggml_tensor *ids, int ith, int nth, void *data) {
    (void) ith, (void) nth;
    pick(dst, ids, data, HOBBIT_LOW);
}

/* The high pairs with the high stack, the low pairs with the low one, and their rows put together. */
static inline struct ggml_tensor *mixed_experts(struct layer *l, struct ggml_tensor *x) {
    struct ggml_tensor *ids = l->ids;
    void *precisions = (void *) (uintptr_t) l->arm->mixture[l->index];
    l->ids = ggml_map_custom1(l->ctx, ids, pick_high, 1, precisions);
    struct ggml_tensor *high = experts(l, x);
    l->ids = ggml_map_custom1(l->ctx, ids, pick_low, 1, precisions);
    l->low = true;
    return ggml_map_custom2(l->ctx, high, experts(l, x), mix, 1, precisions);
}

static inline struct ggml_tensor *moe_layer(struct ggml_context *ctx, struct ggml_cgraph *graph, const struct arm *arm,
                                            int layer, struct ggml_tensor *x, struct ggml_tensor *ids,
                                            struct ggml_tensor *weights) {
    const struct variant *v = file.variant;
    struct layer l = {ctx, arm, layer, ids, weights, false};
    int64_t n_tokens = x->ne[1];
    struct ggml_tensor *cur = ggml_reshape_3d(ctx, ggml_rms_norm(ctx, x, 1e-6f), EMBD, 1, n_tokens);
    if (v->weights_first) {
        cur = ggml_mul(ctx, ggml_repeat_4d(ctx, cur, EMBD, v->n_used, n_tokens, 1), weights);
        ggml_format_name(cur, "ffn_moe_weighted-%d", layer);
    }
    cur = arm->mixture != NULL ? mixed_experts(&l, cur) : experts(&l, cur);
    ggml_build_forward_expand(graph, cur);
    struct ggml_tensor *sum = x;
    for (int i = 0; i < v->n_used; i++) {
        sum = ggml_add(ctx, sum, ggml_view_2d(ctx, cur, EMBD, n_tokens, cur->nb[2], (size_t) i * cur->nb[1]));
    }
    return sum;
}

struct graph {
    struct ggml_context *ctx;
    struct ggml_cgraph *nodes;
    struct ggml_tensor *values, *weights, *table, *output;
};

static inline struct graph build(const struct arm *arm, int n_tokens) {
    struct graph g = {.ctx = new_context()};
    g.nodes = ggml_new_graph_custom(g.ctx, 256, false);
    g.values = ggml_new_tensor_2d(g.ctx, GGML_TYPE_F32, EMBD, n_tokens);
    g.weights = ggml_new_tensor_3d(g.ctx, GGML_TYPE_F32, 1, file.variant->n_used, n_tokens);
    g.table = ggml_new_tensor_2d(g.ctx, GGML_TYPE_I32, EXPERTS, n_tokens);
    ggml_set_input(g.values);
    ggml_set_input(g.weights);
    ggml_set_input(g.table);
    struct ggml_tensor *ids = ggml_view_2d(g.ctx, g.table, file.variant->n_used, n_tokens, g.table->nb[1], 0);
    struct ggml_tensor *x = ggml_scale(g.ctx, g.values, 3.0f); /* its memory is free for reuse, as an input's is not */
    for (int layer = 0; layer < LAYERS; layer++) {
        x = moe_layer(g.ctx, g.nodes, arm, layer, x, ids, g.weights);
    }
    g.output = x;
    ggml_set_output(x);
    ggml_build_forward_expand(g.nodes, x);
    return g;
}

static inline enum ggml_status compute(struct arm *arm, const struct input *in, float *out) {
    struct graph g = build(arm, in->n_tokens);
    ggml_backend_sched_reset(arm->sched);
    CHECK(ggml_backend_sched_alloc_graph(arm->sched, g.nodes));
    ggml_backend_tensor_set(g.values, in->values, 0, ggml_nbytes(g.values));
    ggml_backend_tensor_set(g.weights, in->weights, 0, ggml_nbytes(g.weights));
    ggml_backend_tensor_set(g.table, in->table, 0, ggml_nbytes(g.table));
    enum ggml_status status = ggml_backend_sched_graph_compute(arm->sched, g.nodes);
    if (status == GGML_STATUS_SUCCESS) {
        ggml_backend_tensor_get(g.output, out, 0, ggml_nbytes(g.output));
    }
    ggml_free(g.ctx);
    return status;
}

static inline void random_input(struct input *in, int n_tokens, uint64_t *seed) {
    in->n_tokens = n_tokens;
    random_floats(in->values, EMBD * n_tokens, seed);
    random_floats(in->weights, MAX_USED * n_tokens, seed);
    for (int t = 0; t < n_tokens; t++) {
        int32_t *row = &in->table[t * EXPERTS];
        for (int32_t e = 0; e < EXPERTS; e++) {
            uint32_t at = check_random(seed, (uint32_t) e + 1);
            row[e] = row[at];
            row[at] = e;
        }
    }
}

/* Both arms compute the same; `reference` may be shared. */
static inline void check_same(struct arm *arm, struct arm *reference, const struct input *in) {
    static _Thread_local float got[EMBD * MAX_TOKENS], wanted[EMBD * MAX_TOKENS];
    memset(got, 0xff, sizeof got);
    CHECK_EQUAL(compute(reference, in, wanted), GGML_STATUS_SUCCESS);
    CHECK_EQUAL(compute(arm, in, got), GGML_STATUS_SUCCESS);
    CHECK(memcmp(got, wanted, (size_t) (EMBD * in->n_tokens) * sizeof(float)) == 0);
}

#endif
