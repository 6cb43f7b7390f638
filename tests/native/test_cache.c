/* Description: the cache's order of eviction, pins, states and home slots; every sequence keeps its invariants. */
#include "cache.h"

#include "check.h"
#include "faults.h"

static struct hb_cache *one_pool(int32_t slots, int32_t experts) {
    struct hb_cache *c = hb_cache_new(1, &slots, 1, &experts, &(int32_t) {0});
    CHECK(c != NULL && hb_cache_is_valid(c));
    return c;
}

/* Claim, load and let go. */
static int32_t load(struct hb_cache *c, int32_t group, int32_t expert) {
    int32_t slot = hb_cache_claim(c, group, expert);
    if (slot >= 0) {
        CHECK(hb_cache_is_valid(c));
        hb_cache_loaded(c, group, expert);
        CHECK(hb_cache_is_valid(c));
        hb_cache_pin(c, group, expert, false);
        CHECK(hb_cache_is_valid(c));
    }
    return slot;
}

static void evicts_the_least_recently_used(void) {
    struct hb_cache *c = one_pool(3, 8);
    for (int32_t e = 0; e < 3; e++) {
        CHECK_EQUAL(load(c, 0, e), e);
    }
    CHECK_EQUAL(hb_cache_find(c, 0, 0), 0);
    CHECK_EQUAL(load(c, 0, 3), 1); /* expert 1 is the oldest use now */
    CHECK_EQUAL(hb_cache_find(c, 0, 1), -1);
    CHECK_EQUAL(load(c, 0, 4), 2);
    CHECK_EQUAL(hb_cache_find(c, 0, 2), -1);
    CHECK_EQUAL(load(c, 0, 5), 0);
    CHECK_EQUAL(hb_cache_find(c, 0, 3), 1);
    CHECK_EQUAL(hb_cache_find(c, 0, 4), 2);
    CHECK_EQUAL(hb_cache_evictions(c), 3);
    CHECK_EQUAL(hb_cache_n_ready(c), 3);
    CHECK_EQUAL(hb_cache_n_slots(c, 0), 3);
    hb_cache_free(c);
}

static void pinned_slots_stay(void) {
    struct hb_cache *c = one_pool(2, 8);
    load(c, 0, 0);
    load(c, 0, 1);
    hb_cache_pin(c, 0, 0, true);
    CHECK_EQUAL(load(c, 0, 2), 1); /* not slot 0, though it is older */
    hb_cache_pin(c, 0, 2, true);
    CHECK_EQUAL(hb_cache_claim(c, 0, 3), -1);
    CHECK(hb_cache_is_valid(c));
    CHECK_EQUAL(hb_cache_find(c, 0, 0), 0);
    CHECK_EQUAL(hb_cache_find(c, 0, 2), 1);
    hb_cache_pin(c, 0, 0, false);
    CHECK_EQUAL(load(c, 0, 3), 0);
    hb_cache_free(c);
}

static void loading_slots_are_neither_found_nor_evicted(void) {
    struct hb_cache *c = one_pool(2, 8);
    CHECK_EQUAL(hb_cache_claim(c, 0, 0), 0);
    CHECK_EQUAL(hb_cache_find(c, 0, 0), -1);
    CHECK_EQUAL(hb_cache_claim(c, 0, 1), 1);
    CHECK_EQUAL(hb_cache_claim(c, 0, 2), -1);
    CHECK_EQUAL(hb_cache_n_ready(c), 0);
    hb_cache_loaded(c, 0, 0);
    CHECK_EQUAL(hb_cache_find(c, 0, 0), 0);
    CHECK_EQUAL(hb_cache_claim(c, 0, 2), -1); /* still pinned by who loaded it */
    CHECK(hb_cache_is_valid(c));
    hb_cache_free(c);
}

static void a_failed_load_frees_its_slot(void) {
    struct hb_cache *c = one_pool(1, 4);
    CHECK_EQUAL(hb_cache_claim(c, 0, 0), 0);
    hb_cache_failed(c, 0, 0);
    CHECK(hb_cache_is_valid(c));
    CHECK_EQUAL(hb_cache_find(c, 0, 0), -1);
    CHECK_EQUAL(load(c, 0, 0), 0);
    CHECK_EQUAL(hb_cache_find(c, 0, 0), 0);
    CHECK_EQUAL(hb_cache_evictions(c), 0);
    hb_cache_free(c);
}

static void complete_pools_have_home_slots(void) {
    struct hb_cache *c = hb_cache_new(2, (int32_t[]) {7, 4}, 3, (int32_t[]) {3, 5, 4}, (int32_t[]) {0, 1, 0});
    CHECK_EQUAL(hb_cache_home(c, 0), 0);
    CHECK_EQUAL(hb_cache_home(c, 2), 3); /* after group 0's */
    CHECK_EQUAL(hb_cache_home(c, 1), -1); /* 4 slots for 5 experts */
    for (int32_t e = 3; e >= 0; e--) {
        CHECK_EQUAL(load(c, 2, e), 3 + e);
    }
    for (int32_t e = 2; e >= 0; e--) {
        CHECK_EQUAL(load(c, 0, e), e);
    }
    CHECK_EQUAL(hb_cache_evictions(c), 0);
    CHECK_EQUAL(hb_cache_n_ready(c), 7);
    CHECK_EQUAL(hb_cache_claim(c, 1, 4), 0);
    hb_cache_failed(c, 1, 4);
    hb_cache_free(c);
}

static void pools_do_not_evict_each_other(void) {
    struct hb_cache *c = hb_cache_new(2, (int32_t[]) {2, 2}, 2, (int32_t[]) {4, 4}, (int32_t[]) {0, 1});
    load(c, 0, 0);
    load(c, 0, 1);
    for (int32_t e = 0; e < 4; e++) {
        load(c, 1, e);
    }
    CHECK_EQUAL(hb_cache_find(c, 0, 0), 0);
    CHECK_EQUAL(hb_cache_find(c, 0, 1), 1);
    CHECK_EQUAL(hb_cache_find(c, 1, 0), -1);
    CHECK_EQUAL(hb_cache_find(c, 1, 3), 1);
    hb_cache_free(c);
}

/* --- stress: random operations against a table of what the cache has to hold --- */

#define GROUPS 5
#define POOLS 3
#define EXPERTS 9

static const int32_t stress_slots[POOLS] = {6, 2 * EXPERTS, 3};
static const int32_t stress_pool[GROUPS] = {0, 1, 0, 1, 2};
static const int32_t stress_experts[GROUPS] = {EXPERTS, EXPERTS, 4, EXPERTS, 7};

struct entry {
    enum hb_slot_state state;
    bool pinned;
    int32_t slot;
    uint64_t used;
};

struct model {
    struct entry entries[GROUPS][EXPERTS];
    uint64_t clock;
};

/* What a claim has to return: home, a free slot, or the oldest unpinned one. -2: any free slot. */
static int32_t expected_slot(const struct model *m, const struct hb_cache *c, int32_t group, int32_t expert) {
    if (hb_cache_home(c, group) >= 0) {
        return hb_cache_home(c, group) + expert;
    }
    int32_t held = 0;
    const struct entry *oldest = NULL;
    for (int g = 0; g < GROUPS; g++) {
        for (int e = 0; e < EXPERTS && stress_pool[g] == stress_pool[group]; e++) {
            const struct entry *entry = &m->entries[g][e];
            held += entry->state != HB_SLOT_FREE;
            if (entry->state == HB_SLOT_READY && !entry->pinned && (oldest == NULL || entry->used < oldest->used)) {
                oldest = entry;
            }
        }
    }
    return held < stress_slots[stress_pool[group]] ? -2 : oldest != NULL ? oldest->slot : -1;
}

static void claim(struct model *m, struct hb_cache *c, int32_t group, int32_t expert) {
    int32_t expected = expected_slot(m, c, group, expert);
    int32_t slot = hb_cache_claim(c, group, expert);
    CHECK(expected == -2 ? slot >= 0 : slot == expected);
    for (int g = 0; g < GROUPS; g++) {
        for (int e = 0; e < EXPERTS && slot >= 0; e++) {
            struct entry *entry = &m->entries[g][e];
            if (stress_pool[g] == stress_pool[group] && entry->state != HB_SLOT_FREE && entry->slot == slot) {
                CHECK(entry->state == HB_SLOT_READY && !entry->pinned);
                entry->state = HB_SLOT_FREE;
            }
        }
    }
    if (slot >= 0) {
        m->entries[group][expert] = (struct entry) {HB_SLOT_LOADING, true, slot, ++m->clock};
    }
}

static void step(struct model *m, struct hb_cache *c, uint64_t *seed) {
    int32_t group = (int32_t) check_random(seed, GROUPS);
    int32_t expert = (int32_t) check_random(seed, (uint32_t) stress_experts[group]);
    struct entry *entry = &m->entries[group][expert];
    int32_t found = hb_cache_find(c, group, expert);
    CHECK_EQUAL(found, entry->state == HB_SLOT_READY ? entry->slot : -1);
    if (found >= 0) {
        entry->used = ++m->clock;
    }
    if (entry->state == HB_SLOT_FREE) {
        claim(m, c, group, expert);
    } else if (entry->state == HB_SLOT_LOADING && check_random(seed, 4) == 0) {
        hb_cache_failed(c, group, expert);
        entry->state = HB_SLOT_FREE;
    } else if (entry->state == HB_SLOT_LOADING) {
        hb_cache_loaded(c, group, expert);
        entry->state = HB_SLOT_READY;
    } else {
        entry->pinned = check_random(seed, 4) == 0;
        hb_cache_pin(c, group, expert, entry->pinned);
    }
    CHECK(hb_cache_is_valid(c));
}

static void random_operations_keep_the_invariants(void) {
    uint64_t seed = 1;
    for (int round = 0; round < 10; round++) {
        struct model m = {0};
        struct hb_cache *c = hb_cache_new(POOLS, stress_slots, GROUPS, stress_experts, stress_pool);
        CHECK(c != NULL);
        for (int i = 0; i < 5000; i++) {
            step(&m, c, &seed);
        }
        hb_cache_free(c);
    }
}

static void every_failed_allocation_is_survived(void) {
    struct hb_cache *c = NULL;
    int n = 0;
    while (c == NULL) {
        atomic_store(&faults_allocation, ++n);
        c = hb_cache_new(POOLS, stress_slots, GROUPS, stress_experts, stress_pool);
    }
    atomic_store(&faults_allocation, 0);
    CHECK(n > POOLS + GROUPS);
    CHECK(hb_cache_is_valid(c));
    hb_cache_free(c);
    hb_cache_free(NULL);
}

int main(void) {
    RUN(evicts_the_least_recently_used);
    RUN(pinned_slots_stay);
    RUN(loading_slots_are_neither_found_nor_evicted);
    RUN(a_failed_load_frees_its_slot);
    RUN(complete_pools_have_home_slots);
    RUN(pools_do_not_evict_each_other);
    RUN(random_operations_keep_the_invariants);
    RUN(every_failed_allocation_is_survived);
    return 0;
}
