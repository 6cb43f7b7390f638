#include "site.h"

#include <string.h>
#include <time.h>

#include "ggml.h"

#define REPEATS 3
/* A measurement that takes longer is the last of its curve. */
#define LONG_NS 60000000u
#define CONTEXT_BYTES (16 << 10)

static const int32_t pairs[] = {1, 4, 16, 64};

void hb_site_sleep_until(uint64_t start, uint64_t ns) {
    uint64_t now = hb_now_ns();
    if (now < start + ns) {
        uint64_t left = start + ns - now;
        struct timespec t = {.tv_sec = (time_t) (left / 1000000000u), .tv_nsec = (long) (left % 1000000000u)};
        (void) nanosleep(&t, NULL);
    }
}

struct product {
    struct ggml_tensor *rows, *ids, *result;
};

static size_t padded(const struct hb_site *s, size_t bytes) {
    size_t align = ggml_backend_buffer_get_alignment(s->place);
    return (bytes + align - 1) / align * align;
}

static size_t take(const struct hb_site *s, struct ggml_tensor *t, size_t at) {
    t->buffer = s->place;
    t->data = (char *) ggml_backend_buffer_get_base(s->place) + at;
    return at + padded(s, ggml_nbytes(t));
}

/* Multiply `n_rows` rows by the matrices of one role. */
static struct product add(const struct hb_site *s, struct ggml_context *ctx, struct ggml_cgraph *graph, int32_t role,
                          int32_t n_rows) {
    struct product p;
    struct ggml_tensor *stack = ggml_dup_tensor(ctx, &s->stacks[role]);
    *stack = s->stacks[role];
    p.rows = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, stack->ne[0], 1, n_rows);
    p.ids = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 1, n_rows);
    p.result = ggml_mul_mat_id(ctx, stack, p.rows, p.ids);
    ggml_build_forward_expand(graph, p.result);
    return p;
}

static bool compute(const struct hb_site *s, struct ggml_cgraph *graph, const struct product *products, char *rows,
                    const int32_t *ids) {
    for (int32_t i = 0; i < s->n_stacks; i++) {
        ggml_backend_tensor_set(products[i].rows, rows, 0, ggml_nbytes(products[i].rows));
        ggml_backend_tensor_set(products[i].ids, ids, 0, ggml_nbytes(products[i].ids));
    }
    bool good = ggml_backend_graph_compute(s->backend, graph) == GGML_STATUS_SUCCESS;
    if (good && s->n_stacks > 0) {
        ggml_backend_tensor_get(products[s->n_stacks - 1].result, rows, 0,
                                ggml_nbytes(products[s->n_stacks - 1].result));
    }
    return good;
}

static uint64_t time_graph(const struct hb_site *s, struct ggml_context *ctx, int32_t n_experts, int32_t n_each) {
    struct ggml_cgraph *graph = ggml_new_graph_custom(ctx, 4 * HB_GROUP_MATRICES, false);
    struct product products[HB_GROUP_MATRICES];
    int32_t n_rows = n_experts * n_each;
    size_t all = 0, widest = 0; /* of the place; of what goes there or comes back at a time */
    bool good = true;
    for (int32_t i = 0; i < s->n_stacks; i++) {
        products[i] = add(s, ctx, graph, i, n_rows);
        good = good && ggml_backend_supports_op(s->backend, products[i].result);
        size_t in = ggml_nbytes(products[i].rows), out = ggml_nbytes(products[i].result);
        widest = widest > in ? widest : in;
        widest = widest > out ? widest : out;
        all += padded(s, in) + padded(s, out) + padded(s, ggml_nbytes(products[i].ids));
    }
    size_t ids_bytes = (size_t) n_rows * sizeof(int32_t);
    if (!good || all > ggml_backend_buffer_get_size(s->place) ||
        !hb_block_reserve(s->memory, hb_block_round(widest) + hb_block_round(ids_bytes))) {
        return 0;
    }
    size_t at = 0;
    for (int32_t i = 0; i < s->n_stacks; i++) {
        at = take(s, products[i].result, take(s, products[i].ids, take(s, products[i].rows, at)));
    }
    int32_t *ids = hb_block_take(s->memory, ids_bytes);
    char *rows = hb_block_take(s->memory, widest);
    memset(rows, 0, widest);
    for (int32_t i = 0; i < n_rows; i++) {
        ids[i] = i / n_each;
    }
    uint64_t start = hb_now_ns();
    good = compute(s, graph, products, rows, ids);
    hb_site_sleep_until(start, s->batch_ns + s->pair_ns * (uint64_t) n_rows);
    uint64_t ns = hb_now_ns() - start;
    return good ? ns : 0;
}

uint64_t hb_site_time(const struct hb_site *s, int32_t n_experts, int32_t n_each) {
    struct ggml_context *ctx = ggml_init((struct ggml_init_params) {.mem_size = CONTEXT_BYTES, .no_alloc = true});
    uint64_t ns = ctx != NULL ? time_graph(s, ctx, n_experts, n_each) : 0;
    ggml_free(ctx);
    return ns;
}

/* The median of a few; 0: it cannot be done. */
static uint64_t median(const struct hb_site *s, int32_t n_experts, int32_t n_each) {
    uint64_t ns[REPEATS];
    for (int i = 0; i < REPEATS; i++) {
        uint64_t took = hb_site_time(s, n_experts, n_each);
        int at = i;
        for (; at > 0 && ns[at - 1] > took; at--) {
            ns[at] = ns[at - 1];
        }
        ns[at] = took;
    }
    return ns[0] > 0 ? ns[REPEATS / 2] : 0;
}

bool hb_site_measure(const struct hb_site *s, double *fixed_ns, struct hb_curve *curve) {
    int32_t n = s->n_slots < HB_SITE_EXPERTS ? s->n_slots : HB_SITE_EXPERTS;
    *curve = (struct hb_curve) {0};
    if (n < 1) {
        return false;
    }
    double one = (double) median(s, 1, 1), all = (double) median(s, n, 1);
    if (one == 0 || all == 0) {
        return false;
    }
    double each = n > 1 ? (all - one) / (n - 1) : one / 2;
    *fixed_ns = each > 0 && one > each ? one - each : one / 10;
    uint64_t took = (uint64_t) all;
    for (size_t i = 0; i < sizeof pairs / sizeof pairs[0] && took > 0 && took < LONG_NS; i++) {
        took = i == 0 ? took : median(s, n, pairs[i]);
        double rest = (double) took - *fixed_ns, least = 0.01 * (double) took;
        if (took > 0) {
            curve->points[curve->n_points].pairs = pairs[i];
            curve->points[curve->n_points++].ns_per_byte =
                (rest > least ? rest : least) / (double) n / (double) s->expert_bytes;
        }
    }
    return curve->n_points > 0;
}
