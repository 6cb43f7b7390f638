/* Description: ggml's own questions about a batch's graph, whether one node can be fused into the next, are answered as
 * for a graph that ggml built; what is wanted outside, or seen through a view, stays. */
#include "uses.h"

#include "check.h"
#include "ggml-impl.h"

static struct ggml_context *ctx;
static struct hb_uses uses;

static struct ggml_tensor *input(void) {
    return ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 8, 3);
}

/* Whether the first two nodes can be one. */
static bool can_fuse(const struct ggml_cgraph *graph) {
    const enum ggml_op ops[] = {graph->nodes[0]->op, graph->nodes[1]->op};
    return ggml_can_fuse(graph, 0, ops, 2);
}

/* Of the nodes of ggml's graph, counted by us. */
static struct ggml_cgraph counted(const struct ggml_cgraph *built, const bool *wanted) {
    struct ggml_cgraph graph = {.size = built->n_nodes, .n_nodes = built->n_nodes, .nodes = built->nodes};
    hb_uses_count(&uses, &graph, wanted);
    return graph;
}

static void a_node_with_one_use_can_be_fused(void) {
    const struct {
        bool twice, wanted, view, fused;
    } cases[] = {{.fused = true}, {.twice = true}, {.wanted = true}, {.view = true}};
    for (int i = 0; i < 4; i++) {
        ctx = ggml_init((struct ggml_init_params) {.mem_size = 1 << 20, .no_alloc = true});
        struct ggml_cgraph *built = ggml_new_graph(ctx);
        struct ggml_tensor *norm = ggml_rms_norm(ctx, input(), 1e-5f), *all = ggml_mul(ctx, norm, input());
        struct ggml_tensor *last = cases[i].twice  ? ggml_add(ctx, all, norm)
                                   : cases[i].view ? ggml_add(ctx, all, ggml_view_2d(ctx, norm, 8, 3, 32, 0))
                                                   : ggml_add(ctx, all, input());
        ggml_build_forward_expand(built, last);
        const bool wanted[8] = {cases[i].wanted};
        struct ggml_cgraph graph = counted(built, wanted);
        CHECK_EQUAL(can_fuse(&graph), cases[i].fused);
        CHECK(cases[i].wanted || can_fuse(built) == cases[i].fused);
        for (int node = 0; node < graph.n_nodes && !cases[i].wanted && !cases[i].view; node++) {
            CHECK_EQUAL(ggml_node_get_use_count(&graph, node), ggml_node_get_use_count(built, node));
        }
        ggml_free(ctx);
    }
}

static void many_nodes_have_room(void) {
    static bool wanted[HB_SEGMENT_NODES];
    ctx = ggml_init((struct ggml_init_params) {.mem_size = 1 << 20, .no_alloc = true});
    struct ggml_cgraph *built = ggml_new_graph(ctx);
    struct ggml_tensor *t = input();
    for (int i = 0; i < HB_SEGMENT_NODES; i++) {
        t = ggml_silu(ctx, t);
    }
    ggml_build_forward_expand(built, t);
    struct ggml_cgraph graph = counted(built, wanted);
    CHECK_EQUAL(graph.n_nodes, HB_SEGMENT_NODES);
    for (int i = 0; i < graph.n_nodes; i++) {
        CHECK_EQUAL(ggml_node_get_use_count(&graph, i), i + 1 < graph.n_nodes);
    }
    ggml_free(ctx);
}

int main(void) {
    RUN(a_node_with_one_use_can_be_fused);
    RUN(many_nodes_have_room);
    return 0;
}
