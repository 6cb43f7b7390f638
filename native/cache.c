#include "cache.h"

#include <stdlib.h>

#define NONE (-1)

/* The slots of one precision. */
struct bank {
    int32_t n_slots;
    uint64_t slot_bytes;
    struct hb_slot *slots;
};

struct pool {
    uint64_t bytes, used; /* used: by slots that are not FREE */
    int32_t n_experts;
    struct bank banks[HOBBIT_PRECISIONS];
};

struct group {
    int32_t pool, n_experts;
    int32_t home; /* where its experts would lie in a bank that holds all of them, in order */
    int32_t *slot_of[HOBBIT_PRECISIONS]; /* expert -> slot in the bank, or NONE */
};

struct hb_cache {
    int32_t n_pools, n_groups;
    struct pool *pools;
    struct group *groups;
    hb_cache_emptied *emptied;
    void *context;
    int32_t n_ready;
    uint64_t uses, evictions;
};

static bool add_pool(struct pool *pool, const struct hobbit_pool *size) {
    pool->bytes = size->bytes;
    for (int32_t p = 0; p < HOBBIT_PRECISIONS; p++) {
        pool->banks[p] = (struct bank) {size->n_slots[p], size->slot_bytes[p], NULL};
        if (size->n_slots[p] > 0) {
            pool->banks[p].slots = calloc((size_t) size->n_slots[p], sizeof *pool->banks[p].slots);
            if (pool->banks[p].slots == NULL) {
                return false;
            }
        }
    }
    return true;
}

static bool add_group(struct hb_cache *c, struct group *group, int32_t n_experts, int32_t pool) {
    group->pool = pool;
    group->n_experts = n_experts;
    group->home = c->pools[pool].n_experts;
    c->pools[pool].n_experts += n_experts;
    for (int32_t p = 0; p < HOBBIT_PRECISIONS; p++) {
        group->slot_of[p] = malloc((size_t) n_experts * sizeof *group->slot_of[p]);
        if (group->slot_of[p] == NULL) {
            return false;
        }
        for (int32_t e = 0; e < n_experts; e++) {
            group->slot_of[p][e] = NONE;
        }
    }
    return true;
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
    c->pools = calloc((size_t) n_pools, sizeof *c->pools);
    c->groups = calloc((size_t) n_groups, sizeof *c->groups);
    bool good = c->pools != NULL && c->groups != NULL;
    for (int32_t i = 0; good && i < n_pools; i++) {
        good = add_pool(&c->pools[c->n_pools++], &pools[i]);
    }
    for (int32_t i = 0; good && i < n_groups; i++) {
        good = add_group(c, &c->groups[c->n_groups++], experts_of_group[i], pool_of_group[i]);
    }
    if (!good) {
        hb_cache_free(c);
        return NULL;
    }
    return c;
}

void hb_cache_free(struct hb_cache *c) {
    if (c == NULL) {
        return;
    }
    for (int32_t p = 0; p < HOBBIT_PRECISIONS; p++) {
        for (int32_t i = 0; i < c->n_groups; i++) {
            free(c->groups[i].slot_of[p]);
        }
        for (int32_t i = 0; i < c->n_pools; i++) {
            free(c->pools[i].banks[p].slots);
        }
    }
    free(c->groups);
    free(c->pools);
    free(c);
}

static struct hb_slot *slot_of(const struct hb_cache *c, struct hb_key key) {
    const struct group *g = &c->groups[key.group];
    return &c->pools[g->pool].banks[key.precision].slots[g->slot_of[key.precision][key.expert]];
}

int32_t hb_cache_peek(const struct hb_cache *c, struct hb_key key) {
    int32_t index = c->groups[key.group].slot_of[key.precision][key.expert];
    return index == NONE || slot_of(c, key)->state != HB_SLOT_READY ? NONE : index;
}

int32_t hb_cache_slot(const struct hb_cache *c, struct hb_key key) {
    return c->groups[key.group].slot_of[key.precision][key.expert];
}

int32_t hb_cache_find(struct hb_cache *c, struct hb_key key) {
    int32_t index = hb_cache_peek(c, key);
    if (index != NONE) {
        slot_of(c, key)->usage.last_use = ++c->uses;
    }
    return index;
}

static bool is_evictable(const struct hb_slot *slot) {
    return slot->state == HB_SLOT_READY && slot->pins == 0 && !slot->kept;
}

/* The READY slot that goes first: of this bank, or of `best` if that goes before. */
static const struct hb_slot *first_to_go(const struct bank *bank, const struct hb_slot *best) {
    for (int32_t i = 0; i < bank->n_slots; i++) {
        const struct hb_slot *slot = &bank->slots[i];
        if (is_evictable(slot) && (best == NULL || hb_policy_score(&slot->usage) < hb_policy_score(&best->usage))) {
            best = slot;
        }
    }
    return best;
}

static int32_t free_slot(const struct bank *bank) {
    for (int32_t i = 0; i < bank->n_slots; i++) {
        if (bank->slots[i].state == HB_SLOT_FREE) {
            return i;
        }
    }
    return NONE;
}

bool hb_cache_has_room(const struct hb_cache *c, struct hb_key key) {
    const struct pool *pool = &c->pools[c->groups[key.group].pool];
    const struct bank *bank = &pool->banks[key.precision];
    return pool->used + bank->slot_bytes <= pool->bytes && free_slot(bank) != NONE;
}

/* Forget the copy; the slot keeps its bytes until it is filled again or emptied. */
static int32_t detach(struct hb_cache *c, struct hb_key key) {
    struct hb_slot *slot = slot_of(c, key);
    int32_t *index = &c->groups[key.group].slot_of[key.precision][key.expert], was = *index;
    c->n_ready -= slot->state == HB_SLOT_READY;
    *slot = (struct hb_slot) {.state = HB_SLOT_FREE};
    *index = NONE;
    return was;
}

void hb_cache_drop(struct hb_cache *c, struct hb_key key) {
    int32_t pool = c->groups[key.group].pool;
    int32_t index = detach(c, key);
    c->pools[pool].used -= c->pools[pool].banks[key.precision].slot_bytes;
    c->emptied(c->context, pool, key.precision, index);
}

int32_t hb_cache_home(const struct hb_cache *c, int32_t group) {
    const struct group *g = &c->groups[group];
    const struct pool *pool = &c->pools[g->pool];
    return pool->banks[HOBBIT_HIGH].n_slots >= pool->n_experts ? g->home : NONE;
}

static uint64_t evictable_bytes(const struct pool *pool) {
    uint64_t bytes = 0;
    for (int32_t p = 0; p < HOBBIT_PRECISIONS; p++) {
        for (int32_t i = 0; i < pool->banks[p].n_slots; i++) {
            bytes += is_evictable(&pool->banks[p].slots[i]) ? pool->banks[p].slot_bytes : 0;
        }
    }
    return bytes;
}

/* A FREE slot whose bytes are counted as used: evicts what has to go, and nothing if that is not enough. */
static int32_t make_room(struct hb_cache *c, struct hb_key key, int32_t home) {
    struct pool *pool = &c->pools[c->groups[key.group].pool];
    struct bank *bank = &pool->banks[key.precision];
    if (pool->used + bank->slot_bytes > pool->bytes &&
        pool->used + bank->slot_bytes > pool->bytes + evictable_bytes(pool)) {
        return NONE;
    }
    for (;;) {
        int32_t index = home != NONE ? home : free_slot(bank);
        if (index != NONE && pool->used + bank->slot_bytes <= pool->bytes) {
            pool->used += bank->slot_bytes;
            return index;
        }
        const struct hb_slot *victim = first_to_go(bank, NULL);
        if (index != NONE) { /* bytes are short, not slots: either kind may go */
            victim = first_to_go(&pool->banks[1 - key.precision], victim);
        }
        if (victim == NULL) {
            return NONE;
        }
        c->evictions++;
        if (victim->key.precision == key.precision && home == NONE) {
            return detach(c, victim->key);
        }
        hb_cache_drop(c, victim->key);
    }
}

int32_t hb_cache_claim(struct hb_cache *c, struct hb_key key) {
    struct group *g = &c->groups[key.group];
    int32_t home = key.precision == HOBBIT_HIGH ? hb_cache_home(c, key.group) : NONE;
    int32_t index = make_room(c, key, home != NONE ? home + key.expert : NONE);
    if (index != NONE) {
        c->pools[g->pool].banks[key.precision].slots[index] =
            (struct hb_slot) {HB_SLOT_LOADING, 1, false, key, {++c->uses}};
        g->slot_of[key.precision][key.expert] = index;
    }
    return index;
}

void hb_cache_loaded(struct hb_cache *c, struct hb_key key) {
    slot_of(c, key)->state = HB_SLOT_READY;
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
}

void hb_cache_keep(struct hb_cache *c, struct hb_key key) {
    slot_of(c, key)->kept = true;
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

bool hb_cache_is_valid(const struct hb_cache *c) {
    int64_t held = 0, mapped = 0, ready = 0;
    for (int32_t i = 0; i < c->n_pools; i++) {
        uint64_t used = 0;
        for (int32_t p = 0; p < HOBBIT_PRECISIONS; p++) {
            const struct bank *bank = &c->pools[i].banks[p];
            for (int32_t s = 0; s < bank->n_slots; s++) {
                const struct hb_slot *slot = &bank->slots[s];
                if (slot->state == HB_SLOT_FREE) {
                    continue;
                }
                const struct group *g = &c->groups[slot->key.group];
                if (g->pool != i || slot->key.precision != p || g->slot_of[p][slot->key.expert] != s ||
                    slot->usage.last_use > c->uses || slot->pins < 0 ||
                    (slot->state == HB_SLOT_LOADING && slot->pins == 0)) {
                    return false;
                }
                used += bank->slot_bytes;
                held++;
                ready += slot->state == HB_SLOT_READY;
            }
        }
        if (used != c->pools[i].used || used > c->pools[i].bytes) {
            return false;
        }
    }
    for (int32_t i = 0; i < c->n_groups; i++) {
        for (int32_t e = 0; e < c->groups[i].n_experts; e++) {
            for (int32_t p = 0; p < HOBBIT_PRECISIONS; p++) {
                mapped += c->groups[i].slot_of[p][e] != NONE;
            }
        }
    }
    return held == mapped && ready == c->n_ready;
}
