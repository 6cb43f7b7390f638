/* Copies of a segment's nodes over a chosen set of (token, expert) pairs.
 *
 * In a replica every pair is a token of its own with one expert: pair tensors become [d, 1, n_pairs], the weights
 * a view of the arena whose depth is slots, ids slot numbers. Inputs from outside the segment are gathered a row a
 * pair; the rows of nodes that escape the segment are scattered to where the real graph expects them.
 */
#ifndef HB_REPLICA_H
#define HB_REPLICA_H

#include <stdbool.h>
#include <stdint.h>

#include "block.h"
#include "model.h"
#include "routing.h"
#include "segment.h"

#define HB_REPLICA_INPUTS 32

struct ggml_backend_buffer;

/* A device's memory for the tensors of a batch. What has an offset in it has the same one in the replicas' own memory:
 * from there the inputs are uploaded, and to there the rows that escape are downloaded. */
struct hb_place {
    struct ggml_backend_buffer *buffer; /* NULL: the tensors are in the replicas' own memory */
    char *base;
    size_t bytes, align;
};

/* The weights of a group in one precision: matrices of a role are in slots `stride` bytes apart. */
struct hb_stacks {
    int32_t precision, n_slots;
    struct {
        struct ggml_backend_buffer *buffer; /* NULL: the host's memory */
        char *base;                         /* of slot 0 */
        uint64_t stride;
    } roles[HB_GROUP_MATRICES];
};

struct hb_replicas {
    const struct hb_segment *segment;
    const struct hb_routing *routing;
    const float *token_scale; /* [n_tokens] factor on the gate weights, or NULL */
    struct hb_block memory; /* rows, gathered inputs, ids of one batch */
    struct hb_block kept;   /* inputs that an output of the segment would overwrite */
    struct {
        const struct ggml_tensor *tensor;
        const char *data;            /* the tensor's, or the copy in `kept` */
        struct ggml_tensor *gathered; /* of this batch, or NULL */
    } inputs[HB_REPLICA_INPUTS];
    int n_inputs;
    int64_t pair_bytes; /* of memory, a pair */
    struct ggml_tensor tensors[3 * HB_SEGMENT_NODES + HB_REPLICA_INPUTS + 2];
    int n_tensors;
    struct ggml_tensor *of_node[HB_SEGMENT_NODES];
    struct ggml_tensor *nodes[HB_SEGMENT_NODES]; /* what to compute */
    bool escaping[HB_SEGMENT_NODES]; /* of each of them: it is wanted outside the segment */
    int n_nodes;
    struct hb_place place;
    size_t taken, n_inputs_bytes; /* of it; the inputs come first */
    bool is_full;
    struct ggml_tensor *biases[HB_SEGMENT_NODES]; /* one an ADD_ID: a row a pair */
};

/* Start a segment. False when it is beyond our limits. */
bool hb_replicas_begin(struct hb_replicas *r, const struct hb_segment *segment, const struct hb_routing *routing);
/* Before the first batch: copy the inputs that scattering the segment's outputs would overwrite. */
bool hb_replicas_keep_inputs(struct hb_replicas *r);
/* Most pairs a batch on that arena should have; one expert may have more. */
int64_t hb_replicas_batch_pairs(const struct hb_replicas *r, struct hb_arena arena);
/* Build r->nodes over all pairs of these experts, whose slots in the arena are set; they have one precision. False when
 * memory is short. */
bool hb_replicas_build(struct hb_replicas *r, struct hb_arena arena, const struct hb_routed *const *experts,
                       int n_experts);

/* The same on a device, in the place that is set. Its operands are all uploaded: what ADD_ID adds is gathered, a row a
 * pair, and the node becomes an ADD. */

/* Continue the segment of `like`, from its first batch on: after hb_replicas_keep_inputs. */
void hb_replicas_adopt(struct hb_replicas *r, const struct hb_replicas *like);
/* Most pairs of the segment that a batch there can have; 0: not one. */
int64_t hb_replicas_place_pairs(const struct hb_replicas *r, const struct hb_place *place, int32_t n_slots);
/* Build r->nodes, and gather what they need in the replicas' own memory. This and scattering asks nothing of the device;
 * what is between them knows nothing of the segment, so that it may come to an end after the segment did. */
void hb_replicas_build_there(struct hb_replicas *r, const struct hb_stacks *stacks,
                             const struct hb_routed *const *experts, int n_experts);
/* Give the nodes their memory there; false when it does not suffice after all. Then upload the first r->n_inputs_bytes,
 * compute the nodes, and download those that escape. */
bool hb_replicas_place(struct hb_replicas *r);
/* Where in the replicas' own memory the rows of r->nodes[index] are to be, if they escape; else NULL. */
char *hb_replicas_escaping(const struct hb_replicas *r, int index);

/* After the nodes were computed: copy the rows that escape to the real tensors. */
void hb_replicas_scatter(struct hb_replicas *r, const struct hb_routed *const *experts, int n_experts);
/* In place of computing this expert: the rows of its pairs that escape become zero. */
void hb_replicas_skip(struct hb_replicas *r, const struct hb_routed *expert);
/* After the nodes were computed: add the squares of what entered the matrices to the sums. */
void hb_replicas_collect(const struct hb_replicas *r, const struct hb_gathered *into,
                         const struct hb_routed *const *experts, int n_experts);

/* Build r->nodes as the segment's own nodes, all experts being of one precision and in slots first_slot .. first_slot
 * + depth - 1 of the arena. With `at_home`, expert e is in slot first_slot + e; else its slot is in the routing. False
 * when memory is short. */
bool hb_replicas_in_place(struct hb_replicas *r, struct hb_arena arena, bool at_home, int32_t first_slot,
                          int32_t depth);

void hb_replicas_free(struct hb_replicas *r);

#endif
