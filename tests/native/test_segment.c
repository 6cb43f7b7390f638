/* Description: where a split is cut into segments, which of their values are wanted outside, and which of their
 * operands are gate weights. */
#include "segment.h"

#include "check.h"
#include "ggml-backend-impl.h"
#include "ggml-impl.h"

#define D 32
#define EXPERTS 4
#define USED 2
#define TOKENS 3

static const char *our_name(ggml_backend_buffer_type_t type) {
    (void) type;
    return hb_buffer_type_name;
}

static const char *other_name(ggml_backend_buffer_type_t type) {
    (void) type;
    return "Hobbit"; /* the name is ours, its address is not */
}

/* Weights that claim to be streamed, of two groups; `model` is never looked into. */
static struct ggml_backend_buffer_type our_type = {.iface = {.get_name = our_name}};
static struct ggml_backend_buffer_type other_type = {.iface = {.get_name = other_name}};
static struct ggml_backend_buffer ours = {.buft = &our_type}, others = {.buft = &other_type};
static struct hb_matrix matrices[] = {{.group = 0}, {.group = 1}};
static char models[2];

static struct ggml_context *ctx;
static struct ggml_cgraph *graph;
static struct ggml_tensor *input, *ids, *weights;

static struct ggml_tensor *new_weight(int group, int model) {
    static struct hb_weight table[2][2];
    struct ggml_tensor *t = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, D, D, EXPERTS);
    table[group][model] = (struct hb_weight) {(struct hobbit_model *) &models[model], &matrices[group], NULL};
    t->buffer = &ours;
    t->extra = &table[group][model];
    return t;
}

static struct ggml_tensor *multiply(int group, struct ggml_tensor *x, struct ggml_tensor *by_ids) {
    return ggml_mul_mat_id(ctx, new_weight(group, 0), x, by_ids);
}

static void begin(void) {
    ggml_free(ctx);
    ctx = ggml_init((struct ggml_init_params) {.mem_size = 4 << 20, .no_alloc = true});
    graph = ggml_new_graph(ctx);
    input = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, D, 1, TOKENS);
    ids = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, USED, TOKENS);
    weights = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 1, USED, TOKENS);
}

static struct ggml_tensor *expand(struct ggml_tensor *t) {
    ggml_build_forward_expand(graph, t);
    return t;
}

/* Lengths of the segments of the first `n` nodes, as "3 1 2". */
static const char *lengths(int n) {
    static char text[64];
    struct ggml_cgraph split = ggml_graph_view(graph, 0, n);
    size_t end = 0;
    for (int at = 0; at < n;) {
        struct hb_segment s = hb_segment_next(&split, at);
        CHECK(s.n_nodes > 0 && s.nodes == split.nodes + at);
        end += (size_t) snprintf(text + end, sizeof text - end, at > 0 ? " %d" : "%d", s.n_nodes);
        at += s.n_nodes;
    }
    return text;
}

#define CHECK_LENGTHS(n, expected) CHECK_TEXT(lengths(n), expected), CHECK_EQUAL(strlen(lengths(n)), strlen(expected))

static bool escapes(const struct hb_segment *s, const struct ggml_tensor *t) {
    int i = hb_segment_find(s, t);
    CHECK(i >= 0);
    return s->escapes[i];
}

static void a_layer_is_one_segment(void) {
    begin();
    struct ggml_tensor *up = multiply(0, input, ids), *gate = multiply(0, input, ids);
    struct ggml_tensor *act = ggml_swiglu_split(ctx, gate, up);
    struct ggml_tensor *down = multiply(0, act, ids);
    struct ggml_tensor *out = expand(ggml_mul(ctx, down, weights));
    int n = ggml_graph_n_nodes(graph);
    expand(ggml_cont(ctx, out)); /* in another split */
    struct ggml_cgraph split = ggml_graph_view(graph, 0, n);
    struct hb_segment s = hb_segment_next(&split, 0);
    CHECK_EQUAL(s.n_nodes, 5);
    CHECK(s.model == (struct hobbit_model *) &models[0] && s.group == 0 && s.ids == ids);
    CHECK(!escapes(&s, up) && !escapes(&s, gate) && !escapes(&s, act) && !escapes(&s, down) && escapes(&s, out));
    CHECK_EQUAL(hb_segment_find(&s, input), -1);
}

static void values_escape_through_later_uses_and_views(void) {
    begin();
    struct ggml_tensor *up = multiply(0, input, ids);
    struct ggml_tensor *act = ggml_silu(ctx, up);
    struct ggml_tensor *down = multiply(0, act, ids);
    struct ggml_tensor *kept = ggml_sqr(ctx, down);
    struct ggml_tensor *twice = ggml_mul(ctx, kept, kept);
    struct ggml_tensor *flagged = ggml_scale(ctx, twice, 2);
    ggml_set_output(flagged);
    struct ggml_tensor *last = ggml_sqr(ctx, flagged);
    struct ggml_tensor *view = ggml_view_2d(ctx, down, D, TOKENS, down->nb[2], 0);
    struct ggml_tensor *view_of_view = ggml_view_1d(ctx, view, D, 0);
    expand(last);
    expand(view);
    int n = ggml_graph_n_nodes(graph);
    expand(ggml_cont(ctx, view_of_view));
    expand(ggml_cont(ctx, act));
    struct ggml_cgraph split = ggml_graph_view(graph, 0, n);
    struct hb_segment s = hb_segment_next(&split, 0);
    CHECK_EQUAL(s.n_nodes, 8);
    CHECK(!escapes(&s, up));
    CHECK(escapes(&s, act)); /* used once more later */
    CHECK(escapes(&s, view) && escapes(&s, down));
    CHECK(!escapes(&s, kept) && !escapes(&s, twice)); /* both uses of `kept` are here */
    CHECK(escapes(&s, flagged));
    CHECK(escapes(&s, last)); /* nobody uses it: who asked for it reads it */
}

static void another_routing_is_another_segment(void) {
    begin();
    expand(multiply(0, input, ids));
    expand(multiply(0, input, ids));
    expand(multiply(1, input, ids)); /* another group */
    expand(multiply(1, input, ggml_new_tensor_2d(ctx, GGML_TYPE_I32, USED, TOKENS)));
    struct ggml_tensor *last = graph->nodes[graph->n_nodes - 1];
    expand(ggml_mul_mat_id(ctx, new_weight(1, 1), input, last->src[2])); /* another model */
    CHECK_LENGTHS(5, "2 1 1 1");
}

static void interleaved_routings_do_not_mix(void) {
    begin();
    struct ggml_tensor *three = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 3, TOKENS);
    struct ggml_tensor *a = expand(multiply(0, input, ids)), *b = expand(multiply(1, input, three));
    expand(ggml_sqr(ctx, a)); /* two rows a token in a segment of three */
    expand(ggml_sqr(ctx, b));
    CHECK_LENGTHS(4, "1 1 2");
    begin();
    struct ggml_tensor *same_shape = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, USED, TOKENS);
    struct ggml_tensor *bias = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, D, EXPERTS);
    a = expand(multiply(0, input, ids));
    b = expand(multiply(0, input, same_shape));
    expand(ggml_sqr(ctx, a)); /* row by row: any routing of this shape will do */
    expand(ggml_add_id(ctx, a, bias, ids)); /* this takes a's experts */
    CHECK_LENGTHS(4, "1 2 1");
}

static void what_is_read_through_other_views_is_complete_first(void) {
    begin();
    struct ggml_tensor *a = multiply(0, input, ids);
    struct ggml_tensor *reshaped = ggml_reshape_3d(ctx, a, D, USED, TOKENS);
    expand(reshaped);
    expand(ggml_mul(ctx, multiply(0, input, ids), reshaped));
    CHECK_LENGTHS(4, "3 1");
    begin();
    struct ggml_tensor *both = multiply(0, input, ids);
    struct ggml_tensor *half = ggml_view_3d(ctx, both, D / 2, USED, TOKENS, both->nb[1], both->nb[2], 0);
    expand(ggml_silu(ctx, half)); /* whole rows of the same pairs */
    CHECK_LENGTHS(3, "3");
}

static void plain_operations_have_no_model(void) {
    begin();
    struct ggml_tensor *resident = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, D, D, EXPERTS);
    expand(ggml_mul(ctx, ggml_mul_mat_id(ctx, resident, input, ids), weights));
    expand(multiply(0, input, ids));
    CHECK_LENGTHS(3, "2 1");
    struct ggml_cgraph split = ggml_graph_view(graph, 0, 3);
    CHECK(hb_segment_next(&split, 0).model == NULL && hb_segment_next(&split, 2).model != NULL);
    resident->buffer = &others;
    CHECK(!hb_segment_is_streamed(resident) && hb_segment_weight(resident) == NULL);
    resident->buffer = &ours; /* of a model that was loaded without memory */
    CHECK(hb_segment_is_streamed(resident) && hb_segment_weight(resident) == NULL);
    CHECK(!hb_segment_is_streamed(input));
}

static void long_chains_are_cut(void) {
    begin();
    struct ggml_tensor *t = multiply(0, input, ids);
    for (int i = 0; i < 100; i++) {
        t = ggml_scale(ctx, t, 0.5f);
    }
    expand(t);
    CHECK_LENGTHS(101, "64 37");
    struct ggml_cgraph split = ggml_graph_view(graph, 0, 101);
    struct hb_segment s = hb_segment_next(&split, 0);
    CHECK(s.escapes[63] && !s.escapes[62]);
}

/* Gate weights that the segment of this product sees, when llama.cpp calls it so. */
static const struct ggml_tensor *seen_as(const char *name, struct ggml_tensor *factor) {
    struct ggml_tensor *product = ggml_mul(ctx, multiply(0, input, ids), factor);
    ggml_set_name(product, name);
    ggml_build_forward_expand(graph, ggml_scale(ctx, product, 2));
    struct ggml_cgraph split = ggml_graph_view(graph, graph->n_nodes - 3, graph->n_nodes);
    struct hb_segment s = hb_segment_next(&split, 0);
    CHECK_EQUAL(s.n_nodes, 3);
    return s.weights;
}

static void gate_weights_are_told_by_the_name_of_the_product(void) {
    begin();
    CHECK(seen_as("ffn_moe_weighted-0", weights) == weights);
    CHECK(seen_as("ffn_moe_weighted-17", weights) == weights);
    CHECK(seen_as("ffn_moe_weighted", weights) == weights);
    CHECK(seen_as("ffn_moe_down_scaled-0", weights) == NULL); /* a factor for each expert */
    CHECK(seen_as("ffn_moe_weighte", weights) == NULL);
    CHECK(seen_as("", weights) == NULL);
}

static void gate_weights_are_one_for_each_pair(void) {
    begin();
    CHECK(seen_as("ffn_moe_weighted-0", ggml_new_tensor_3d(ctx, GGML_TYPE_F32, D, USED, TOKENS)) == NULL);
    CHECK(seen_as("ffn_moe_weighted-0", ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 1, 1, TOKENS)) == NULL);
    CHECK(seen_as("ffn_moe_weighted-0", ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 1, USED, 1)) == NULL);
    struct ggml_tensor *scaled = ggml_scale(ctx, multiply(0, input, ids), 2); /* no product */
    ggml_set_name(scaled, "ffn_moe_weighted-0");
    expand(scaled);
    struct ggml_cgraph split = ggml_graph_view(graph, graph->n_nodes - 2, graph->n_nodes);
    CHECK(hb_segment_next(&split, 0).weights == NULL);
}

static void gate_weights_are_found_among_other_factors(void) {
    begin();
    struct ggml_tensor *up_scale = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 1, USED, TOKENS);
    struct ggml_tensor *down_scale = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 1, USED, TOKENS);
    struct ggml_tensor *up = ggml_mul(ctx, multiply(0, input, ids), up_scale);
    struct ggml_tensor *down = ggml_mul(ctx, multiply(0, ggml_silu(ctx, up), ids), down_scale);
    struct ggml_tensor *weighted = ggml_mul(ctx, down, weights);
    ggml_set_name(weighted, "ffn_moe_weighted-3");
    int n_before = graph->n_nodes;
    expand(weighted);
    struct ggml_tensor *next = ggml_mul(ctx, multiply(1, input, ids), up_scale); /* another layer's */
    ggml_set_name(next, "ffn_moe_weighted-4");
    expand(next);
    struct ggml_cgraph split = ggml_graph_view(graph, n_before, graph->n_nodes);
    struct hb_segment s = hb_segment_next(&split, 0);
    CHECK_EQUAL(s.n_nodes, 6);
    CHECK(s.weights == weights);
    CHECK(hb_segment_next(&split, 6).weights == up_scale);
}

int main(void) {
    RUN(a_layer_is_one_segment);
    RUN(values_escape_through_later_uses_and_views);
    RUN(another_routing_is_another_segment);
    RUN(interleaved_routings_do_not_mix);
    RUN(what_is_read_through_other_views_is_complete_first);
    RUN(plain_operations_have_no_model);
    RUN(long_chains_are_cut);
    RUN(gate_weights_are_told_by_the_name_of_the_product);
    RUN(gate_weights_are_one_for_each_pair);
    RUN(gate_weights_are_found_among_other_factors);
    ggml_free(ctx);
    return 0;
}
