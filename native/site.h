/* Where experts are computed, measured: what it takes to multiply so many rows by the matrices of so many experts. */
#ifndef HB_SITE_H
#define HB_SITE_H

#include <stdint.h>

#include "block.h"
#include "catalog.h"
#include "costs.h"
#include "ggml-backend.h"

/* Of at most so many experts at a time: more than a processor's caches hold, of most models. */
#define HB_SITE_EXPERTS 8

/* Memory of `backend`: a stack of matrices a role, and room for activations. */
struct hb_site {
    ggml_backend_t backend;
    struct ggml_tensor stacks[HB_GROUP_MATRICES];
    int32_t n_stacks, n_slots;
    uint64_t expert_bytes;
    ggml_backend_buffer_t place;
    struct hb_block *memory; /* the host's, of what goes there and comes back; it grows */
    uint64_t batch_ns, pair_ns; /* see hobbit_device_delays */
};

/* ns from when the activations are in the host's memory until the results are; 0: that cannot be computed there. */
uint64_t hb_site_time(const struct hb_site *site, int32_t n_experts, int32_t n_pairs_each);
/* Measure a lane: what a batch takes besides its experts, and the curve. It takes some 0.1 s. False: see above. */
bool hb_site_measure(const struct hb_site *site, double *fixed_ns, struct hb_curve *curve);
/* Sleep until so long after `start` (hb_now_ns). */
void hb_site_sleep_until(uint64_t start, uint64_t ns);

#endif
