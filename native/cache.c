#include "cache.h"

#include <stdlib.h>

#include "heap.h"

#define NONE (-1)

enum state { FREE, LOADING, READY };

struct slot {
    enum state state;
    int32_t pins;
    bool kept;      /* never evicted */
    int32_t class;  /* of the heap that it is in, or NONE: only what may be evicted is in one */
    uint64_t stamp; /* the use counter when it was claimed or used last: decides between equals */
    struct hb_key key; /* valid unless FREE */
};

/* The slots of one precision. */
struct bank {
    int32_t n_slots;
    uint64_t slot_bytes;
    struct slot *slots;
    struct hb_heap_node *nodes; /* one a slot */
    int32_t *heaps;             /* one a class of the policy */
    int32_t *free;              /* stack of FREE slots, the lowest on top at first; unused where slots have homes */
    int32_t n_free, n_filled;   /* the n_filled uppermost still have the memory of what they held */
};

struct pool {
    uint64_t bytes, used; /* used: by slots that are not FREE */
    uint64_t evictable;   /* of them, by those that may be evicted */
    int32_t n_experts;
    struct bank banks[HOBBIT_PRECISIONS];
};

struct group {
    int32_t pool, n_experts;
    int32_t home; /* where its experts would lie in a bank that holds all of them, in order */
    uint64_t passes; /* how often it was computed */
    int32_t *slot_of[HOBBIT_PRECISIONS]; /* expert -> slot in the bank, or NONE */
    int32_t first_expert;                /* of the expert's number in the records */
    struct hb_usage *usage;              /* one an expert, in the records */
};

struct hb_cache {
    int32_t n_pools, n_groups;
    struct pool *pools;
    struct group *groups;
    struct hb_records *records; /* of all experts, in the order of the groups */
    hb_cache_emptied *emptied;
    void *context;
    struct hobbit_policy policy;
    int32_t n_classes;
    struct hb_moment now;
    uint64_t *seen; /* now.seen */
    int32_t n_ready;
    uint64_t uses, evictions;
};

static bool add_bank(struct bank *bank) {
    size_t n = (size_t) bank->n_slots;
    bank->slots = calloc(n + 1, sizeof *bank->slots);
    bank->nodes = calloc(n + 1, sizeof *bank->nodes);
    bank->free = calloc(n + 1, sizeof *bank->free);
    if (bank->slots == NULL || bank->nodes == NULL || bank->free == NULL) {
        return false;
    }
    for (int32_t i = bank->n_slots - 1; i >= 0; i--) {
        bank->free[bank->n_free++] = i;
    }
    return true;
}

static bool add_pool(struct pool *pool, const struct hobbit_pool *size) {
    pool->bytes = size->bytes;
    bool good = true;
    for (int32_t p = 0; p < HOBBIT_PRECISIONS; p++) {
        pool->banks[p] = (struct bank) {.n_slots = size->n_slots[p], .slot_bytes = size->slot_bytes[p]};
        good = good && add_bank(&pool->banks[p]);
    }
    return good;
}

static bool add_group(struct hb_cache *c, struct group *group, int32_t n_experts, int32_t pool) {
    group->pool = pool;
    group->n_experts = n_experts;
    group->home = c->pools[pool].n_experts;
    c->pools[pool].n_experts += n_experts;
    bool good = true;
    for (int32_t p = 0; good && p < HOBBIT_PRECISIONS; p++) {
        group->slot_of[p] = malloc((size_t) n_experts * sizeof *group->slot_of[p]);
        good = group->slot_of[p] != NULL;
        for (int32_t e = 0; good && e < n_experts; e++) {
            group->slot_of[p][e] = NONE;
        }
    }
    return good;
}

static bool add_records(struct hb_cache *c) {
    int32_t n_experts = 0;
    for (int32_t i = 0; i < c->n_groups; i++) {
        c->groups[i].first_expert = n_experts;
        n_experts += c->groups[i].n_experts;
    }
    c->records = hb_records_new(n_experts);
    for (int32_t i = 0; i < c->n_groups && c->records != NULL; i++) {
        c->groups[i].usage = hb_records_sums(c->records) + c->groups[i].first_expert;
    }
    return c->records != NULL;
}

struct hb_cache *hb_cache_new(int32_t n_pools, const struct hobbit_pool *pools, int32_t n_groups,
                              const int32_t *experts_of_group, const int32_t *pool_of_group,
                              hb_cache_emptied *emptied, void *context) {
    struct hb_cache *c = calloc(1, sizeof *c);
    if (c == NULL) {
        return NULL;
    }
    c->emptied = emptied;
    c->context = context;
    c->seen = calloc((size_t) n_groups, sizeof *c->seen);
    c->now.n_groups = n_groups;
    c->now.seen = c->seen;
    c->pools = calloc((size_t) n_pools, sizeof *c->pools);
    c->groups = calloc((size_t) n_groups, sizeof *c->groups);
    bool good = c->pools != NULL && c->groups != NULL && c->seen != NULL;
    for (int32_t i = 0; good && i < n_pools; i++) {
        good = add_pool(&c->pools[c->n_pools++], &pools[i]);
    }
    for (int32_t i = 0; good && i < n_groups; i++) {
        good = add_group(c, &c->groups[c->n_groups++], experts_of_group[i], pool_of_group[i]);
    }
    if (!good || !add_records(c) || !hb_cache_set_policy(c, &(struct hobbit_policy) {.kind = HOBBIT_POLICY_LRU})) {
        hb_cache_free(c);
        return NULL;
    }
    return c;
}

void hb_cache_free(struct hb_cache *c) {
    if (c == NULL) {
        return;
    }
    for (int32_t i = 0; i < c->n_groups; i++) {
        for (int32_t p = 0; p < HOBBIT_PRECISIONS; p++) {
            free(c->groups[i].slot_of[p]);
        }
    }
    for (int32_t i = 0; i < c->n_pools; i++) {
        for (int32_t p = 0; p < HOBBIT_PRECISIONS; p++) {
            struct bank *bank = &c->pools[i].banks[p];
            free(bank->slots);
            free(bank->nodes);
            free(bank->heaps);
            free(bank->free);
        }
    }
    hb_records_free(c->records);
    free(c->groups);
    free(c->pools);
    free(c->seen);
    free(c);
}

static struct pool *pool_of(const struct hb_cache *c, struct hb_key key) {
    return &c->pools[c->groups[key.group].pool];
}

static struct bank *bank_of(const struct hb_cache *c, struct hb_key key) {
    return &pool_of(c, key)->banks[key.precision];
}

static struct slot *slot_of(const struct hb_cache *c, struct hb_key key) {
    return &bank_of(c, key)->slots[c->groups[key.group].slot_of[key.precision][key.expert]];
}

/* --- the order of eviction --- */

static bool is_evictable(const struct slot *slot) {
    return slot->state == READY && slot->pins == 0 && !slot->kept;
}

/* Put it where the policy has it now, if it may be evicted, and nowhere if not. */
static void rank(struct hb_cache *c, struct pool *pool, struct bank *bank, int32_t index) {
    struct slot *slot = &bank->slots[index];
    if (slot->class != NONE) {
        hb_heap_remove(bank->nodes, &bank->heaps[slot->class], index);
        pool->evictable -= bank->slot_bytes;
        slot->class = NONE;
    }
    if (is_evictable(slot)) {
        const struct group *g = &c->groups[slot->key.group];
        const struct hb_usage *usage = &g->usage[slot->key.expert];
        slot->class = hb_policy_class(&c->policy, usage, slot->key.group, g->passes);
        bank->nodes[index].tie = slot->stamp;
        bank->nodes[index].key = hb_policy_key(&c->policy, usage);
        hb_heap_insert(bank->nodes, &bank->heaps[slot->class], index);
        pool->evictable += bank->slot_bytes;
    }
}

static void rank_key(struct hb_cache *c, struct hb_key key) {
    int32_t index = c->groups[key.group].slot_of[key.precision][key.expert];
    if (index != NONE) {
        rank(c, pool_of(c, key), bank_of(c, key), index);
    }
}

static void rank_all(struct hb_cache *c) {
    for (int32_t i = 0; i < c->n_pools; i++) {
        for (int32_t p = 0; p < HOBBIT_PRECISIONS; p++) {
            for (int32_t s = 0; s < c->pools[i].banks[p].n_slots; s++) {
                rank(c, &c->pools[i], &c->pools[i].banks[p], s);
            }
        }
    }
}

bool hb_cache_set_policy(struct hb_cache *c, const struct hobbit_policy *policy) {
    int32_t n_classes = hb_policy_classes(policy, c->n_groups);
    bool good = true;
    for (int32_t i = 0; good && i < c->n_pools; i++) {
        for (int32_t p = 0; good && p < HOBBIT_PRECISIONS; p++) {
            struct bank *bank = &c->pools[i].banks[p];
            int32_t n = n_classes > c->n_classes ? n_classes : c->n_classes;
            int32_t *heaps = realloc(bank->heaps, (size_t) n * sizeof *heaps);
            good = heaps != NULL;
            bank->heaps = good ? heaps : bank->heaps;
        }
    }
    if (!good) {
        return false;
    }
    for (int32_t i = 0; i < c->n_pools; i++) {
        c->pools[i].evictable = 0;
        for (int32_t p = 0; p < HOBBIT_PRECISIONS; p++) {
            struct bank *bank = &c->pools[i].banks[p];
            for (int32_t k = 0; k < n_classes; k++) {
                bank->heaps[k] = HB_HEAP_NONE;
            }
            for (int32_t s = 0; s < bank->n_slots; s++) {
                bank->slots[s].class = NONE;
            }
        }
    }
    c->policy = *policy;
    c->n_classes = n_classes;
    rank_all(c);
    return true;
}

/* A copy that may go, and its place in the order. */
struct victim {
    struct hb_key key;
    double score;
    uint64_t tie;
    bool found;
};

static void consider(const struct hb_cache *c, const struct bank *bank, struct victim *victim) {
    for (int32_t k = 0; k < c->n_classes; k++) {
        int32_t index = bank->heaps[k];
        if (index == HB_HEAP_NONE) {
            continue;
        }
        const struct hb_heap_node *node = &bank->nodes[index];
        double score = hb_policy_score(&c->policy, k, node->key, &c->now);
        if (!victim->found || score < victim->score || (score == victim->score && node->tie < victim->tie)) {
            *victim = (struct victim) {bank->slots[index].key, score, node->tie, true};
        }
    }
}

/* --- time --- */

void hb_cache_begin(struct hb_cache *c, int32_t group, int32_t n_tokens) {
    if (c->now.token == 0 || group < c->now.group || c->n_groups == 1) {
        c->now.token += (uint64_t) n_tokens;
    }
    c->now.group = group;
    c->seen[group] = c->now.token;
    struct group *g = &c->groups[group];
    g->passes++;
    for (int32_t e = 0; e < g->n_experts && hb_policy_moves_used(&c->policy); e++) {
        if (g->usage[e].last_pass > 0 && g->usage[e].last_pass + 1 == g->passes) {
            for (int32_t p = 0; p < HOBBIT_PRECISIONS; p++) {
                rank_key(c, (struct hb_key) {group, e, p});
            }
        }
    }
}

bool hb_cache_add_sequence(struct hb_cache *c, int32_t sequence) {
    return hb_records_add(c->records, sequence);
}

void hb_cache_reset(struct hb_cache *c, int32_t sequence) {
    if (hb_records_end(c->records, &c->policy, sequence, &c->now)) {
        rank_all(c);
    }
}

/* --- copies --- */

int32_t hb_cache_slot(const struct hb_cache *c, struct hb_key key) {
    return c->groups[key.group].slot_of[key.precision][key.expert];
}

int32_t hb_cache_peek(const struct hb_cache *c, struct hb_key key) {
    int32_t index = hb_cache_slot(c, key);
    return index == NONE || slot_of(c, key)->state != READY ? NONE : index;
}

int32_t hb_cache_find(struct hb_cache *c, struct hb_key key, int32_t n_pairs) {
    return hb_cache_find_shared(c, key, &(struct hb_share) {.n_pairs = n_pairs}, 1);
}

int32_t hb_cache_find_shared(struct hb_cache *c, struct hb_key key, const struct hb_share *shares, int32_t n_shares) {
    const struct group *g = &c->groups[key.group];
    hb_records_use(c->records, &c->policy, g->first_expert + key.expert, key.precision, shares, n_shares, g->passes,
                   &c->now);
    c->uses++;
    if (hb_cache_slot(c, key) != NONE) {
        slot_of(c, key)->stamp = c->uses;
    }
    rank_key(c, key);
    rank_key(c, (struct hb_key) {key.group, key.expert, 1 - key.precision});
    return hb_cache_peek(c, key);
}

void hb_cache_set_next_use(struct hb_cache *c, struct hb_key key, uint64_t when) {
    c->groups[key.group].usage[key.expert].next_use = when;
}

int32_t hb_cache_home(const struct hb_cache *c, int32_t group) {
    const struct group *g = &c->groups[group];
    const struct pool *pool = &c->pools[g->pool];
    return pool->banks[HOBBIT_HIGH].n_slots >= pool->n_experts ? g->home : NONE;
}

static bool has_home(const struct hb_cache *c, struct hb_key key) {
    return key.precision == HOBBIT_HIGH && hb_cache_home(c, key.group) != NONE;
}

bool hb_cache_has_room(const struct hb_cache *c, struct hb_key key) {
    const struct pool *pool = pool_of(c, key);
    const struct bank *bank = bank_of(c, key);
    return pool->used + bank->slot_bytes <= pool->bytes && (has_home(c, key) || bank->n_free > 0);
}

bool hb_cache_is_worth_it(const struct hb_cache *c, struct hb_key key) {
    const struct group *g = &c->groups[key.group];
    const struct hb_usage *usage = &g->usage[key.expert];
    struct victim victim = {.found = false};
    if (hb_cache_has_room(c, key)) {
        return true;
    }
    consider(c, bank_of(c, key), &victim);
    int32_t class = hb_policy_class(&c->policy, usage, key.group, g->passes);
    double score = hb_policy_score(&c->policy, class, hb_policy_key(&c->policy, usage), &c->now);
    return victim.found && victim.score < score - (double) c->policy.w_fld;
}

/* Forget the copy; the slot keeps its bytes until it is filled again or emptied. */
static int32_t detach(struct hb_cache *c, struct hb_key key) {
    struct slot *slot = slot_of(c, key);
    int32_t *place = &c->groups[key.group].slot_of[key.precision][key.expert], index = *place;
    c->n_ready -= slot->state == READY;
    slot->state = FREE;
    rank(c, pool_of(c, key), bank_of(c, key), index);
    *place = NONE;
    return index;
}

void hb_cache_drop(struct hb_cache *c, struct hb_key key) {
    int32_t pool = c->groups[key.group].pool;
    struct bank *bank = bank_of(c, key);
    int32_t index = detach(c, key);
    c->pools[pool].used -= bank->slot_bytes;
    if (has_home(c, key)) {
        c->emptied(c->context, pool, key.precision, index);
    } else {
        bank->free[bank->n_free++] = index;
        bank->n_filled++; /* memory that was never touched costs far more to read into: keep it while nobody wants it */
    }
}

static uint64_t filled_bytes(const struct pool *pool) {
    const struct bank *banks = pool->banks;
    return (uint64_t) banks[HOBBIT_HIGH].n_filled * banks[HOBBIT_HIGH].slot_bytes +
           (uint64_t) banks[HOBBIT_LOW].n_filled * banks[HOBBIT_LOW].slot_bytes;
}

/* A FREE slot of the bank; what other FREE slots still have goes, as far as its memory is too much beside it. */
static int32_t take_free(struct hb_cache *c, int32_t pool_index, int32_t precision, int32_t home) {
    struct pool *pool = &c->pools[pool_index];
    struct bank *bank = &pool->banks[precision], *other = &pool->banks[1 - precision];
    pool->used += bank->slot_bytes;
    if (home == NONE && bank->n_filled > 0) {
        bank->n_filled--;
        return bank->free[--bank->n_free];
    }
    while (pool->used + filled_bytes(pool) > pool->bytes && other->n_filled > 0) {
        int32_t lowest = other->free[other->n_free - other->n_filled--];
        c->emptied(c->context, pool_index, 1 - precision, lowest);
    }
    return home != NONE ? home : bank->free[--bank->n_free];
}

/* A FREE slot whose bytes are counted as used: evicts what has to go, and nothing if that is not enough. */
static int32_t make_room(struct hb_cache *c, struct hb_key key) {
    struct pool *pool = pool_of(c, key);
    struct bank *bank = bank_of(c, key);
    if (pool->used + bank->slot_bytes > pool->bytes + pool->evictable) {
        return NONE;
    }
    for (;;) {
        bool has_slot = has_home(c, key) || bank->n_free > 0;
        if (has_slot && pool->used + bank->slot_bytes <= pool->bytes) {
            int32_t home = has_home(c, key) ? c->groups[key.group].home + key.expert : NONE;
            return take_free(c, c->groups[key.group].pool, key.precision, home);
        }
        struct victim victim = {.found = false};
        consider(c, bank, &victim);
        if (has_slot) { /* bytes are short, not slots: either kind may go */
            consider(c, &pool->banks[1 - key.precision], &victim);
        }
        if (!victim.found) {
            return NONE;
        }
        c->evictions++;
        if (victim.key.precision == key.precision && !has_home(c, key)) {
            return detach(c, victim.key);
        }
        hb_cache_drop(c, victim.key);
    }
}

int32_t hb_cache_claim(struct hb_cache *c, struct hb_key key) {
    int32_t index = make_room(c, key);
    if (index != NONE) {
        bank_of(c, key)->slots[index] =
            (struct slot) {.state = LOADING, .pins = 1, .class = NONE, .stamp = ++c->uses, .key = key};
        c->groups[key.group].slot_of[key.precision][key.expert] = index;
    }
    return index;
}

void hb_cache_loaded(struct hb_cache *c, struct hb_key key) {
    slot_of(c, key)->state = READY;
    c->n_ready++;
}

void hb_cache_forget(struct hb_cache *c) {
    for (int32_t i = 0; i < c->n_pools; i++) {
        for (int32_t p = 0; p < HOBBIT_PRECISIONS; p++) {
            struct bank *bank = &c->pools[i].banks[p];
            for (int32_t s = 0; s < bank->n_slots; s++) {
                if (is_evictable(&bank->slots[s])) {
                    hb_cache_drop(c, bank->slots[s].key);
                }
            }
        }
    }
}

void hb_cache_pin(struct hb_cache *c, struct hb_key key, bool pinned) {
    slot_of(c, key)->pins += pinned ? 1 : -1;
    rank_key(c, key);
}

bool hb_cache_is_pinned(const struct hb_cache *c, struct hb_key key) {
    return slot_of(c, key)->pins > 0;
}

void hb_cache_keep(struct hb_cache *c, struct hb_key key) {
    slot_of(c, key)->kept = true;
    rank_key(c, key);
}

uint64_t hb_cache_slot_bytes(const struct hb_cache *c, int32_t group) {
    return c->pools[c->groups[group].pool].banks[HOBBIT_HIGH].slot_bytes;
}

int32_t hb_cache_n_experts(const struct hb_cache *c, int32_t group) {
    return c->groups[group].n_experts;
}

int32_t hb_cache_n_ready(const struct hb_cache *c) {
    return c->n_ready;
}

uint64_t hb_cache_used(const struct hb_cache *c, int32_t pool) {
    return c->pools[pool].used;
}

uint64_t hb_cache_evictions(const struct hb_cache *c) {
    return c->evictions;
}

/* What one bank's slots hold, added up. */
struct held {
    uint64_t used, evictable;
    int64_t slots, ready;
};

static bool slot_is_valid(const struct hb_cache *c, int32_t pool, int32_t precision, int32_t index) {
    const struct slot *slot = &c->pools[pool].banks[precision].slots[index];
    const struct group *g = &c->groups[slot->key.group];
    return g->pool == pool && slot->key.precision == precision && g->slot_of[precision][slot->key.expert] == index &&
           slot->stamp <= c->uses && slot->pins >= 0 && (slot->state != LOADING || slot->pins > 0) &&
           (slot->class != NONE) == is_evictable(slot);
}

static bool add_held(const struct hb_cache *c, int32_t pool, int32_t precision, struct held *held) {
    const struct bank *bank = &c->pools[pool].banks[precision];
    for (int32_t s = 0; s < bank->n_slots; s++) {
        if (bank->slots[s].state == FREE) {
            continue;
        }
        if (!slot_is_valid(c, pool, precision, s)) {
            return false;
        }
        held->used += bank->slot_bytes;
        held->evictable += is_evictable(&bank->slots[s]) ? bank->slot_bytes : 0;
        held->slots++;
        held->ready += bank->slots[s].state == READY;
    }
    return true;
}

bool hb_cache_is_valid(const struct hb_cache *c) {
    int64_t slots = 0, mapped = 0, ready = 0;
    for (int32_t i = 0; i < c->n_pools; i++) {
        const struct pool *pool = &c->pools[i];
        struct held held = {0};
        if (!add_held(c, i, HOBBIT_HIGH, &held) || !add_held(c, i, HOBBIT_LOW, &held) || held.used != pool->used ||
            held.evictable != pool->evictable || pool->used + filled_bytes(pool) > pool->bytes) {
            return false;
        }
        slots += held.slots;
        ready += held.ready;
    }
    for (int32_t i = 0; i < c->n_groups; i++) {
        for (int32_t e = 0; e < c->groups[i].n_experts; e++) {
            for (int32_t p = 0; p < HOBBIT_PRECISIONS; p++) {
                mapped += c->groups[i].slot_of[p][e] != NONE;
            }
        }
    }
    return slots == mapped && ready == c->n_ready;
}
