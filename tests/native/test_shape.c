/* Description: which operations are ours, and how the rows of their operands are found. */
#include "shape.h"

#include "check.h"

#define D 32
#define FF 64
#define EXPERTS 4
#define USED 2
#define TOKENS 3

static struct ggml_context *ctx;
static struct ggml_tensor *up, *gate_up, *down, *bias, *resident, *input, *ids, *weights;

static bool is_streamed(const struct ggml_tensor *t) {
    return t == up || t == gate_up || t == down;
}

static bool ours(const struct ggml_tensor *op) {
    return hb_shape_supports(op, is_streamed);
}

static void prepare(void) {
    ctx = ggml_init((struct ggml_init_params) {.mem_size = 1 << 20, .no_alloc = true});
    CHECK(ctx != NULL);
    up = ggml_new_tensor_3d(ctx, GGML_TYPE_Q8_0, D, FF, EXPERTS);
    gate_up = ggml_new_tensor_3d(ctx, GGML_TYPE_Q8_0, D, 2 * FF, EXPERTS);
    down = ggml_new_tensor_3d(ctx, GGML_TYPE_Q8_0, FF, D, EXPERTS);
    resident = ggml_new_tensor_3d(ctx, GGML_TYPE_Q8_0, D, FF, EXPERTS);
    bias = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, FF, EXPERTS);
    input = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, D, 1, TOKENS);
    ids = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, USED, TOKENS);
    weights = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 1, USED, TOKENS);
}

static void a_layer_is_ours_from_up_to_the_weights(void) {
    struct ggml_tensor *u = ggml_mul_mat_id(ctx, up, input, ids);
    struct ggml_tensor *g = ggml_mul_mat_id(ctx, up, input, ids);
    struct ggml_tensor *biased = ggml_add_id(ctx, u, bias, ids);
    struct ggml_tensor *glu = ggml_swiglu_split(ctx, g, biased);
    struct ggml_tensor *out = ggml_mul(ctx, ggml_mul_mat_id(ctx, down, glu, ids), weights);
    CHECK(ours(u) && ours(g) && ours(biased) && ours(glu) && ours(out) && ours(out->src[0]));
    CHECK(ours(ggml_silu(ctx, u)) && ours(ggml_clamp(ctx, u, -1, 1)) == (ggml_clamp(ctx, u, -1, 1)->view_src == NULL));
    CHECK(ours(ggml_scale(ctx, u, 2)) && ours(ggml_sqr(ctx, ggml_relu(ctx, u))));
}

static void the_rest_is_not(void) {
    struct ggml_tensor *u = ggml_mul_mat_id(ctx, up, input, ids);
    struct ggml_tensor *other = ggml_mul_mat_id(ctx, resident, input, ids);
    CHECK(!ours(other) && !ours(ggml_silu(ctx, other)));
    CHECK(!ours(ggml_silu(ctx, input)) && !ours(ggml_mul(ctx, weights, weights)));
    CHECK(!ours(ggml_add(ctx, u, u)) && !ours(ggml_cont(ctx, u)) && !ours(ggml_soft_max(ctx, u)));
    CHECK(!ours(ggml_view_2d(ctx, u, FF, TOKENS, u->nb[2], 0)) && !ours(ggml_reshape_2d(ctx, u, FF, USED * TOKENS)));
    CHECK(!ours(ggml_silu(ctx, ggml_reshape_2d(ctx, u, FF, USED * TOKENS)))); /* no longer pairs */
    CHECK(!ours(ggml_silu_inplace(ctx, u)));
    struct ggml_tensor *other_ids = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, USED, TOKENS);
    CHECK(!ours(ggml_add_id(ctx, u, bias, other_ids)));
    struct ggml_tensor *sum = ggml_view_2d(ctx, u, FF, TOKENS, u->nb[2], 0);
    CHECK(!ours(ggml_scale(ctx, ggml_cont(ctx, sum), 2)));
}

static void weights_may_be_held_here(void) {
    CHECK(ours(up) && !ours(resident) && !ours(input) && !ours(ids));
}

static void halves_of_a_fused_matrix_are_row_views(void) {
    struct ggml_tensor *gu = ggml_mul_mat_id(ctx, gate_up, input, ids);
    struct ggml_tensor *g = ggml_view_3d(ctx, gu, FF, USED, TOKENS, gu->nb[1], gu->nb[2], 0);
    struct ggml_tensor *u = ggml_view_3d(ctx, gu, FF, USED, TOKENS, gu->nb[1], gu->nb[2], FF * gu->nb[0]);
    CHECK(hb_shape_is_row_view(g) && hb_shape_is_row_view(u) && hb_shape_is_view(g));
    CHECK(ours(ggml_swiglu_split(ctx, g, u)) && ours(ggml_swiglu(ctx, gu)));
    CHECK(!hb_shape_is_row_view(ggml_view_3d(ctx, gu, FF, 1, TOKENS, gu->nb[1], gu->nb[2], 0))); /* one expert each */
    CHECK(!hb_shape_is_row_view(ggml_view_3d(ctx, gu, FF, USED, TOKENS, gu->nb[1] / 2, gu->nb[2], 0)));
    CHECK(!hb_shape_is_row_view(ggml_view_2d(ctx, gu, FF, TOKENS, gu->nb[2], 0)));
    CHECK(!hb_shape_is_row_view(ggml_view_3d(ctx, g, FF / 2, USED, TOKENS, g->nb[1], g->nb[2], 0))); /* of a view */
    CHECK(!hb_shape_is_row_view(gu) && !hb_shape_is_row_view(ggml_cont(ctx, gu)));
}

static void rows_follow_the_strides_and_broadcast(void) {
    static char data[1 << 16];
    struct ggml_tensor *t = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, D, USED, TOKENS);
    CHECK(hb_shape_row(t, data, 1, 2) == data + t->nb[1] + 2 * t->nb[2]);
    CHECK(hb_shape_row(input, data, 1, 2) == data + 2 * input->nb[2]); /* one row a token */
    struct ggml_tensor *scales = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, D, USED, 1);
    CHECK(hb_shape_row(scales, data, 1, 2) == data + scales->nb[1]);
    struct ggml_tensor *half = ggml_view_3d(ctx, t, D / 2, USED, TOKENS, t->nb[1], t->nb[2], 0);
    CHECK(hb_shape_row(half, data, 1, 1) == data + t->nb[1] + t->nb[2]);
}

/* With one token or one expert a token, dimensions of 1 must not be taken for broadcasts of something else. */
static void single_tokens_and_single_experts(void) {
    struct ggml_tensor *one = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, D, 1, 1);
    struct ggml_tensor *one_id = ggml_new_tensor_2d(ctx, GGML_TYPE_I32, 1, 1);
    struct ggml_tensor *u = ggml_mul_mat_id(ctx, up, one, one_id);
    CHECK(ours(u) && ours(ggml_silu(ctx, u)));
    struct ggml_tensor *wrong = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, FF, USED, TOKENS);
    CHECK(!ours(ggml_mul(ctx, wrong, u))); /* more rows than pairs */
}

int main(void) {
    prepare();
    RUN(a_layer_is_ours_from_up_to_the_weights);
    RUN(the_rest_is_not);
    RUN(weights_may_be_held_here);
    RUN(halves_of_a_fused_matrix_are_row_views);
    RUN(rows_follow_the_strides_and_broadcast);
    RUN(single_tokens_and_single_experts);
    ggml_free(ctx);
    return 0;
}
