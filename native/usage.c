/* How often each expert is used, and the copies that are read before they are asked for because of it. */
#include <stdlib.h>
#include <string.h>

#include "model_impl.h"

/* Reads under way at a time: enough to keep the disk busy until the next settle, and so few that a close, which waits
 * for them, is prompt. One is always allowed. */
#define WARM_AT_ONCE 8
#define WARM_BYTES ((uint64_t) 32 << 20)

void hobbit_model_usage(struct hobbit_model *m, uint64_t *counts) {
    hb_model_lock(m);
    memcpy(counts, m->used, (size_t) m->catalog.n_experts * sizeof *counts);
    hb_model_unlock(m);
}

void hb_model_count(struct hobbit_model *m, int32_t group, bool hit) {
    struct hb_look_ups *of_group = &m->look_ups[group];
    atomic_fetch_add(hit ? &m->counters.hits : &m->counters.misses, 1);
    atomic_fetch_add(hit ? &of_group->hits : &of_group->misses, 1);
}

void hobbit_model_look_ups(const struct hobbit_model *m, uint64_t *hits, uint64_t *misses) {
    for (int32_t i = 0; i < m->catalog.n_groups; i++) {
        hits[i] = atomic_load(&m->look_ups[i].hits);
        misses[i] = atomic_load(&m->look_ups[i].misses);
    }
}

/* Whether a read would evict nothing. A nested high copy may need room for its low one too. */
static bool fits(const struct hobbit_model *m, struct hb_key key) {
    struct hb_key low = hb_key_in(key, HOBBIT_LOW);
    if (!hb_cache_has_room(m->cache, key)) {
        return false;
    }
    if (!m->catalog.groups[key.group].copies[HOBBIT_HIGH].nested || hb_cache_slot(m->cache, low) >= 0) {
        return true;
    }
    int32_t pool = m->pool_of_group[key.group];
    const struct hb_bank *banks = m->pools[pool].banks;
    uint64_t both = banks[HOBBIT_HIGH].arena.slot_bytes + banks[HOBBIT_LOW].arena.slot_bytes;
    return hb_cache_has_room(m->cache, low) && hb_cache_used(m->cache, pool) + both <= m->pools[pool].bytes;
}

void hb_model_warm_on(struct hobbit_model *m) {
    while (m->next_warm < m->n_warm && m->in_background < WARM_AT_ONCE) {
        struct hb_key key = m->warm[m->next_warm];
        uint64_t bytes = hb_model_arena(m, key.group, HOBBIT_HIGH).slot_bytes;
        if (m->in_background > 0 && (uint64_t) (m->in_background + 1) * bytes > WARM_BYTES) {
            return;
        }
        if (hb_cache_slot(m->cache, key) < 0 && !hb_model_is_there(m, key) && fits(m, key)) {
            (void) hb_model_start_read(m, key, true);
        }
        m->next_warm++;
    }
}

static bool exist(const struct hobbit_model *m, const int32_t *groups, const int32_t *experts, int32_t n) {
    for (int32_t i = 0; i < n; i++) {
        if (groups[i] < 0 || groups[i] >= m->catalog.n_groups || experts[i] < 0 ||
            experts[i] >= m->catalog.groups[groups[i]].n_expert) {
            return false;
        }
    }
    return m->cache != NULL && n >= 0;
}

int32_t hobbit_model_warm(struct hobbit_model *m, const int32_t *groups, const int32_t *experts, int32_t n, char *err,
                          size_t err_len) {
    if (!exist(m, groups, experts, n)) {
        snprintf(err, err_len, "the model has no cache yet, or not these experts");
        return HOBBIT_ARG;
    }
    struct hb_key *list = calloc((size_t) n + 1, sizeof *list);
    if (list == NULL) {
        snprintf(err, err_len, "out of memory");
        return HOBBIT_NOMEM;
    }
    for (int32_t i = 0; i < n; i++) {
        list[i] = (struct hb_key) {groups[i], experts[i], HOBBIT_HIGH};
    }
    hb_model_lock(m);
    struct hb_key *old = m->warm;
    m->warm = list;
    m->n_warm = n;
    m->next_warm = 0;
    hb_model_warm_on(m);
    hb_model_unlock(m);
    free(old);
    return HOBBIT_OK;
}

int32_t hobbit_model_settle(struct hobbit_model *m) {
    if (!hb_model_try_lock(m)) {
        return 1;
    }
    if (m->cache != NULL) {
        hb_model_settle(m);
    }
    int32_t left = m->n_warm - m->next_warm + m->in_background;
    hb_model_unlock(m);
    return left;
}
