/* Description: with routers in the graph, as llama.cpp builds it, each predictor says what comes next; whatever it says
 * and whatever the router is like, the results are those of the CPU on weights in memory. */
#include "layers.h"

#include "model.h"

enum { USED = 2, PATTERNS = 3 };

static const char *const kinds[] = {"none", "gate", "map", "auto"};
static float router_rows[LAYERS][EXPERTS * EMBD], router_bias[EXPERTS];

/* What a router may be like. */
static const struct style {
    const char *name;
    bool sigmoid, biased, late_softmax, unseen;
} styles[] = {
    {.name = "softmax"},
    {.name = "sigmoid and a bias of choice", .sigmoid = true, .biased = true},
    {.name = "softmax of the chosen, with a bias", .late_softmax = true, .biased = true},
    {.name = "not understood", .unseen = true},
};

struct routers {
    const struct style *style;
    struct ggml_context *ctx;
    ggml_backend_buffer_t buffer;
    struct ggml_tensor *rows[LAYERS], *bias;
};

static struct routers open_routers(const struct style *style) {
    struct routers r = {.style = style, .ctx = new_context()};
    for (int layer = 0; layer < LAYERS; layer++) {
        r.rows[layer] = ggml_new_tensor_2d(r.ctx, GGML_TYPE_F32, EMBD, EXPERTS);
    }
    r.bias = ggml_new_tensor_1d(r.ctx, GGML_TYPE_F32, EXPERTS);
    r.buffer = ggml_backend_alloc_ctx_tensors_from_buft(r.ctx, ggml_backend_cpu_buffer_type());
    CHECK(r.buffer != NULL);
    ggml_backend_buffer_set_usage(r.buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
    for (int layer = 0; layer < LAYERS; layer++) {
        ggml_backend_tensor_set(r.rows[layer], router_rows[layer], 0, sizeof router_rows[layer]);
    }
    ggml_backend_tensor_set(r.bias, router_bias, 0, sizeof router_bias);
    return r;
}

static void close_routers(struct routers *r) {
    ggml_backend_buffer_free(r->buffer);
    ggml_free(r->ctx);
}

static struct ggml_tensor *route(const struct routers *r, struct ggml_context *ctx, int layer, struct ggml_tensor *x) {
    struct ggml_tensor *t = ggml_mul_mat(ctx, r->rows[layer], x);
    if (r->style->unseen) {
        t = ggml_sqr(ctx, t);
    }
    if (!r->style->late_softmax) {
        t = r->style->sigmoid ? ggml_sigmoid(ctx, t) : ggml_soft_max(ctx, t);
    }
    return ggml_argsort_top_k(ctx, r->style->biased ? ggml_add(ctx, t, r->bias) : t, USED);
}

/* As of a prompt of which only the last logits are wanted: the last layer gets its last token alone. */
static struct graph build_routed(const struct arm *arm, const struct routers *routers, int n_tokens) {
    struct graph g = {.ctx = new_context()};
    g.nodes = ggml_new_graph_custom(g.ctx, 256, false);
    g.values = ggml_new_tensor_2d(g.ctx, GGML_TYPE_F32, EMBD, n_tokens);
    g.weights = ggml_new_tensor_3d(g.ctx, GGML_TYPE_F32, 1, USED, n_tokens);
    ggml_set_input(g.values);
    ggml_set_input(g.weights);
    struct ggml_tensor *sum = g.values;
    struct ggml_tensor *weights = g.weights;
    for (int layer = 0; layer < LAYERS; layer++) {
        if (layer == LAYERS - 1) {
            size_t last = (size_t) n_tokens - 1;
            sum = ggml_view_2d(g.ctx, sum, EMBD, 1, sum->nb[1], last * sum->nb[1]);
            weights = ggml_view_3d(g.ctx, weights, 1, USED, 1, weights->nb[1], weights->nb[2], last * weights->nb[2]);
            n_tokens = 1;
        }
        struct ggml_tensor *x = ggml_rms_norm(g.ctx, sum, 1e-6f);
        struct layer l = {g.ctx, arm, layer, route(routers, g.ctx, layer, x), weights, false};
        struct ggml_tensor *rows = experts(&l, ggml_reshape_3d(g.ctx, x, EMBD, 1, n_tokens));
        for (int i = 0; i < USED; i++) {
            sum = ggml_add(g.ctx, sum, ggml_view_2d(g.ctx, rows, EMBD, n_tokens, rows->nb[2],
                                                    (size_t) i * rows->nb[1]));
        }
    }
    g.output = sum;
    ggml_set_output(sum);
    ggml_build_forward_expand(g.nodes, sum);
    return g;
}

static void compute_routed(struct arm *arm, const struct routers *routers, const struct input *in, float *out) {
    struct graph g = build_routed(arm, routers, in->n_tokens);
    ggml_backend_sched_reset(arm->sched);
    CHECK(ggml_backend_sched_alloc_graph(arm->sched, g.nodes));
    ggml_backend_tensor_set(g.values, in->values, 0, ggml_nbytes(g.values));
    ggml_backend_tensor_set(g.weights, in->weights, 0, ggml_nbytes(g.weights));
    CHECK_EQUAL(ggml_backend_sched_graph_compute(arm->sched, g.nodes), GGML_STATUS_SUCCESS);
    ggml_backend_tensor_get(g.output, out, 0, ggml_nbytes(g.output));
    ggml_free(g.ctx);
}

static struct arm *open_predicting(int32_t slots, int32_t kind, bool always) {
    struct arm *arm = open_arm(slots, HOBBIT_IO_AUTO);
    const struct hobbit_prediction p = {.kind = kind, .depth = 2, .always = always, .n_embd = EMBD,
                                        .least_odds = 0.5f, .map_capacity = 16};
    char err[256];
    CHECK_EQUAL(hobbit_model_set_prediction(arm->model, &p, err, sizeof err), HOBBIT_OK);
    return arm;
}

static struct hobbit_stats stats_of(const struct arm *arm) {
    struct hobbit_stats stats;
    hobbit_model_stats(arm->model, &stats);
    return stats;
}

static int32_t maps_of(const struct arm *arm) {
    struct hb_map_predictor *maps = hb_model_map_predictor(arm->model);
    return maps != NULL ? hb_maps_count(hb_map_predictor_maps(maps)) : 0;
}

/* Prompts of several tokens, small and large, and between them single tokens, of which there are a few kinds. */
static void compare(struct arm *arm, struct arm *reference, const struct style *style, int n) {
    float got[EMBD], wanted[EMBD];
    struct routers routers = open_routers(style);
    uint64_t seed = 5;
    struct input in, patterns[PATTERNS];
    for (int i = 0; i < PATTERNS; i++) {
        random_input(&patterns[i], 1, &seed);
    }
    for (int i = 0; i < n; i++) {
        bool prompt = i % 16 == 0;
        if (prompt) {
            random_input(&in, i % 32 == 0 ? MAX_TOKENS : 3, &seed);
        }
        const struct input *now = prompt ? &in : &patterns[i % PATTERNS];
        compute_routed(reference, &routers, now, wanted);
        compute_routed(arm, &routers, now, got);
        CHECK(memcmp(got, wanted, EMBD * sizeof(float)) == 0);
    }
    close_routers(&routers);
}

static void predictions_do_not_change_the_results(void) {
    struct arm *reference = open_arm(0, 0);
    for (size_t i = 0; i < sizeof styles / sizeof *styles; i++) {
        for (int32_t kind = HOBBIT_PREDICT_NONE; kind <= HOBBIT_PREDICT_AUTO; kind++) {
            for (int32_t slots = 5; slots <= LAYERS * EXPERTS; slots += 11) {
                printf("  %s, %s, %d slots\n", styles[i].name, kinds[kind], slots);
                struct arm *arm = open_predicting(slots, kind, kind != HOBBIT_PREDICT_AUTO);
                compare(arm, reference, &styles[i], kind == HOBBIT_PREDICT_AUTO ? 120 : 48);
                bool some = kind != HOBBIT_PREDICT_NONE && slots < LAYERS * EXPERTS && !styles[i].unseen;
                CHECK_EQUAL(stats_of(arm).predicted > 0, some);
                CHECK_EQUAL(maps_of(arm) > 0, some && kind != HOBBIT_PREDICT_GATE);
                close_arm(arm);
            }
        }
    }
    close_arm(reference);
}

/* The tokens repeat, so that a store of past ones knows them. */
static void repeated_tokens_are_predicted_by_their_maps(void) {
    for (size_t i = 0; i + 1 < sizeof styles / sizeof *styles; i++) {
        struct arm *reference = open_arm(0, 0), *arm = open_predicting(LAYERS * EXPERTS - 1, HOBBIT_PREDICT_MAP, true);
        compare(arm, reference, &styles[i], 48);
        struct hobbit_stats stats = stats_of(arm);
        CHECK_EQUAL(maps_of(arm), 16); /* the prompts have none, and it is full */
        CHECK(stats.predicted >= USED * 41); /* of 45 tokens, but the first of each kind */
        CHECK(stats.predicted_right >= stats.predicted - 2 * PATTERNS * USED);
        close_arm(arm);
        close_arm(reference);
    }
}

static void prompts_are_left_out(void) {
    struct arm *reference = open_arm(0, 0), *arm = open_predicting(5, HOBBIT_PREDICT_MAP, true);
    compare(arm, reference, &styles[0], 1);
    CHECK_EQUAL(maps_of(arm), 0);
    CHECK_EQUAL(stats_of(arm).predicted, 0);
    compare(arm, reference, &styles[0], 5);
    CHECK_EQUAL(maps_of(arm), 4);
    close_arm(arm);
    close_arm(reference);
}

/* It tells the others, and when a token begins. */
static void a_layer_that_needs_no_cache_predicts_too(void) {
    struct arm *reference = open_arm(0, 0);
    for (int32_t kind = HOBBIT_PREDICT_GATE; kind <= HOBBIT_PREDICT_MAP; kind++) {
        first_at_home = true;
        struct arm *arm = open_predicting(5, kind, true);
        first_at_home = false;
        CHECK(hb_model_home(arm->model, 0) >= 0 && hb_model_home(arm->model, 1) < 0);
        compare(arm, reference, &styles[0], 10);
        CHECK_EQUAL(maps_of(arm), kind == HOBBIT_PREDICT_MAP ? 9 : 0);
        CHECK(stats_of(arm).predicted >= USED * 8);
        close_arm(arm);
    }
    close_arm(reference);
}

int main(void) {
    uint64_t seed = 3;
    for (int layer = 0; layer < LAYERS; layer++) {
        random_floats(router_rows[layer], EXPERTS * EMBD, &seed);
    }
    random_floats(router_bias, EXPERTS, &seed);
    make_weights(&variants[0]);
    RUN(predictions_do_not_change_the_results);
    RUN(repeated_tokens_are_predicted_by_their_maps);
    RUN(prompts_are_left_out);
    RUN(a_layer_that_needs_no_cache_predicts_too);
    free_weights();
    return 0;
}
