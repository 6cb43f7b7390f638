/* Copies on their way into the cache: reads, arrivals, and nested planes that are merged. */
#include <errno.h>
#include <stdlib.h>

#include "model_impl.h"
#include "nested.h"

static struct hb_bank *bank_of(const struct hobbit_model *m, struct hb_key key) {
    return &m->pools[m->pool_of_group[key.group]].banks[key.precision];
}

static void set_piece(const struct hobbit_model *m, struct hb_piece *piece, const struct hb_matrix *matrix,
                      int32_t expert, char *slot) {
    *piece = (struct hb_piece) {
        .file = &m->catalog.files[matrix->file],
        .file_index = matrix->file,
        .bounce = matrix->bounce,
        .offset = matrix->offset + (uint64_t) expert * matrix->file_bytes,
        .length = matrix->file_bytes,
        .dst = slot + matrix->load_offset,
    };
}

static char *slot_data(const struct hobbit_model *m, struct hb_key key, int32_t slot) {
    struct hb_arena arena = bank_of(m, key)->arena;
    return arena.base + (uint64_t) slot * arena.slot_bytes;
}

static void add_pieces(const struct hobbit_model *m, struct hb_job *job, struct hb_key key, char *data) {
    const struct hb_copy *copy = &m->catalog.groups[key.group].copies[key.precision];
    for (int32_t i = 0; i < copy->n_matrices; i++) {
        set_piece(m, &job->pieces[job->n_pieces++], copy->matrices[i], key.expert, data);
    }
}

/* On a reader's thread: the planes of a nested high copy become its matrices. */
static void merge_planes(struct hb_job *job) {
    const struct hb_load *load = job->owner;
    const struct hb_copy *copies = load->nested->copies;
    for (int32_t i = 0; i < copies[HOBBIT_HIGH].n_matrices; i++) {
        const struct hb_matrix *high = copies[HOBBIT_HIGH].matrices[i], *low = copies[HOBBIT_LOW].matrices[i];
        hb_nested_merge(load->low_data + low->slot_offset, load->data + high->load_offset,
                        load->data + high->slot_offset, high->expert_bytes / HB_Q8_0_BLOCK);
    }
}

/* Pin the low copy that a nested high one is made from, or claim a slot to read it into. False: not now. */
static bool claim_low(struct hobbit_model *m, struct hb_key key, bool *with_low) {
    struct hb_key low = hb_key_in(key, HOBBIT_LOW);
    int32_t slot = hb_cache_peek(m->cache, low);
    *with_low = slot < 0;
    if (slot >= 0) {
        hb_cache_pin(m->cache, low, true);
        return true;
    }
    return hb_cache_slot(m->cache, low) < 0 && hb_cache_claim(m->cache, low) >= 0;
}

static void give_up_low(struct hobbit_model *m, struct hb_key key, bool with_low) {
    if (with_low) {
        hb_cache_drop(m->cache, hb_key_in(key, HOBBIT_LOW));
    } else {
        hb_cache_pin(m->cache, hb_key_in(key, HOBBIT_LOW), false);
    }
}

/* What was predicted is used. */
static void count_used(struct hobbit_model *m, struct hb_load *load) {
    atomic_fetch_add(&m->counters.ahead_used, load->ahead);
    load->ahead = false;
}

static void count_ahead(struct hobbit_model *m, uint64_t bytes, bool wasted) {
    atomic_fetch_add(&m->counters.ahead_bytes, wasted ? 0 : bytes);
    atomic_fetch_add(&m->counters.ahead_wasted_bytes, wasted ? bytes : 0);
}

/* What the slot held before was read ahead in vain, if nobody has used it. */
static void count_unused(struct hobbit_model *m, struct hb_load *load) {
    if (load->ahead) {
        count_ahead(m, m->catalog.groups[load->key.group].copies[load->key.precision].expert_bytes, true);
        load->ahead = false;
    }
}

/* False when too much is pinned or under way. The copy has no slot yet. */
bool hb_model_start_read(struct hobbit_model *m, struct hb_key key, bool background) {
    const struct hb_group *group = &m->catalog.groups[key.group];
    bool nested = group->copies[key.precision].nested, with_low = false;
    if (nested && !claim_low(m, key, &with_low)) {
        return false;
    }
    int32_t slot = hb_cache_claim(m->cache, key);
    atomic_store(&m->counters.evictions, m->evicted_before + hb_cache_evictions(m->cache));
    if (slot < 0) {
        if (nested) {
            give_up_low(m, key, with_low);
        }
        return false;
    }
    struct hb_load *load = &bank_of(m, key)->loads[slot];
    count_unused(m, load);
    *load = (struct hb_load) {.key = key, .slot = slot, .under_way = true, .background = background,
                              .nested = nested ? group : NULL, .with_low = with_low, .data = slot_data(m, key, slot)};
    load->job.owner = load;
    add_pieces(m, &load->job, key, load->data);
    if (nested) {
        struct hb_key low = hb_key_in(key, HOBBIT_LOW);
        load->low_data = slot_data(m, low, hb_cache_slot(m->cache, low));
        load->job.finish = merge_planes;
        if (with_low) {
            count_unused(m, &bank_of(m, low)->loads[hb_cache_slot(m->cache, low)]);
            add_pieces(m, &load->job, low, load->low_data);
        }
    }
    *(background ? &m->in_background : &m->in_foreground) += 1;
    hb_reader_submit(m->reader, &load->job, background ? HB_AHEAD : HB_DEMAND);
    return true;
}

void hb_model_begin(struct hobbit_model *m, int32_t group, int32_t n_tokens, int32_t most) {
    if (group < m->pass.group || m->catalog.n_groups == 1) {
        hb_model_note_pass(m, n_tokens);
        hb_model_give_up(m, -1); /* of a pass that was broken off */
    }
    if (m->tier != NULL) {
        hb_tier_begin(m->tier, group, n_tokens, group < m->pass.group || m->catalog.n_groups == 1);
    }
    m->pass.group = group;
    m->pass.last_rows = group + 1 == m->catalog.n_groups ? n_tokens : m->pass.last_rows;
    hb_model_unprotect(m, group);
    hb_cache_begin(m->cache, group, most);
}

int32_t hb_model_look_up(struct hobbit_model *m, struct hb_key key, const struct hb_share *shares, int32_t n_shares) {
    int32_t slot = hb_cache_find_shared(m->cache, key, shares, n_shares);
    m->used[hb_model_number(m, key)]++;
    hb_model_count(m, key.group, slot >= 0);
    if (slot >= 0) {
        hb_cache_pin(m->cache, key, true);
        count_used(m, &bank_of(m, key)->loads[slot]);
    } else {
        if (key.precision == HOBBIT_HIGH && hb_model_has(m, (struct hb_key) {key.group, key.expert, HOBBIT_LOW})) {
            atomic_fetch_add(&m->counters.promotions, 1);
        }
    }
    return slot;
}

static enum hb_fetch try_fetch(struct hobbit_model *m, struct hb_key key, int32_t *slot) {
    int32_t ready = hb_cache_peek(m->cache, key);
    if (ready >= 0) {
        hb_cache_pin(m->cache, key, true);
        *slot = ready;
        return HB_FETCH_READY;
    }
    int32_t claimed = hb_cache_slot(m->cache, key);
    if (claimed < 0) {
        return hb_model_start_read(m, key, false) ? HB_FETCH_STARTED : HB_FETCH_WAIT;
    }
    struct hb_load *load = &bank_of(m, key)->loads[claimed];
    if (load->under_way && load->background) {
        if (!hb_reader_promote(m->reader, &load->job)) {
            return HB_FETCH_WAIT; /* it was given up, and has not ended yet */
        }
        load->background = false; /* wait for it after all */
        count_used(m, load);
        m->in_background--;
        m->in_foreground++;
        return HB_FETCH_STARTED;
    }
    return HB_FETCH_WAIT; /* a low copy that is being read with its high one, or a read that was given up */
}

void hb_model_drop_replaced(struct hobbit_model *m, struct hb_key key) {
    struct hb_key high = hb_key_in(key, HOBBIT_HIGH), low = hb_key_in(key, HOBBIT_LOW);
    bool replaces = !m->rule.deterministic && !m->low_kept && hb_cache_peek(m->cache, high) >= 0;
    if (replaces && hb_cache_peek(m->cache, low) >= 0 && !hb_cache_is_pinned(m->cache, low)) {
        hb_cache_drop(m->cache, low); /* promoted: see hb_model_choose */
    }
}

static void count_arrival(struct hobbit_model *m, struct hb_key key, bool background) {
    if (key.precision == HOBBIT_LOW) {
        uint64_t bytes = m->catalog.groups[key.group].copies[HOBBIT_LOW].expert_bytes;
        atomic_fetch_add(&m->counters.read_low_bytes, bytes);
        return;
    }
    if (!background) { /* not the low one of a copy that nobody asked for: it may be in use soon */
        hb_model_drop_replaced(m, key);
    }
}

/* The low copy that a nested high one was made from is a copy like others now. */
static void release_low(struct hobbit_model *m, const struct hb_load *load) {
    if (load->job.error != 0) {
        give_up_low(m, load->key, load->with_low);
        return;
    }
    if (load->with_low) {
        hb_cache_loaded(m->cache, hb_key_in(load->key, HOBBIT_LOW));
    }
    hb_cache_pin(m->cache, hb_key_in(load->key, HOBBIT_LOW), false);
}

/* False when the read failed. */
static bool take_in(struct hobbit_model *m, struct hb_load *load) {
    const struct hb_job *job = &load->job;
    load->under_way = false;
    if (load->nested != NULL) {
        release_low(m, load);
    }
    if (load->ahead) {
        count_ahead(m, job->done, false);
    }
    if (job->error == 0) {
        hb_cache_loaded(m->cache, load->key);
        count_arrival(m, load->key, load->background);
    } else {
        /* Nobody waits for a background read: if it matters, the same read fails in the foreground. */
        if (job->error != ECANCELED && !load->background) {
            hb_model_read_failed(m, job->error, job->error_file, job->error_offset);
        }
        hb_cache_drop(m->cache, load->key);
        count_ahead(m, load->ahead ? job->done : 0, true);
        load->ahead = false;
        atomic_fetch_add(&m->counters.read_low_bytes, load->key.precision == HOBBIT_LOW ? job->done : 0);
    }
    *(load->background ? &m->in_background : &m->in_foreground) -= 1;
    if (load->background && job->error == 0) {
        hb_cache_pin(m->cache, load->key, false);
    }
    atomic_store(&m->counters.cached, (uint64_t) hb_cache_n_ready(m->cache));
    return job->error == 0;
}

void hb_model_end_background(struct hobbit_model *m) {
    hb_model_give_up(m, -1);
    m->n_wanted = 0;
    m->next_warm = m->n_warm;
    hb_reader_withdraw(m->reader);
    while (m->in_background > 0) {
        struct hb_job *job = hb_reader_next(m->reader, true);
        (void) take_in(m, job->owner);
    }
}

void hb_model_settle(struct hobbit_model *m) {
    (void) hb_model_take_uploads(m, false);
    for (; m->n_wanted > 0; m->n_wanted--) {
        struct hb_key key = m->wanted[m->n_wanted - 1];
        if (hb_cache_slot(m->cache, key) < 0 && hb_model_start_read(m, key, true)) {
            atomic_fetch_add(&m->counters.promotions, 1);
        }
    }
    while (m->in_background > 0) {
        struct hb_job *job = hb_reader_next(m->reader, false);
        if (job == NULL) {
            break;
        }
        (void) take_in(m, job->owner);
    }
    hb_model_warm_on(m);
}

enum hb_fetch hb_model_fetch(struct hobbit_model *m, struct hb_key key, int32_t *slot) {
    for (;;) {
        enum hb_fetch fetched = try_fetch(m, key, slot);
        if (fetched == HB_FETCH_WAIT && hb_model_take_uploads(m, false)) {
            continue; /* they had copies pinned */
        }
        if (fetched != HB_FETCH_WAIT || m->in_foreground > 0 || m->in_background == 0) {
            return fetched;
        }
        /* What is in the way may be reads that nobody waits for. */
        uint64_t start = hb_now_ns();
        struct hb_job *job = hb_reader_next(m->reader, true);
        atomic_fetch_add(&m->counters.stall_ns, hb_now_ns() - start);
        (void) take_in(m, job->owner);
    }
}

struct hb_arrival hb_model_arrival(struct hobbit_model *m, bool wait) {
    for (;;) {
        struct hb_job *job = hb_reader_next(m->reader, false);
        if (job == NULL && wait) {
            uint64_t start = hb_now_ns();
            job = hb_reader_next(m->reader, true);
            atomic_fetch_add(&m->counters.stall_ns, hb_now_ns() - start);
        }
        if (job == NULL) {
            return (struct hb_arrival) {.key = {.expert = -1}};
        }
        struct hb_load *load = job->owner;
        bool background = load->background, good = take_in(m, load);
        if (!background) {
            return (struct hb_arrival) {load->key, load->slot, !good};
        }
    }
}

void hb_model_release(struct hobbit_model *m, struct hb_key key) {
    hb_cache_pin(m->cache, key, false);
}

void hb_model_withdraw(struct hobbit_model *m) {
    hb_reader_withdraw(m->reader);
}

/* Reads the low copies of a group, a few at a time. The caller holds the lock; nothing is read in the background. */
static bool keep_group(struct hobbit_model *m, int32_t group) {
    int32_t n_expert = m->catalog.groups[group].n_expert, next = 0, under_way = 0;
    bool good = true;
    while ((good && next < n_expert) || under_way > 0) {
        struct hb_key key = {group, next, HOBBIT_LOW};
        if (good && next < n_expert && under_way < 2 * HB_DEFAULT_IO_THREADS) {
            if (hb_model_has(m, (struct hb_key) {group, next, HOBBIT_LOW})) {
                hb_cache_keep(m->cache, key);
            } else if (hb_model_start_read(m, key, false)) {
                under_way++;
            } else {
                hb_model_fail(m, "the low-precision experts do not fit the cache");
                good = false;
            }
            next++;
            continue;
        }
        struct hb_arrival a = hb_model_arrival(m, true);
        under_way--;
        if (a.failed) {
            good = false;
        } else {
            hb_model_release(m, a.key);
            hb_cache_keep(m->cache, a.key);
        }
    }
    return good;
}

int32_t hobbit_model_keep_low(struct hobbit_model *m, char *err, size_t err_len) {
    hb_model_lock(m);
    hb_model_end_uploads(m);
    bool good = m->cache != NULL;
    for (int32_t g = 0; good && g < m->catalog.n_groups; g++) {
        good = m->catalog.groups[g].copies[HOBBIT_LOW].n_matrices > 0;
    }
    if (!good) {
        hb_model_unlock(m);
        snprintf(err, err_len, "the model was loaded without low-precision experts");
        return HOBBIT_ARG;
    }
    if (good && m->asked_at == NULL) {
        m->asked_at = calloc((size_t) m->catalog.n_experts, sizeof *m->asked_at);
        if (m->asked_at == NULL) {
            hb_model_fail(m, "out of memory");
            good = false;
        }
    }
    hb_model_end_background(m);
    for (int32_t g = 0; good && g < m->catalog.n_groups; g++) {
        good = keep_group(m, g);
    }
    m->low_kept = good;
    hb_model_unlock(m);
    if (!good) {
        hobbit_model_take_error(m, err, err_len);
        return HOBBIT_IO;
    }
    return HOBBIT_OK;
}
