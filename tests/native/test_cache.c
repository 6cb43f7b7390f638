/* Description: the cache's order of eviction, pins, states and home slots, and that copies of both precisions share a
 * pool's bytes; every sequence keeps its invariants. */
#include "cache.h"

#include "check.h"
#include "faults.h"

#define MAX_POOLS 4
#define MAX_SLOTS 64

/* What the cache gave back: how often each slot was emptied. */
static struct {
    int slots[MAX_POOLS][HOBBIT_PRECISIONS][MAX_SLOTS];
    int all;
} emptied;

static void on_emptied(void *context, int32_t pool, int32_t precision, int32_t slot) {
    CHECK(context == &emptied && pool >= 0 && pool < MAX_POOLS && slot >= 0 && slot < MAX_SLOTS);
    CHECK(precision == HOBBIT_HIGH || precision == HOBBIT_LOW);
    emptied.slots[pool][precision][slot]++;
    emptied.all++;
}

static struct hb_cache *new_cache(int32_t n_pools, const struct hobbit_pool *pools, int32_t n_groups,
                                  const int32_t *experts, const int32_t *pool_of_group) {
    memset(&emptied, 0, sizeof emptied);
    struct hb_cache *c = hb_cache_new(n_pools, pools, n_groups, experts, pool_of_group, on_emptied, &emptied);
    CHECK(c == NULL || hb_cache_is_valid(c));
    return c;
}

/* For high copies alone. */
static struct hobbit_pool plain(int32_t slots) {
    return (struct hobbit_pool) {.bytes = 10 * (uint64_t) slots, .slot_bytes = {10, 0}, .n_slots = {slots, 0}};
}

static struct hb_cache *one_pool(int32_t slots, int32_t experts) {
    struct hb_cache *c = new_cache(1, (struct hobbit_pool[]) {plain(slots)}, 1, &experts, &(int32_t) {0});
    CHECK(c != NULL);
    return c;
}

/* High copies of 10 bytes and low ones of 3, in one pool. */
static struct hb_cache *shared_pool(uint64_t bytes, int32_t high_slots, int32_t low_slots, int32_t experts) {
    struct hobbit_pool pool = {.bytes = bytes, .slot_bytes = {10, 3}, .n_slots = {high_slots, low_slots}};
    struct hb_cache *c = new_cache(1, &pool, 1, &experts, &(int32_t) {0});
    CHECK(c != NULL);
    return c;
}

static struct hb_key high(int32_t group, int32_t expert) {
    return (struct hb_key) {group, expert, HOBBIT_HIGH};
}

static struct hb_key low(int32_t group, int32_t expert) {
    return (struct hb_key) {group, expert, HOBBIT_LOW};
}

/* Claim, load and let go. */
static int32_t load(struct hb_cache *c, struct hb_key key) {
    int32_t slot = hb_cache_claim(c, key);
    CHECK(hb_cache_is_valid(c));
    if (slot >= 0) {
        hb_cache_loaded(c, key);
        CHECK(hb_cache_is_valid(c));
        hb_cache_pin(c, key, false);
        CHECK(hb_cache_is_valid(c));
    }
    return slot;
}

static void evicts_the_least_recently_used(void) {
    struct hb_cache *c = one_pool(3, 8);
    for (int32_t e = 0; e < 3; e++) {
        CHECK_EQUAL(load(c, high(0, e)), e);
    }
    CHECK_EQUAL(hb_cache_find(c, high(0, 0), 1), 0);
    CHECK_EQUAL(load(c, high(0, 3)), 1); /* expert 1 is the oldest use now */
    CHECK_EQUAL(hb_cache_find(c, high(0, 1), 1), -1);
    CHECK_EQUAL(load(c, high(0, 4)), 2);
    CHECK_EQUAL(hb_cache_find(c, high(0, 2), 1), -1);
    CHECK_EQUAL(load(c, high(0, 5)), 0);
    CHECK_EQUAL(hb_cache_find(c, high(0, 3), 1), 1);
    CHECK_EQUAL(hb_cache_find(c, high(0, 4), 1), 2);
    CHECK_EQUAL(hb_cache_evictions(c), 3);
    CHECK_EQUAL(hb_cache_n_ready(c), 3);
    CHECK_EQUAL(hb_cache_used(c, 0), 30);
    CHECK_EQUAL(emptied.all, 0); /* every slot was filled again at once */
    hb_cache_free(c);
}

static void pinned_slots_stay(void) {
    struct hb_cache *c = one_pool(2, 8);
    load(c, high(0, 0));
    load(c, high(0, 1));
    hb_cache_pin(c, high(0, 0), true);
    CHECK_EQUAL(load(c, high(0, 2)), 1); /* not slot 0, though it is older */
    hb_cache_pin(c, high(0, 2), true);
    CHECK_EQUAL(hb_cache_claim(c, high(0, 3)), -1);
    CHECK(hb_cache_is_valid(c));
    CHECK_EQUAL(hb_cache_find(c, high(0, 0), 1), 0);
    CHECK_EQUAL(hb_cache_find(c, high(0, 2), 1), 1);
    hb_cache_pin(c, high(0, 0), false);
    CHECK_EQUAL(load(c, high(0, 3)), 0);
    hb_cache_free(c);
}

static void pins_are_counted(void) {
    struct hb_cache *c = one_pool(1, 8);
    load(c, high(0, 0));
    hb_cache_pin(c, high(0, 0), true);
    hb_cache_pin(c, high(0, 0), true);
    hb_cache_pin(c, high(0, 0), false);
    CHECK_EQUAL(hb_cache_claim(c, high(0, 1)), -1);
    hb_cache_pin(c, high(0, 0), false);
    CHECK_EQUAL(load(c, high(0, 1)), 0);
    CHECK_EQUAL(hb_cache_claim(c, high(0, 2)), 0);
    hb_cache_pin(c, high(0, 2), true); /* while it is LOADING */
    hb_cache_loaded(c, high(0, 2));
    hb_cache_pin(c, high(0, 2), false);
    CHECK_EQUAL(hb_cache_claim(c, high(0, 3)), -1);
    hb_cache_drop(c, high(0, 2)); /* and its pins */
    CHECK_EQUAL(load(c, high(0, 2)), 0);
    CHECK_EQUAL(load(c, high(0, 3)), 0);
    hb_cache_free(c);
}

static void loading_slots_are_neither_found_nor_evicted(void) {
    struct hb_cache *c = one_pool(2, 8);
    CHECK_EQUAL(hb_cache_claim(c, high(0, 0)), 0);
    CHECK_EQUAL(hb_cache_find(c, high(0, 0), 1), -1);
    CHECK_EQUAL(hb_cache_claim(c, high(0, 1)), 1);
    CHECK_EQUAL(hb_cache_claim(c, high(0, 2)), -1);
    CHECK_EQUAL(hb_cache_n_ready(c), 0);
    hb_cache_loaded(c, high(0, 0));
    CHECK_EQUAL(hb_cache_find(c, high(0, 0), 1), 0);
    CHECK_EQUAL(hb_cache_claim(c, high(0, 2)), -1); /* still pinned by who loaded it */
    CHECK(hb_cache_is_valid(c));
    hb_cache_free(c);
}

static void a_dropped_copy_frees_its_slot(void) {
    struct hb_cache *c = one_pool(1, 4);
    CHECK_EQUAL(hb_cache_claim(c, high(0, 0)), 0);
    hb_cache_drop(c, high(0, 0));
    CHECK(hb_cache_is_valid(c));
    CHECK_EQUAL(hb_cache_find(c, high(0, 0), 1), -1);
    CHECK_EQUAL(emptied.all, 0); /* no other bank wants the memory */
    CHECK_EQUAL(hb_cache_used(c, 0), 0);
    CHECK_EQUAL(load(c, high(0, 0)), 0);
    CHECK_EQUAL(hb_cache_find(c, high(0, 0), 1), 0);
    CHECK_EQUAL(hb_cache_evictions(c), 0);
    hb_cache_pin(c, high(0, 0), true);
    hb_cache_drop(c, high(0, 0)); /* READY and pinned */
    CHECK(hb_cache_is_valid(c));
    CHECK_EQUAL(hb_cache_n_ready(c), 0);
    CHECK_EQUAL(hb_cache_find(c, high(0, 0), 1), -1);
    CHECK_EQUAL(emptied.all, 0);
    hb_cache_free(c);
}

static void complete_pools_have_home_slots(void) {
    const struct hobbit_pool pools[] = {plain(7), plain(4)};
    struct hb_cache *c = new_cache(2, pools, 3, (int32_t[]) {3, 5, 4}, (int32_t[]) {0, 1, 0});
    CHECK_EQUAL(hb_cache_home(c, 0), 0);
    CHECK_EQUAL(hb_cache_home(c, 2), 3); /* after group 0's */
    CHECK_EQUAL(hb_cache_home(c, 1), -1); /* 4 slots for 5 experts */
    for (int32_t e = 3; e >= 0; e--) {
        CHECK_EQUAL(load(c, high(2, e)), 3 + e);
    }
    for (int32_t e = 2; e >= 0; e--) {
        CHECK_EQUAL(load(c, high(0, e)), e);
    }
    CHECK_EQUAL(hb_cache_evictions(c), 0);
    CHECK_EQUAL(hb_cache_n_ready(c), 7);
    CHECK_EQUAL(hb_cache_claim(c, high(1, 4)), 0);
    hb_cache_drop(c, high(1, 4));
    hb_cache_free(c);
}

static void pools_do_not_evict_each_other(void) {
    const struct hobbit_pool pools[] = {plain(2), plain(2)};
    struct hb_cache *c = new_cache(2, pools, 2, (int32_t[]) {4, 4}, (int32_t[]) {0, 1});
    load(c, high(0, 0));
    load(c, high(0, 1));
    for (int32_t e = 0; e < 4; e++) {
        load(c, high(1, e));
    }
    CHECK_EQUAL(hb_cache_find(c, high(0, 0), 1), 0);
    CHECK_EQUAL(hb_cache_find(c, high(0, 1), 1), 1);
    CHECK_EQUAL(hb_cache_find(c, high(1, 0), 1), -1);
    CHECK_EQUAL(hb_cache_find(c, high(1, 3), 1), 1);
    hb_cache_free(c);
}

/* --- two precisions --- */

static void copies_of_an_expert_are_cached_by_themselves(void) {
    struct hb_cache *c = shared_pool(26, 2, 4, 8);
    CHECK(load(c, high(0, 5)) >= 0);
    CHECK_EQUAL(hb_cache_peek(c, low(0, 5)), -1);
    CHECK_EQUAL(hb_cache_claim(c, low(0, 5)), 0);
    CHECK_EQUAL(hb_cache_peek(c, low(0, 5)), -1);
    hb_cache_loaded(c, low(0, 5));
    CHECK_EQUAL(hb_cache_peek(c, low(0, 5)), 0);
    CHECK_EQUAL(hb_cache_used(c, 0), 13);
    CHECK_EQUAL(hb_cache_n_ready(c), 2);
    hb_cache_drop(c, high(0, 5));
    CHECK_EQUAL(hb_cache_peek(c, high(0, 5)), -1);
    CHECK_EQUAL(hb_cache_find(c, low(0, 5), 1), 0);
    CHECK_EQUAL(hb_cache_used(c, 0), 3);
    CHECK_EQUAL(hb_cache_evictions(c), 0); /* dropped is not evicted */
    CHECK(hb_cache_is_valid(c));
    hb_cache_free(c);
}

static void peeking_is_no_use(void) {
    struct hb_cache *c = one_pool(2, 4);
    load(c, high(0, 0));
    load(c, high(0, 1));
    CHECK_EQUAL(hb_cache_peek(c, high(0, 0)), 0);
    CHECK_EQUAL(load(c, high(0, 2)), 0); /* expert 0 is still the oldest */
    hb_cache_free(c);
}

static void several_low_copies_go_for_one_high(void) {
    struct hb_cache *c = shared_pool(20, 2, 6, 8);
    for (int32_t e = 0; e < 6; e++) {
        CHECK_EQUAL(load(c, low(0, e)), e);
    }
    CHECK_EQUAL(hb_cache_used(c, 0), 18);
    hb_cache_find(c, low(0, 1), 1); /* the oldest are now 0, 2, 3 */
    CHECK_EQUAL(load(c, high(0, 7)), 0);
    CHECK_EQUAL(hb_cache_used(c, 0), 19); /* two of 3 bytes would not have been enough, four too much */
    for (int32_t e = 0; e < 6; e++) {
        bool gone = e == 0 || e == 2 || e == 3;
        CHECK_EQUAL(hb_cache_peek(c, low(0, e)), gone ? -1 : e);
        CHECK_EQUAL(emptied.slots[0][HOBBIT_LOW][e], gone);
    }
    CHECK(emptied.all == 3 && hb_cache_evictions(c) == 3);
    hb_cache_free(c);
}

static void the_oldest_goes_of_whatever_kind(void) {
    struct hb_cache *c = shared_pool(16, 1, 3, 8);
    load(c, high(0, 0));
    load(c, low(0, 1));
    load(c, low(0, 2));
    CHECK_EQUAL(load(c, low(0, 3)), 2); /* bytes are short, and the high copy is the oldest */
    CHECK_EQUAL(hb_cache_peek(c, high(0, 0)), -1);
    CHECK(emptied.all == 1 && emptied.slots[0][HOBBIT_HIGH][0] == 1);
    CHECK_EQUAL(hb_cache_used(c, 0), 9);
    CHECK_EQUAL(load(c, low(0, 4)), 0); /* slots are short, not bytes: the oldest low one, whose slot is filled again */
    CHECK_EQUAL(hb_cache_peek(c, low(0, 1)), -1);
    CHECK_EQUAL(emptied.all, 1);
    CHECK_EQUAL(hb_cache_evictions(c), 2);
    hb_cache_free(c);
    c = shared_pool(26, 2, 2, 8);
    load(c, low(0, 0));
    load(c, high(0, 1));
    load(c, high(0, 2));
    load(c, low(0, 3));
    CHECK_EQUAL(load(c, high(0, 4)), 0); /* high slots are short: the low copy would not help, though it is older */
    CHECK(hb_cache_peek(c, low(0, 0)) >= 0 && hb_cache_peek(c, high(0, 1)) == -1);
    hb_cache_free(c);
}

static void kept_copies_stay(void) {
    struct hb_cache *c = shared_pool(20, 2, 3, 8);
    load(c, low(0, 0));
    load(c, low(0, 1));
    load(c, high(0, 2));
    hb_cache_keep(c, low(0, 0));
    CHECK(load(c, high(0, 3)) >= 0); /* 1 and 2 go */
    CHECK_EQUAL(hb_cache_peek(c, low(0, 0)), 0);
    CHECK_EQUAL(hb_cache_peek(c, high(0, 2)), -1);
    hb_cache_keep(c, high(0, 3));
    CHECK_EQUAL(hb_cache_claim(c, high(0, 4)), -1); /* 7 bytes are left, whoever goes */
    CHECK(load(c, low(0, 5)) >= 0);
    hb_cache_pin(c, high(0, 3), true);
    hb_cache_pin(c, high(0, 3), false); /* a pin that ends does not end it */
    hb_cache_forget(c);
    CHECK(hb_cache_is_valid(c));
    CHECK_EQUAL(hb_cache_peek(c, low(0, 0)), 0);
    CHECK(hb_cache_peek(c, high(0, 3)) >= 0);
    CHECK_EQUAL(hb_cache_peek(c, low(0, 5)), -1);
    CHECK_EQUAL(hb_cache_used(c, 0), 13);
    hb_cache_drop(c, low(0, 0)); /* given up by hand */
    CHECK(load(c, low(0, 0)) >= 0);
    hb_cache_forget(c);
    CHECK_EQUAL(hb_cache_peek(c, low(0, 0)), -1); /* the copy that was kept is gone: this is another */
    hb_cache_free(c);
}

static void forgetting_leaves_what_is_in_use(void) {
    struct hb_cache *c = shared_pool(40, 3, 6, 8);
    load(c, high(0, 0));
    load(c, high(0, 1));
    load(c, low(0, 2));
    load(c, low(0, 3));
    hb_cache_pin(c, high(0, 1), true);
    hb_cache_pin(c, low(0, 3), true);
    CHECK(hb_cache_claim(c, low(0, 4)) >= 0); /* LOADING */
    hb_cache_forget(c);
    CHECK(hb_cache_is_valid(c));
    CHECK(hb_cache_peek(c, high(0, 0)) == -1 && hb_cache_peek(c, low(0, 2)) == -1);
    CHECK(hb_cache_peek(c, high(0, 1)) >= 0 && hb_cache_peek(c, low(0, 3)) >= 0);
    CHECK_EQUAL(hb_cache_used(c, 0), 16);
    CHECK_EQUAL(hb_cache_n_ready(c), 2);
    CHECK_EQUAL(emptied.all, 0); /* until somebody wants it */
    CHECK_EQUAL(hb_cache_evictions(c), 0);
    hb_cache_loaded(c, low(0, 4));
    CHECK(hb_cache_peek(c, low(0, 4)) >= 0);
    hb_cache_free(c);
}

static void homes_are_kept_while_bytes_are_shared(void) {
    struct hb_cache *c = shared_pool(40, 4, 4, 4);
    CHECK_EQUAL(hb_cache_home(c, 0), 0);
    for (int32_t e = 0; e < 4; e++) {
        load(c, low(0, e));
    }
    for (int32_t e = 3; e >= 1; e--) {
        CHECK_EQUAL(load(c, high(0, e)), e); /* the last evicts a low copy */
    }
    CHECK_EQUAL(emptied.all, 1);
    hb_cache_find(c, low(0, 1), 1);
    hb_cache_find(c, low(0, 2), 1);
    hb_cache_find(c, low(0, 3), 1);
    CHECK_EQUAL(load(c, high(0, 0)), 0); /* the oldest is high, in another slot */
    CHECK(emptied.all == 2 && emptied.slots[0][HOBBIT_HIGH][3] == 1);
    CHECK_EQUAL(hb_cache_used(c, 0), 39);
    hb_cache_free(c);
}

/* --- stress: random operations against a table of what the cache has to hold --- */

#define GROUPS 6
#define POOLS 4
#define EXPERTS 9

static const struct hobbit_pool stress_pools[POOLS] = {
    {.bytes = 60, .slot_bytes = {10, 0}, .n_slots = {6, 0}},
    {.bytes = 187, .slot_bytes = {10, 3}, .n_slots = {2 * EXPERTS, 2 * EXPERTS}}, /* homes */
    {.bytes = 41, .slot_bytes = {10, 7}, .n_slots = {4, 5}},
    {.bytes = 50, .slot_bytes = {20, 3}, .n_slots = {2, 4}}, /* low slots are short sooner than bytes */
};
static const int32_t stress_pool[GROUPS] = {0, 1, 2, 1, 3, 2};
static const int32_t stress_experts[GROUPS] = {EXPERTS, EXPERTS, 4, EXPERTS, 7, 5};

struct entry {
    enum { FREE, LOADING, READY } state;
    int32_t pins;
    bool kept;
    int32_t slot;
    uint64_t used;
};

struct model {
    struct entry entries[GROUPS][EXPERTS][HOBBIT_PRECISIONS];
    bool filled[POOLS][HOBBIT_PRECISIONS][MAX_SLOTS]; /* the slot has memory */
    uint64_t clock, evictions;
};

static struct entry *entry_of(struct model *m, struct hb_key key) {
    return &m->entries[key.group][key.expert][key.precision];
}

#define FOR_EACH_COPY(key, in_pool)                                                     \
    for (struct hb_key key = {0}; key.group < GROUPS; key.group++)                      \
        for (key.expert = 0; key.expert < EXPERTS; key.expert++)                        \
            for (key.precision = 0; key.precision < HOBBIT_PRECISIONS; key.precision++) \
                if (stress_pool[key.group] == (in_pool))

static uint64_t used_bytes(struct model *m, int32_t pool) {
    uint64_t used = 0;
    FOR_EACH_COPY(key, pool) {
        used += entry_of(m, key)->state != FREE ? stress_pools[pool].slot_bytes[key.precision] : 0;
    }
    return used;
}

static int32_t used_slots(struct model *m, int32_t pool, int32_t precision) {
    int32_t n = 0;
    FOR_EACH_COPY(key, pool) {
        n += key.precision == precision && entry_of(m, key)->state != FREE;
    }
    return n;
}

static void empty(struct model *m, struct hb_key key) {
    *entry_of(m, key) = (struct entry) {0};
}

/* The oldest copy that may go. -1: its group is none. */
static struct hb_key oldest(struct model *m, int32_t pool, bool high_too, bool low_too) {
    struct hb_key best = {.group = -1};
    FOR_EACH_COPY(key, pool) {
        const struct entry *e = entry_of(m, key);
        bool may_go = e->state == READY && e->pins == 0 && !e->kept;
        if (may_go && (key.precision == HOBBIT_HIGH ? high_too : low_too) &&
            (best.group < 0 || e->used < entry_of(m, best)->used)) {
            best = key;
        }
    }
    return best;
}

/* Evict what has to go for this copy. The slot it has to get; -1: none, -2: any that was free. */
static int32_t make_room(struct model *m, struct hb_key key, int32_t home) {
    int32_t pool = stress_pool[key.group];
    const struct hobbit_pool *size = &stress_pools[pool];
    uint64_t fixed = size->slot_bytes[key.precision]; /* what has to fit, whatever goes */
    FOR_EACH_COPY(other, pool) {
        const struct entry *e = entry_of(m, other);
        bool may_go = e->state == READY && e->pins == 0 && !e->kept;
        fixed += e->state != FREE && !may_go ? size->slot_bytes[other.precision] : 0;
    }
    if (fixed > size->bytes) {
        return -1; /* nothing goes in vain */
    }
    for (;;) {
        bool slots = home >= 0 || used_slots(m, pool, key.precision) < size->n_slots[key.precision];
        if (slots && used_bytes(m, pool) + size->slot_bytes[key.precision] <= size->bytes) {
            return home >= 0 ? home : -2;
        }
        struct hb_key victim = oldest(m, pool, slots || key.precision == HOBBIT_HIGH,
                                      slots || key.precision == HOBBIT_LOW);
        if (victim.group < 0) {
            return -1;
        }
        m->evictions++;
        if (victim.precision == key.precision && home < 0) { /* its slot and bytes are taken over */
            int32_t slot = entry_of(m, victim)->slot;
            *entry_of(m, victim) = (struct entry) {0};
            return slot;
        }
        empty(m, victim);
    }
}

/* What was given back since the last time was there, and nobody's. */
static void take_memory(struct model *m) {
    for (int32_t pool = 0; pool < POOLS; pool++) {
        for (int32_t p = 0; p < HOBBIT_PRECISIONS; p++) {
            for (int32_t s = 0; s < MAX_SLOTS; s++) {
                CHECK(emptied.slots[pool][p][s] <= m->filled[pool][p][s]);
                m->filled[pool][p][s] = m->filled[pool][p][s] && emptied.slots[pool][p][s] == 0;
            }
        }
    }
    memset(emptied.slots, 0, sizeof emptied.slots);
}

/* Every copy has its memory, and all memory together is within the pool's bytes. */
static void check_memory(struct model *m, int32_t pool) {
    uint64_t bytes = 0;
    for (int32_t p = 0; p < HOBBIT_PRECISIONS; p++) {
        for (int32_t s = 0; s < MAX_SLOTS; s++) {
            bytes += m->filled[pool][p][s] ? stress_pools[pool].slot_bytes[p] : 0;
        }
    }
    CHECK(bytes <= stress_pools[pool].bytes);
    FOR_EACH_COPY(key, pool) {
        const struct entry *e = entry_of(m, key);
        CHECK(e->state == FREE || m->filled[pool][key.precision][e->slot]);
    }
}

static void claim(struct model *m, struct hb_cache *c, struct hb_key key) {
    int32_t pool = stress_pool[key.group], home = key.precision == HOBBIT_HIGH ? hb_cache_home(c, key.group) : -1;
    CHECK_EQUAL(home, key.precision == HOBBIT_HIGH && pool == 1 ? (key.group == 1 ? 0 : EXPERTS) : -1);
    bool room = hb_cache_has_room(c, key);
    uint64_t evictions = m->evictions;
    int32_t expected = make_room(m, key, home >= 0 ? home + key.expert : -1);
    CHECK_EQUAL(room, expected != -1 && m->evictions == evictions);
    int32_t slot = hb_cache_claim(c, key);
    CHECK(expected == -2 ? slot >= 0 && slot < stress_pools[pool].n_slots[key.precision] : slot == expected);
    if (slot >= 0) {
        FOR_EACH_COPY(other, pool) { /* nobody else has it */
            const struct entry *e = entry_of(m, other);
            CHECK(other.precision != key.precision || e->state == FREE || e->slot != slot);
        }
        *entry_of(m, key) = (struct entry) {LOADING, 1, false, slot, ++m->clock};
        take_memory(m);
        m->filled[pool][key.precision][slot] = true;
    }
}

static void forget(struct model *m, struct hb_cache *c) {
    hb_cache_forget(c);
    for (int32_t pool = 0; pool < POOLS; pool++) {
        for (struct hb_key key = oldest(m, pool, true, true); key.group >= 0; key = oldest(m, pool, true, true)) {
            empty(m, key);
        }
    }
}

static void check_state(struct model *m, const struct hb_cache *c) {
    int32_t ready = 0;
    CHECK(hb_cache_is_valid(c));
    for (int32_t pool = 0; pool < POOLS; pool++) {
        CHECK_EQUAL(hb_cache_used(c, pool), used_bytes(m, pool));
        CHECK(hb_cache_used(c, pool) <= stress_pools[pool].bytes);
        FOR_EACH_COPY(key, pool) {
            if (key.expert < stress_experts[key.group]) {
                bool is_ready = entry_of(m, key)->state == READY;
                ready += is_ready;
                CHECK_EQUAL(hb_cache_peek(c, key), is_ready ? entry_of(m, key)->slot : -1);
                CHECK_EQUAL(hb_cache_slot(c, key),
                            entry_of(m, key)->state != FREE ? entry_of(m, key)->slot : -1);
            }
        }
    }
    CHECK_EQUAL(hb_cache_n_ready(c), ready);
    CHECK_EQUAL(hb_cache_evictions(c), m->evictions);
    take_memory(m);
    for (int32_t pool = 0; pool < POOLS; pool++) {
        check_memory(m, pool);
    }
}

static void step(struct model *m, struct hb_cache *c, bool keeps, uint64_t *seed) {
    int32_t group = (int32_t) check_random(seed, GROUPS);
    struct hb_key key = high(group, (int32_t) check_random(seed, (uint32_t) stress_experts[group]));
    if (stress_pools[stress_pool[group]].n_slots[HOBBIT_LOW] > 0) {
        key.precision = (int32_t) check_random(seed, HOBBIT_PRECISIONS);
    }
    struct entry *entry = entry_of(m, key);
    if (check_random(seed, 500) == 0) {
        forget(m, c);
    }
    int32_t found = hb_cache_find(c, key, 1);
    CHECK_EQUAL(found, entry->state == READY ? entry->slot : -1);
    if (entry->state != FREE) {
        entry->used = ++m->clock;
    }
    if (entry->state == FREE) {
        claim(m, c, key);
    } else if (check_random(seed, entry->state == LOADING ? 4 : 40) == 0) {
        hb_cache_drop(c, key);
        empty(m, key);
    } else if (entry->state == LOADING) {
        hb_cache_loaded(c, key);
        entry->state = READY;
    } else if (keeps && check_random(seed, 200) == 0) {
        hb_cache_keep(c, key);
        entry->kept = true;
    } else if (check_random(seed, 4) == 0) {
        hb_cache_pin(c, key, true);
        entry->pins++;
    } else if (entry->pins > 0) {
        hb_cache_pin(c, key, false);
        entry->pins--;
    }
}

static void random_operations_keep_the_invariants(void) {
    uint64_t seed = 1;
    for (int round = 0; round < 20; round++) {
        struct model m = {0};
        struct hb_cache *c = new_cache(POOLS, stress_pools, GROUPS, stress_experts, stress_pool);
        CHECK(c != NULL);
        for (int i = 0; i < 4000; i++) {
            step(&m, c, round % 3 == 0, &seed);
            check_state(&m, c);
        }
        CHECK(m.evictions > 300 && emptied.all > 50);
        hb_cache_free(c);
    }
}

static void every_failed_allocation_is_survived(void) {
    struct hb_cache *c = NULL;
    int n = 0;
    while (c == NULL) {
        atomic_store(&faults_allocation, ++n);
        c = new_cache(POOLS, stress_pools, GROUPS, stress_experts, stress_pool);
    }
    atomic_store(&faults_allocation, 0);
    CHECK(n > 2 * POOLS + 2 * GROUPS);
    CHECK(hb_cache_is_valid(c));
    hb_cache_free(c);
    hb_cache_free(NULL);
}

int main(void) {
    RUN(evicts_the_least_recently_used);
    RUN(pinned_slots_stay);
    RUN(pins_are_counted);
    RUN(loading_slots_are_neither_found_nor_evicted);
    RUN(a_dropped_copy_frees_its_slot);
    RUN(complete_pools_have_home_slots);
    RUN(pools_do_not_evict_each_other);
    RUN(copies_of_an_expert_are_cached_by_themselves);
    RUN(peeking_is_no_use);
    RUN(several_low_copies_go_for_one_high);
    RUN(the_oldest_goes_of_whatever_kind);
    RUN(kept_copies_stay);
    RUN(forgetting_leaves_what_is_in_use);
    RUN(homes_are_kept_while_bytes_are_shared);
    RUN(random_operations_keep_the_invariants);
    RUN(every_failed_allocation_is_survived);
    return 0;
}
