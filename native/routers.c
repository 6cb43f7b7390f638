#include "routers.h"

#include <math.h>
#include <stddef.h>

#define LANES 16 /* sums side by side, so that the compiler may use vectors */

int32_t hb_most_experts(int32_t n_groups, const int32_t *n_experts) {
    int32_t most = 0;
    for (int32_t g = 0; g < n_groups; g++) {
        most = n_experts[g] > most ? n_experts[g] : most;
    }
    return most;
}

float hb_router_dot(const float *a, const float *b, int32_t n) {
    float sums[LANES] = {0}, sum = 0;
    int32_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        for (int32_t k = 0; k < LANES; k++) {
            sums[k] += a[i + k] * b[i + k];
        }
    }
    for (; i < n; i++) {
        sum += a[i] * b[i];
    }
    for (int32_t k = 0; k < LANES; k++) {
        sum += sums[k];
    }
    return sum;
}

void hb_router_logits(const struct hb_router *router, const float *x, float *z) {
    for (int32_t e = 0; e < router->n_expert; e++) {
        z[e] = hb_router_dot(router->matrix + (int64_t) e * router->n_embd, x, router->n_embd);
        z[e] += router->bias != NULL ? router->bias[e] : 0;
    }
}

void hb_router_probs(const struct hb_router *router, const float *z, float *p, float *choice) {
    float most = -INFINITY, sum = 0;
    for (int32_t e = 0; e < router->n_expert; e++) {
        most = z[e] > most ? z[e] : most;
    }
    for (int32_t e = 0; e < router->n_expert; e++) {
        p[e] = router->sigmoid ? 1 / (1 + expf(-z[e])) : expf(z[e] - most);
        sum += p[e];
    }
    for (int32_t e = 0; e < router->n_expert; e++) {
        float raw = router->sigmoid ? p[e] : p[e] / sum;
        choice[e] = raw + (router->bias_of_choice != NULL ? router->bias_of_choice[e] : 0);
        p[e] /= sum;
    }
}
