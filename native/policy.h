/* Who is evicted: a pure function of what is known of a cached expert. No clock, lock, allocation or I/O here. */
#ifndef HB_POLICY_H
#define HB_POLICY_H

#include <stdint.h>

struct hb_usage {
    uint64_t last_use; /* the cache's use counter at the latest use */
};

/* The cached expert with the smallest score goes first. Least recently used: the score is the time of use. */
static inline uint64_t hb_policy_score(const struct hb_usage *usage) {
    return usage->last_use;
}

#endif
