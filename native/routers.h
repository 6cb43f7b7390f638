/* What is known of a layer's router: numbers that stay in memory as long as the model. */
#ifndef HB_ROUTERS_H
#define HB_ROUTERS_H

#include <stdbool.h>
#include <stdint.h>

/* Vectors are [n_expert], or NULL where there is none. */
struct hb_router {
    const float *matrix; /* [n_expert][n_embd]; NULL: not known */
    const float *bias, *bias_of_choice; /* added to the products; added to p when the largest are chosen */
    const float *norm; /* [n_embd] what its normalised input was multiplied with */
    bool sigmoid;      /* p is a sigmoid, else the softmax */
    int32_t n_embd, n_expert, n_used;
};

/* The largest of [n_groups] numbers of experts. */
int32_t hb_most_experts(int32_t n_groups, const int32_t *n_experts);
float hb_router_dot(const float *a, const float *b, int32_t n);
/* z = W x + b, [n_expert], of any x [n_embd]. The sums are not in llama.cpp's order: z is equal up to rounding. */
void hb_router_logits(const struct hb_router *router, const float *x, float *z);
/* From z: p [n_expert], positive and of sum 1, what the gate weights of the chosen are proportional to; and `choice`
 * [n_expert], by which the largest are chosen. */
void hb_router_probs(const struct hb_router *router, const float *z, float *p, float *choice);

#endif
