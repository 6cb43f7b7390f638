#include "replica.h"

#include <string.h>

#include "ggml-backend.h"
#include "shape.h"

#define BATCH_BYTES ((int64_t) 32 << 20)
/* ggml's MUL_MAT_ID keeps a table of stack depth x pairs entries; the depth here is the number of slots. */
#define ROW_TABLE_BYTES ((int64_t) 16 << 20)
#define ROW_TABLE_ENTRY 8

static struct ggml_tensor *new_tensor(struct hb_replicas *r, const struct ggml_tensor *like) {
    struct ggml_tensor *t = &r->tensors[r->n_tensors++];
    *t = *like;
    t->buffer = NULL;
    t->view_src = NULL;
    t->view_offs = 0;
    t->extra = NULL;
    return t;
}

/* Rows of ne0 values of `bytes` each, one a pair: [ne0, 1, n_pairs]. */
static void set_rows(struct ggml_tensor *t, int64_t ne0, size_t bytes, int64_t n_pairs) {
    size_t row = (size_t) ne0 * bytes;
    t->ne[0] = ne0;
    t->ne[1] = 1;
    t->ne[2] = n_pairs;
    t->ne[3] = 1;
    t->nb[0] = bytes;
    t->nb[1] = t->nb[2] = row;
    t->nb[3] = row * (size_t) n_pairs;
}

static bool is_routing_operand(const struct ggml_tensor *node, int i) {
    return (node->op == GGML_OP_MUL_MAT_ID && i != 1) || (node->op == GGML_OP_ADD_ID && i != 0);
}

static bool is_computed(const struct ggml_tensor *node) {
    return !hb_shape_is_view(node);
}

/* The operand comes from within the segment, itself or as a view of one that does. */
static bool is_internal(const struct hb_segment *s, const struct ggml_tensor *t) {
    int i = hb_segment_find(s, hb_shape_is_row_view(t) ? t->src[0] : t);
    return i >= 0 && is_computed(s->nodes[i]);
}

static bool overlaps(const struct ggml_tensor *a, const struct ggml_tensor *b) {
    const char *a0 = a->data, *b0 = b->data;
    return a0 < b0 + ggml_nbytes(b) && b0 < a0 + ggml_nbytes(a);
}

static bool is_overwritten(const struct hb_segment *s, const struct ggml_tensor *t) {
    for (int i = 0; i < s->n_nodes; i++) {
        if (s->escapes[i] && is_computed(s->nodes[i]) && overlaps(s->nodes[i], t)) {
            return true;
        }
    }
    return false;
}

static int find_input(const struct hb_replicas *r, const struct ggml_tensor *t) {
    for (int i = 0; i < r->n_inputs; i++) {
        if (r->inputs[i].tensor == t) {
            return i;
        }
    }
    return -1;
}

static bool add_input(struct hb_replicas *r, const struct ggml_tensor *t) {
    if (find_input(r, t) >= 0) {
        return true;
    }
    if (r->n_inputs == HB_REPLICA_INPUTS) {
        return false;
    }
    r->inputs[r->n_inputs].tensor = t;
    r->inputs[r->n_inputs].data = t->data;
    r->n_inputs++;
    r->pair_bytes += (int64_t) hb_block_round((size_t) t->ne[0] * sizeof(float));
    return true;
}

bool hb_replicas_keep_inputs(struct hb_replicas *r) {
    size_t bytes = 0;
    for (int pass = 0; pass < 2; pass++) {
        if (pass == 1 && !hb_block_reserve(&r->kept, bytes)) {
            return false;
        }
        for (int i = 0; i < r->n_inputs; i++) {
            const struct ggml_tensor *t = r->inputs[i].tensor;
            if (!is_overwritten(r->segment, t)) {
                continue;
            }
            if (pass == 0) {
                bytes += hb_block_round(ggml_nbytes(t));
            } else {
                r->inputs[i].data = memcpy(hb_block_take(&r->kept, ggml_nbytes(t)), t->data, ggml_nbytes(t));
            }
        }
    }
    return true;
}

bool hb_replicas_begin(struct hb_replicas *r, const struct hb_segment *s, const struct hb_routing *routing) {
    r->segment = s;
    r->routing = routing;
    r->token_scale = NULL;
    r->n_inputs = 0;
    r->pair_bytes = 2 * (int64_t) sizeof(int32_t);
    for (int i = 0; i < s->n_nodes; i++) {
        const struct ggml_tensor *node = s->nodes[i];
        if (!is_computed(node)) {
            continue;
        }
        r->pair_bytes += (int64_t) hb_block_round((size_t) node->ne[0] * sizeof(float));
        for (int j = 0; j < GGML_MAX_SRC; j++) {
            const struct ggml_tensor *src = node->src[j];
            if (src != NULL && !is_routing_operand(node, j) && !is_internal(s, src) && !add_input(r, src)) {
                return false;
            }
        }
    }
    return true;
}

int64_t hb_replicas_batch_pairs(const struct hb_replicas *r, struct hb_arena arena) {
    int64_t by_rows = BATCH_BYTES / r->pair_bytes;
    int64_t by_table = ROW_TABLE_BYTES / ROW_TABLE_ENTRY / arena.n_slots;
    int64_t pairs = by_rows < by_table ? by_rows : by_table;
    return pairs > 1 ? pairs : 1;
}

/* In an arena all matrices of an expert are side by side. */
static struct hb_stacks stacks_of(const struct hb_segment *s, struct hb_arena arena, int32_t precision) {
    const struct hb_copy *copy = &hb_model_catalog(s->model)->groups[s->group].copies[precision];
    struct hb_stacks stacks = {.precision = precision, .n_slots = arena.n_slots};
    for (int32_t i = 0; i < copy->n_matrices; i++) {
        stacks.roles[i].base = arena.base + copy->matrices[i]->slot_offset;
        stacks.roles[i].stride = arena.slot_bytes;
    }
    return stacks;
}

/* Slots first_slot .. first_slot + depth - 1. */
struct stack {
    const struct hb_stacks *of;
    int32_t first_slot, depth;
};

/* The matrix in all these slots, as a stack for MUL_MAT_ID. */
static struct ggml_tensor *stack_view(struct hb_replicas *r, const struct ggml_tensor *weights,
                                      const struct stack *stack) {
    const struct hb_weight *weight = hb_segment_weight(weights);
    const struct hb_group *group = &hb_model_catalog(weight->model)->groups[weight->matrix->group];
    int32_t role = weight->matrix->role;
    const struct hb_matrix *matrix = group->copies[stack->of->precision].matrices[role];
    uint64_t stride = stack->of->roles[role].stride;
    struct ggml_tensor *t = new_tensor(r, weights);
    t->type = (enum ggml_type) matrix->type;
    t->buffer = stack->of->roles[role].buffer;
    t->data = stack->of->roles[role].base + (uint64_t) stack->first_slot * stride;
    t->ne[2] = stack->depth;
    t->nb[0] = ggml_type_size(t->type);
    t->nb[1] = ggml_row_size(t->type, t->ne[0]);
    t->nb[2] = stride;
    t->nb[3] = stride * (uint64_t) stack->depth;
    return t;
}

/* Give a tensor memory: here, or in the place of the batch. */
static void put(struct hb_replicas *r, struct ggml_tensor *t, size_t bytes) {
    const struct hb_place *place = &r->place;
    if (place->buffer == NULL) {
        t->data = hb_block_take(&r->memory, bytes);
        return;
    }
    size_t offset = (r->taken + place->align - 1) / place->align * place->align;
    r->is_full = r->is_full || bytes > place->bytes || offset > place->bytes - bytes;
    offset = r->is_full ? 0 : offset;
    r->taken = offset + bytes;
    t->buffer = place->buffer;
    t->data = place->base + offset;
}

/* Where it is filled, or read, here. */
static char *here(const struct hb_replicas *r, const struct ggml_tensor *t) {
    return r->place.buffer == NULL ? t->data : r->memory.data + ((const char *) t->data - r->place.base);
}

#define FOR_EACH_PAIR(experts, n_experts, e, i, at)                \
    for (int e = 0, at = 0; e < (n_experts); e++)                  \
        for (int32_t i = (experts)[e]->first; i < (experts)[e]->first + (experts)[e]->n_pairs; i++, at++)

static int64_t count_pairs(const struct hb_routed *const *experts, int n_experts) {
    int64_t n = 0;
    for (int e = 0; e < n_experts; e++) {
        n += experts[e]->n_pairs;
    }
    return n;
}

struct batch {
    const struct hb_routed *const *experts;
    int n_experts;
    int64_t n_pairs;
    struct stack stack;
    struct ggml_tensor *slot_ids, *expert_ids; /* I32 [1, n_pairs]; the latter only here */
};

static struct ggml_tensor *new_ids(struct hb_replicas *r, const struct batch *b) {
    struct ggml_tensor *t = new_tensor(r, r->segment->ids);
    t->op = GGML_OP_NONE;
    memset(t->src, 0, sizeof t->src);
    t->ne[0] = 1;
    t->ne[1] = b->n_pairs;
    t->ne[2] = t->ne[3] = 1;
    t->nb[0] = t->nb[1] = sizeof(int32_t);
    t->nb[2] = t->nb[3] = (size_t) b->n_pairs * sizeof(int32_t);
    put(r, t, t->nb[2]);
    return t;
}

static void make_ids(struct hb_replicas *r, struct batch *b) {
    b->slot_ids = new_ids(r, b);
    int32_t *slots = (int32_t *) here(r, b->slot_ids);
    FOR_EACH_PAIR(b->experts, b->n_experts, e, i, at) {
        slots[at] = b->experts[e]->slot - b->stack.first_slot;
    }
    if (r->place.buffer == NULL) {
        b->expert_ids = new_ids(r, b);
        int32_t *experts = b->expert_ids->data;
        FOR_EACH_PAIR(b->experts, b->n_experts, e, i, at) {
            experts[at] = b->experts[e]->expert;
        }
    }
}

/* A tensor of a row a pair, each as long as those of `like`, for the caller to fill in here. */
static struct ggml_tensor *new_gathered(struct hb_replicas *r, const struct batch *b, const struct ggml_tensor *like) {
    struct ggml_tensor *g = new_tensor(r, like);
    g->op = GGML_OP_NONE;
    memset(g->src, 0, sizeof g->src);
    set_rows(g, like->ne[0], sizeof(float), b->n_pairs);
    put(r, g, (size_t) like->ne[0] * sizeof(float) * (size_t) b->n_pairs);
    return g;
}

static struct ggml_tensor *gather(struct hb_replicas *r, const struct batch *b, const struct ggml_tensor *t) {
    int index = find_input(r, t);
    if (r->inputs[index].gathered != NULL) {
        return r->inputs[index].gathered;
    }
    struct ggml_tensor *g = new_gathered(r, b, t);
    const char *data = r->inputs[index].data;
    size_t row = (size_t) t->ne[0] * sizeof(float);
    char *rows = here(r, g);
    FOR_EACH_PAIR(b->experts, b->n_experts, e, i, at) {
        memcpy(rows + (size_t) at * row, hb_shape_row(t, data, r->routing->n[i], r->routing->token[i]), row);
    }
    if (t == r->segment->weights && r->token_scale != NULL) {
        FOR_EACH_PAIR(b->experts, b->n_experts, e, i, at) {
            ((float *) rows)[at] *= r->token_scale[r->routing->token[i]];
        }
    }
    return r->inputs[index].gathered = g;
}

/* What an ADD_ID adds, a row a pair. */
static struct ggml_tensor *gather_biases(struct hb_replicas *r, const struct batch *b, const struct ggml_tensor *of) {
    struct ggml_tensor *g = new_gathered(r, b, of);
    size_t row = (size_t) of->ne[0] * sizeof(float);
    char *rows = here(r, g);
    FOR_EACH_PAIR(b->experts, b->n_experts, e, i, at) {
        memcpy(rows + (size_t) at * row, (const char *) of->data + (size_t) b->experts[e]->expert * of->nb[1], row);
    }
    return g;
}

static struct ggml_tensor *row_view(struct hb_replicas *r, const struct ggml_tensor *view, int64_t n_pairs) {
    struct ggml_tensor *of = r->of_node[hb_segment_find(r->segment, view->src[0])];
    struct ggml_tensor *t = new_tensor(r, view);
    set_rows(t, view->ne[0], view->nb[0], n_pairs);
    t->nb[1] = t->nb[2] = of->nb[2];
    t->nb[3] = of->nb[3];
    t->src[0] = of;
    t->view_offs = view->view_offs;
    if (r->place.buffer == NULL) {
        t->data = (char *) of->data + view->view_offs;
    }
    return t;
}

static struct ggml_tensor *operand(struct hb_replicas *r, const struct batch *b, int index, int i) {
    const struct ggml_tensor *node = r->segment->nodes[index];
    struct ggml_tensor *src = node->src[i];
    if (node->op == GGML_OP_MUL_MAT_ID && i == 0) {
        return stack_view(r, src, &b->stack);
    }
    if (node->op == GGML_OP_MUL_MAT_ID && i == 2) {
        return b->slot_ids;
    }
    if (node->op == GGML_OP_ADD_ID && i > 0 && r->place.buffer != NULL) {
        return i == 1 ? r->biases[index] : NULL;
    }
    if (node->op == GGML_OP_ADD_ID && i > 0) {
        return i == 1 ? src : b->expert_ids;
    }
    if (!is_internal(r->segment, src)) {
        return gather(r, b, src);
    }
    return hb_shape_is_row_view(src) ? row_view(r, src, b->n_pairs) : r->of_node[hb_segment_find(r->segment, src)];
}

static void replicate(struct hb_replicas *r, const struct batch *b, int index) {
    const struct ggml_tensor *node = r->segment->nodes[index];
    struct ggml_tensor *t = new_tensor(r, node);
    set_rows(t, node->ne[0], sizeof(float), b->n_pairs);
    for (int i = 0; i < GGML_MAX_SRC && node->src[i] != NULL; i++) {
        t->src[i] = operand(r, b, index, i);
    }
    if (r->place.buffer == NULL) {
        put(r, t, t->nb[3]);
    } else {
        t->op = node->op == GGML_OP_ADD_ID ? GGML_OP_ADD : node->op;
        t->data = NULL; /* see hb_replicas_place */
    }
    r->escaping[r->n_nodes] = r->segment->escapes[index];
    r->of_node[index] = t;
    r->nodes[r->n_nodes++] = t;
}

static struct stack stack_of(const struct hb_stacks *stacks, const struct hb_routed *const *experts, int n_experts) {
    int32_t first = experts[0]->slot, last = first;
    for (int e = 1; e < n_experts; e++) {
        first = experts[e]->slot < first ? experts[e]->slot : first;
        last = experts[e]->slot > last ? experts[e]->slot : last;
    }
    return (struct stack) {stacks, first, last - first + 1};
}

/* A segment's tensors beside its inputs that a batch has memory for. */
#define OTHER_TENSORS (HB_SEGMENT_NODES + HB_REPLICA_INPUTS + 2)

static void build(struct hb_replicas *r, struct batch *b) {
    r->n_tensors = r->n_nodes = 0;
    r->taken = 0;
    r->is_full = false;
    for (int i = 0; i < r->n_inputs; i++) {
        r->inputs[i].gathered = NULL;
    }
    make_ids(r, b);
    if (r->place.buffer != NULL) {
        for (int i = 0; i < r->n_inputs; i++) {
            (void) gather(r, b, r->inputs[i].tensor);
        }
        for (int i = 0; i < r->segment->n_nodes; i++) {
            const struct ggml_tensor *node = r->segment->nodes[i];
            r->biases[i] = node->op == GGML_OP_ADD_ID ? gather_biases(r, b, node->src[1]) : NULL;
        }
        r->n_inputs_bytes = r->taken;
    }
    for (int i = 0; i < r->segment->n_nodes; i++) {
        if (is_computed(r->segment->nodes[i])) {
            replicate(r, b, i);
        }
    }
}

bool hb_replicas_build(struct hb_replicas *r, struct hb_arena arena, const struct hb_routed *const *experts,
                       int n_experts) {
    struct batch b = {.experts = experts, .n_experts = n_experts, .n_pairs = count_pairs(experts, n_experts)};
    size_t slack = (size_t) OTHER_TENSORS * HB_BLOCK_ALIGN;
    if (!hb_block_reserve(&r->memory, (size_t) (r->pair_bytes * b.n_pairs) + slack)) {
        return false;
    }
    struct hb_stacks stacks = stacks_of(r->segment, arena, experts[0]->precision);
    b.stack = stack_of(&stacks, experts, n_experts);
    build(r, &b);
    return true;
}

/* --- on a device --- */

void hb_replicas_adopt(struct hb_replicas *r, const struct hb_replicas *like) {
    r->segment = like->segment;
    r->routing = like->routing;
    r->token_scale = like->token_scale;
    memcpy(r->inputs, like->inputs, sizeof r->inputs);
    r->n_inputs = like->n_inputs;
}

static int64_t pair_bytes_there(const struct hb_replicas *r) {
    int64_t bytes = r->pair_bytes;
    for (int i = 0; i < r->segment->n_nodes; i++) {
        const struct ggml_tensor *node = r->segment->nodes[i];
        if (node->op == GGML_OP_ADD_ID) {
            bytes += (int64_t) hb_block_round((size_t) node->ne[0] * sizeof(float));
        }
    }
    return bytes;
}

int64_t hb_replicas_place_pairs(const struct hb_replicas *r, const struct hb_place *place, int32_t n_slots) {
    int64_t slack = (int64_t) (OTHER_TENSORS + HB_SEGMENT_NODES) * (int64_t) place->align;
    int64_t by_rows = ((int64_t) place->bytes - slack) / pair_bytes_there(r);
    int64_t by_table = ROW_TABLE_BYTES / ROW_TABLE_ENTRY / n_slots;
    int64_t pairs = by_rows < by_table ? by_rows : by_table;
    return pairs > 0 ? pairs : 0;
}

void hb_replicas_build_there(struct hb_replicas *r, const struct hb_stacks *stacks,
                             const struct hb_routed *const *experts, int n_experts) {
    struct batch b = {.experts = experts, .n_experts = n_experts, .n_pairs = count_pairs(experts, n_experts)};
    b.stack = stack_of(stacks, experts, n_experts);
    build(r, &b);
}

bool hb_replicas_place(struct hb_replicas *r) {
    ggml_backend_buffer_type_t type = ggml_backend_buffer_get_type(r->place.buffer);
    for (int i = 0; i < r->n_nodes; i++) {
        for (int k = 0; k < GGML_MAX_SRC; k++) {
            struct ggml_tensor *src = r->nodes[i]->src[k];
            if (src != NULL && src->op == GGML_OP_VIEW) {
                src->buffer = r->place.buffer;
                src->data = (char *) src->src[0]->data + src->view_offs;
            }
        }
        put(r, r->nodes[i], ggml_backend_buft_get_alloc_size(type, r->nodes[i]));
    }
    return !r->is_full;
}

char *hb_replicas_escaping(const struct hb_replicas *r, int index) {
    return r->escaping[index] ? here(r, r->nodes[index]) : NULL;
}

void hb_replicas_scatter(struct hb_replicas *r, const struct hb_routed *const *experts, int n_experts) {
    for (int k = 0; k < r->segment->n_nodes; k++) {
        const struct ggml_tensor *node = r->segment->nodes[k];
        if (!r->segment->escapes[k] || !is_computed(node)) {
            continue;
        }
        const char *rows = here(r, r->of_node[k]);
        size_t row = (size_t) node->ne[0] * sizeof(float);
        FOR_EACH_PAIR(experts, n_experts, e, i, at) {
            memcpy(hb_shape_row(node, node->data, r->routing->n[i], r->routing->token[i]), rows + (size_t) at * row,
                   row);
        }
    }
}

void hb_replicas_skip(struct hb_replicas *r, const struct hb_routed *expert) {
    for (int k = 0; k < r->segment->n_nodes; k++) {
        const struct ggml_tensor *node = r->segment->nodes[k];
        if (!r->segment->escapes[k] || !is_computed(node)) {
            continue;
        }
        for (int32_t i = expert->first; i < expert->first + expert->n_pairs; i++) {
            memset(hb_shape_row(node, node->data, r->routing->n[i], r->routing->token[i]), 0,
                   (size_t) node->ne[0] * sizeof(float));
        }
    }
}

static void add_squares(float *sums, const float *row, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        sums[i] += row[i] * row[i];
    }
}

void hb_replicas_collect(const struct hb_replicas *r, const struct hb_gathered *into,
                         const struct hb_routed *const *experts, int n_experts) {
    for (int k = 0; k < r->segment->n_nodes; k++) {
        const struct ggml_tensor *node = r->segment->nodes[k];
        if (node->op != GGML_OP_MUL_MAT_ID) {
            continue;
        }
        const struct hb_weight *weight = hb_segment_weight(node->src[0]);
        int64_t m = weight->matrix - hb_model_catalog(weight->model)->matrices;
        const struct ggml_tensor *rows = r->of_node[k]->src[1];
        if (into->sums[m] == NULL) {
            continue;
        }
        FOR_EACH_PAIR(experts, n_experts, e, i, at) {
            const char *row = (const char *) rows->data + (size_t) at * rows->nb[2];
            add_squares(into->sums[m] + experts[e]->expert * rows->ne[0], (const float *) row, rows->ne[0]);
            into->counts[m][experts[e]->expert]++;
        }
    }
}

/* ids [n_used, n_tokens] with slots in place of experts. */
static struct ggml_tensor *slot_ids(struct hb_replicas *r, int32_t first_slot) {
    const struct ggml_tensor *ids = r->segment->ids;
    struct ggml_tensor *t = new_tensor(r, ids);
    t->op = GGML_OP_NONE;
    memset(t->src, 0, sizeof t->src);
    t->nb[0] = sizeof(int32_t);
    t->nb[1] = (size_t) ids->ne[0] * sizeof(int32_t);
    t->nb[2] = t->nb[3] = (size_t) ids->ne[1] * t->nb[1];
    if (!hb_block_reserve(&r->memory, hb_block_round(t->nb[2]))) {
        return NULL;
    }
    int32_t *out = t->data = hb_block_take(&r->memory, t->nb[2]);
    for (int32_t e = 0; e < r->routing->n_experts; e++) {
        const struct hb_routed *expert = &r->routing->experts[e];
        for (int32_t i = expert->first; i < expert->first + expert->n_pairs; i++) {
            out[(int64_t) r->routing->token[i] * ids->ne[0] + r->routing->n[i]] = expert->slot - first_slot;
        }
    }
    return t;
}

bool hb_replicas_in_place(struct hb_replicas *r, struct hb_arena arena, bool at_home, int32_t first_slot,
                          int32_t depth) {
    struct hb_stacks stacks = stacks_of(r->segment, arena, r->routing->experts[0].precision);
    struct stack stack = {&stacks, first_slot, depth};
    r->n_tensors = r->n_nodes = 0;
    struct ggml_tensor *ids = at_home ? NULL : slot_ids(r, first_slot);
    if (!at_home && ids == NULL) {
        return false;
    }
    for (int i = 0; i < r->segment->n_nodes; i++) {
        struct ggml_tensor *node = r->segment->nodes[i];
        if (node->op == GGML_OP_MUL_MAT_ID) {
            struct ggml_tensor *copy = new_tensor(r, node);
            copy->src[0] = stack_view(r, node->src[0], &stack);
            copy->src[2] = ids != NULL ? ids : node->src[2];
            node = copy;
        }
        if (is_computed(node)) {
            r->nodes[r->n_nodes++] = node;
        }
    }
    return true;
}

void hb_replicas_free(struct hb_replicas *r) {
    hb_block_free(&r->memory);
    hb_block_free(&r->kept);
}
