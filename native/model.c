#include "model.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "gguf_stream.h"
#include "nested.h"
#include "schedule.h"

#define DEFAULT_IO_THREADS 4
#define ERROR_BYTES 512

/* The reading of one copy into one slot. */
struct load {
    struct hb_job job;
    struct hb_key key;
    int32_t slot;
    bool background; /* nobody waits for it */
    /* Of a nested high copy: the low one that it is made from, pinned; `with_low` when it is read by the same job. */
    const struct hb_group *nested;
    bool with_low;
    char *data, *low_data;
};

struct bank {
    struct hb_arena arena;
    struct load *loads; /* one a slot, so that nothing is allocated while decoding */
};

struct pool {
    void *space;
    size_t space_bytes;
    struct bank banks[HOBBIT_PRECISIONS];
};

struct hobbit_model {
    struct hb_catalog catalog;
    struct hobbit_extent *extents; /* `data` of memory extents is ours */
    int32_t n_extents;
    struct hb_reader *reader;
    struct hb_cache *cache; /* NULL until the arena is allocated */
    struct pool *pools;
    int32_t *pool_of_group;
    int32_t n_pools;
    uint64_t cache_bytes;
    struct hb_rule rule;
    struct range {
        double sum;
        uint64_t n;
    } *ranges; /* one a group: of the router's logits */
    uint16_t *in_vain; /* one an expert: how often its high copy was needed since it was read last */
    struct hb_gathered gathered;
    struct hb_schedule *schedule; /* recorded or replayed, or NULL */
    bool low_kept;
    uint64_t **asked_at; /* [group][expert], with low_kept: when a missing high copy was asked for last */
    uint64_t asks;
    int32_t in_background;
    pthread_mutex_t lock;       /* see model.h */
    pthread_mutex_t error_lock; /* guards `error` */
    char error[ERROR_BYTES];
    struct hb_counters counters;
    const int32_t *cancelled; /* the caller's, or NULL */
};

static enum hobbit_status copy_extents(struct hobbit_model *m, const struct hobbit_options *o) {
    m->extents = calloc((size_t) o->n_extents, sizeof *m->extents);
    if (m->extents == NULL) {
        return HOBBIT_NOMEM;
    }
    uint64_t end = 0;
    for (; m->n_extents < o->n_extents; m->n_extents++) {
        const struct hobbit_extent *from = &o->extents[m->n_extents];
        struct hobbit_extent *e = &m->extents[m->n_extents];
        bool in_file = from->source != HOBBIT_SOURCE_FILE || (from->file >= 0 && from->file < o->n_files);
        if (from->offset != end || from->length == 0 || !in_file ||
            __builtin_add_overflow(end, from->length, &end) || end > INT64_MAX) {
            return HOBBIT_FORMAT;
        }
        *e = *from;
        e->data = NULL;
        if (from->source == HOBBIT_SOURCE_MEMORY) {
            void *data = malloc(from->length);
            if (data == NULL) {
                return HOBBIT_NOMEM;
            }
            e->data = memcpy(data, from->data, from->length);
        }
    }
    return HOBBIT_OK;
}

int32_t hobbit_model_open(const struct hobbit_options *o, struct hobbit_model **out, char *err, size_t err_len) {
    snprintf(err, err_len, "out of memory");
    if (o->n_files < 1 || o->n_matrices < 1 || o->n_groups < 1 || o->n_extents < 1) {
        snprintf(err, err_len, "a streamed model needs files, extents, groups and matrices");
        return HOBBIT_ARG;
    }
    struct hobbit_model *m = calloc(1, sizeof *m);
    if (m == NULL) {
        return HOBBIT_NOMEM;
    }
    m->cancelled = o->cancelled;
    pthread_mutex_init(&m->lock, NULL);
    pthread_mutex_init(&m->error_lock, NULL);
    enum hobbit_status status = hb_catalog_open(&m->catalog, o, err, err_len);
    if (status == HOBBIT_OK) {
        status = copy_extents(m, o);
        if (status == HOBBIT_FORMAT) {
            snprintf(err, err_len, "the extents of the virtual file do not follow one another");
        }
    }
    if (status == HOBBIT_OK) {
        int error = hb_reader_open(&m->reader, o->io_threads > 0 ? o->io_threads : DEFAULT_IO_THREADS);
        if (error != 0) {
            snprintf(err, err_len, "cannot start reader threads: %s", strerror(error));
            status = HOBBIT_NOMEM;
        }
    }
    if (status != HOBBIT_OK) {
        hobbit_model_close(m);
        return status;
    }
    *out = m;
    return HOBBIT_OK;
}

uint64_t hobbit_model_slot_bytes(const struct hobbit_model *m, int32_t group, int32_t precision) {
    return m->catalog.groups[group].copies[precision].slot_bytes;
}

/* A high copy of any of its experts has to fit, and what is cached has to stay within the bytes. */
static bool pool_fits(const struct hobbit_pool *pool, uint64_t *total) {
    uint64_t space;
    bool good = pool->n_slots[HOBBIT_HIGH] > 0 && pool->n_slots[HOBBIT_LOW] >= 0 &&
                pool->bytes >= pool->slot_bytes[HOBBIT_HIGH];
    for (int32_t p = 0; good && p < HOBBIT_PRECISIONS; p++) {
        good = pool->slot_bytes[p] % HB_PAGE == 0 &&
               !__builtin_mul_overflow(pool->slot_bytes[p], (uint64_t) pool->n_slots[p], &space) &&
               space <= pool->bytes;
    }
    return good && !__builtin_add_overflow(*total, pool->bytes, total) && *total <= SIZE_MAX / 4;
}

static bool pools_fit(const struct hobbit_model *m, const struct hobbit_pool *pools, int32_t n_pools,
                      const int32_t *pool_of_group) {
    uint64_t total = 0;
    for (int32_t i = 0; i < n_pools; i++) {
        if (!pool_fits(&pools[i], &total)) {
            return false;
        }
    }
    for (int32_t g = 0; g < m->catalog.n_groups; g++) {
        const struct hb_copy *copies = m->catalog.groups[g].copies;
        int32_t i = pool_of_group[g];
        if (i < 0 || i >= n_pools || pools[i].slot_bytes[HOBBIT_HIGH] < copies[HOBBIT_HIGH].slot_bytes ||
            pools[i].slot_bytes[HOBBIT_LOW] < copies[HOBBIT_LOW].slot_bytes ||
            (copies[HOBBIT_LOW].n_matrices > 0 && pools[i].n_slots[HOBBIT_LOW] < 1)) {
            return false;
        }
    }
    return true;
}

static void slot_emptied(void *context, int32_t pool, int32_t precision, int32_t slot) {
    const struct hobbit_model *m = context;
    struct hb_arena arena = m->pools[pool].banks[precision].arena;
    hb_space_drop(arena.base + (uint64_t) slot * arena.slot_bytes, arena.slot_bytes);
}

static enum hobbit_status new_cache(struct hobbit_model *m, const struct hobbit_pool *pools) {
    int32_t n_groups = m->catalog.n_groups;
    int32_t *experts = calloc((size_t) n_groups, sizeof *experts);
    if (experts != NULL) {
        for (int32_t g = 0; g < n_groups; g++) {
            experts[g] = m->catalog.groups[g].n_expert;
        }
        m->cache = hb_cache_new(m->n_pools, pools, n_groups, experts, m->pool_of_group, slot_emptied, m);
    }
    free(experts);
    return m->cache != NULL ? HOBBIT_OK : HOBBIT_NOMEM;
}

static void release_arena(struct hobbit_model *m) {
    hb_cache_free(m->cache);
    m->cache = NULL;
    for (int32_t i = 0; m->pools != NULL && i < m->n_pools; i++) {
        for (int32_t p = 0; p < HOBBIT_PRECISIONS; p++) {
            free(m->pools[i].banks[p].loads);
        }
        hb_space_release(m->pools[i].space, m->pools[i].space_bytes);
    }
    free(m->pools);
    m->pools = NULL;
    free(m->pool_of_group);
    m->pool_of_group = NULL;
}

/* Address space for both banks side by side: together they may be larger than the pool's bytes, which the cache keeps
 * to. Where they share, a slot's memory must come and go by itself, and huge pages would keep it. */
static bool new_pool(struct pool *pool, const struct hobbit_pool *size) {
    bool shared = size->n_slots[HOBBIT_LOW] > 0;
    for (int32_t p = 0; p < HOBBIT_PRECISIONS; p++) {
        pool->space_bytes += size->slot_bytes[p] * (uint64_t) size->n_slots[p];
    }
    if (hb_space_map(&pool->space, pool->space_bytes, !shared) != 0) {
        pool->space = NULL;
        return false;
    }
    char *base = pool->space;
    for (int32_t p = 0; p < HOBBIT_PRECISIONS; p++) {
        struct bank *bank = &pool->banks[p];
        bank->arena = (struct hb_arena) {base, size->slot_bytes[p], size->n_slots[p]};
        base += size->slot_bytes[p] * (uint64_t) size->n_slots[p];
        bank->loads = calloc((size_t) size->n_slots[p] + 1, sizeof *bank->loads);
        if (bank->loads == NULL) {
            return false;
        }
    }
    return true;
}

int32_t hobbit_model_allocate(struct hobbit_model *m, const struct hobbit_pool *pools, int32_t n_pools,
                              const int32_t *pool_of_group, char *err, size_t err_len) {
    if (m->cache != NULL || n_pools < 1 || !pools_fit(m, pools, n_pools, pool_of_group)) {
        snprintf(err, err_len, "the pools do not fit the model's experts");
        return HOBBIT_ARG;
    }
    enum hobbit_status status = HOBBIT_NOMEM;
    size_t groups_bytes = (size_t) m->catalog.n_groups * sizeof *m->pool_of_group;
    m->n_pools = n_pools;
    m->pools = calloc((size_t) n_pools, sizeof *m->pools);
    m->pool_of_group = malloc(groups_bytes);
    m->cache_bytes = 0;
    bool good = m->pools != NULL && m->pool_of_group != NULL;
    for (int32_t i = 0; good && i < n_pools; i++) {
        m->cache_bytes += pools[i].bytes;
        good = new_pool(&m->pools[i], &pools[i]);
    }
    if (good) {
        memcpy(m->pool_of_group, pool_of_group, groups_bytes);
        status = new_cache(m, pools);
    }
    if (status != HOBBIT_OK) {
        release_arena(m);
        snprintf(err, err_len, "no memory for an expert cache of %llu bytes", (unsigned long long) m->cache_bytes);
    }
    return status;
}

static bool thresholds_fit(const struct hobbit_model *m, const struct hobbit_rule *rule, char *err, size_t err_len) {
    for (int32_t g = 0; g < m->catalog.n_groups; g++) {
        float t1 = rule->t1[g], t2 = rule->t2[g];
        if (!(t1 <= t2)) {
            snprintf(err, err_len, "T1 is %g and T2 is %g: T1 must not be above T2", (double) t1, (double) t2);
            return false;
        }
        bool never_low = t1 == t2 || t1 >= 1;
        if (!never_low && m->catalog.groups[g].copies[HOBBIT_LOW].n_matrices == 0) {
            snprintf(err, err_len, "the model was loaded without low-precision experts");
            return false;
        }
    }
    return true;
}

int32_t hobbit_model_set_rule(struct hobbit_model *m, const struct hobbit_rule *rule, char *err, size_t err_len) {
    bool active = rule->t1 != NULL && rule->t2 != NULL;
    if ((rule->t1 == NULL) != (rule->t2 == NULL) || rule->experts < 0 || rule->patience < 0 ||
        rule->patience > UINT16_MAX || !(rule->substitute >= 0)) {
        snprintf(err, err_len, "the rule has a number that makes no sense");
        return HOBBIT_ARG;
    }
    if (active && !thresholds_fit(m, rule, err, err_len)) {
        return HOBBIT_ARG;
    }
    size_t bytes = (size_t) m->catalog.n_groups * sizeof *rule->t1;
    if (m->ranges == NULL) {
        m->ranges = calloc((size_t) m->catalog.n_groups, sizeof *m->ranges);
        m->in_vain = calloc((size_t) m->catalog.n_experts, sizeof *m->in_vain);
    }
    if (m->ranges == NULL || m->in_vain == NULL) {
        snprintf(err, err_len, "out of memory");
        return HOBBIT_NOMEM;
    }
    struct hb_rule new = {active, rule->deterministic != 0, rule->renormalise != 0,
                          rule->per_token != 0 && rule->deterministic != 0, rule->patience, rule->experts, rule->substitute,
                          NULL, NULL};
    if (active) {
        new.t1 = malloc(bytes);
        new.t2 = malloc(bytes);
        if (new.t1 == NULL || new.t2 == NULL) {
            free(new.t1);
            free(new.t2);
            snprintf(err, err_len, "out of memory");
            return HOBBIT_NOMEM;
        }
        memcpy(new.t1, rule->t1, bytes);
        memcpy(new.t2, rule->t2, bytes);
    }
    hb_model_lock(m);
    struct hb_rule old = m->rule;
    m->rule = new;
    hb_model_unlock(m);
    free(old.t1);
    free(old.t2);
    return HOBBIT_OK;
}

static bool is_cached(const struct hobbit_model *m, int32_t group, int32_t expert, int32_t precision) {
    return hb_cache_peek(m->cache, (struct hb_key) {group, expert, precision}) >= 0;
}

static int32_t set_schedule(struct hobbit_model *m, struct hb_schedule *schedule, const char *path, char *err,
                            size_t err_len) {
    if (schedule == NULL) {
        snprintf(err, err_len, "%s: %s", path, errno != 0 ? strerror(errno) : "is not a precision schedule");
        return errno != 0 ? HOBBIT_IO : HOBBIT_FORMAT;
    }
    hb_model_lock(m);
    struct hb_schedule *old = m->schedule;
    m->schedule = schedule;
    hb_model_unlock(m);
    (void) hb_schedule_close(old);
    return HOBBIT_OK;
}

int32_t hobbit_model_record(struct hobbit_model *m, const char *path, const char *note, char *err, size_t err_len) {
    return set_schedule(m, hb_schedule_create(path, note), path, err, err_len);
}

int32_t hobbit_model_replay(struct hobbit_model *m, const char *path, char *err, size_t err_len) {
    return set_schedule(m, hb_schedule_open(path), path, err, err_len);
}

int32_t hobbit_model_schedule_end(struct hobbit_model *m, char *err, size_t err_len) {
    hb_model_lock(m);
    struct hb_schedule *schedule = m->schedule;
    m->schedule = NULL;
    hb_model_unlock(m);
    if (!hb_schedule_close(schedule)) {
        snprintf(err, err_len, "the precision schedule cannot be written: %s", strerror(errno));
        return HOBBIT_IO;
    }
    return HOBBIT_OK;
}

static struct bank *bank_of(const struct hobbit_model *m, struct hb_key key) {
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
    const struct load *load = job->owner;
    const struct hb_copy *copies = load->nested->copies;
    for (int32_t i = 0; i < copies[HOBBIT_HIGH].n_matrices; i++) {
        const struct hb_matrix *high = copies[HOBBIT_HIGH].matrices[i], *low = copies[HOBBIT_LOW].matrices[i];
        hb_nested_merge(load->low_data + low->slot_offset, load->data + high->load_offset, load->data + high->slot_offset,
                        high->expert_bytes / HB_Q8_0_BLOCK);
    }
}

static struct hb_key low_of(struct hb_key key) {
    return (struct hb_key) {key.group, key.expert, HOBBIT_LOW};
}

/* Pin the low copy that a nested high one is made from, or claim a slot to read it into. False: not now. */
static bool claim_low(struct hobbit_model *m, struct hb_key key, bool *with_low) {
    struct hb_key low = low_of(key);
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
        hb_cache_drop(m->cache, low_of(key));
    } else {
        hb_cache_pin(m->cache, low_of(key), false);
    }
}

/* False when too much is pinned or under way. The copy has no slot yet. */
static bool start_read(struct hobbit_model *m, struct hb_key key, bool background) {
    const struct hb_group *group = &m->catalog.groups[key.group];
    bool nested = group->copies[key.precision].nested, with_low = false;
    if (nested && !claim_low(m, key, &with_low)) {
        return false;
    }
    int32_t slot = hb_cache_claim(m->cache, key);
    atomic_store(&m->counters.evictions, hb_cache_evictions(m->cache));
    if (slot < 0) {
        if (nested) {
            give_up_low(m, key, with_low);
        }
        return false;
    }
    struct load *load = &bank_of(m, key)->loads[slot];
    *load = (struct load) {.key = key, .slot = slot, .background = background, .nested = nested ? group : NULL,
                           .with_low = with_low, .data = slot_data(m, key, slot)};
    load->job.owner = load;
    add_pieces(m, &load->job, key, load->data);
    if (nested) {
        load->low_data = slot_data(m, low_of(key), hb_cache_slot(m->cache, low_of(key)));
        load->job.finish = merge_planes;
        if (with_low) {
            add_pieces(m, &load->job, low_of(key), load->low_data);
        }
    }
    hb_reader_submit(m->reader, &load->job);
    return true;
}

/* Reads low copies of a group from expert `next` on, a few at a time; the caller holds the lock. */
static bool keep_group(struct hobbit_model *m, int32_t group) {
    int32_t n_expert = m->catalog.groups[group].n_expert, next = 0, under_way = 0;
    bool good = true;
    while ((good && next < n_expert) || under_way > 0) {
        struct hb_key key = {group, next, HOBBIT_LOW};
        if (good && next < n_expert && under_way < 2 * DEFAULT_IO_THREADS) {
            if (is_cached(m, group, next, HOBBIT_LOW)) {
                hb_cache_keep(m->cache, key);
            } else if (start_read(m, key, false)) {
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

static void free_asked(struct hobbit_model *m) {
    for (int32_t g = 0; m->asked_at != NULL && g < m->catalog.n_groups; g++) {
        free(m->asked_at[g]);
    }
    free(m->asked_at);
    m->asked_at = NULL;
}

static bool new_asked(struct hobbit_model *m) {
    m->asked_at = calloc((size_t) m->catalog.n_groups, sizeof *m->asked_at);
    bool good = m->asked_at != NULL;
    for (int32_t g = 0; good && g < m->catalog.n_groups; g++) {
        m->asked_at[g] = calloc((size_t) m->catalog.groups[g].n_expert, sizeof **m->asked_at);
        good = m->asked_at[g] != NULL;
    }
    if (!good) {
        free_asked(m);
        hb_model_fail(m, "out of memory");
    }
    return good;
}

int32_t hobbit_model_keep_low(struct hobbit_model *m, char *err, size_t err_len) {
    hb_model_lock(m);
    bool good = m->cache != NULL;
    for (int32_t g = 0; good && g < m->catalog.n_groups; g++) {
        good = m->catalog.groups[g].copies[HOBBIT_LOW].n_matrices > 0;
    }
    if (!good) {
        hb_model_unlock(m);
        snprintf(err, err_len, "the model was loaded without low-precision experts");
        return HOBBIT_ARG;
    }
    good = m->asked_at != NULL || new_asked(m);
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

void hobbit_model_forget(struct hobbit_model *m) {
    hb_model_lock(m);
    if (m->cache != NULL) {
        hb_cache_forget(m->cache);
        for (int32_t i = 0; m->in_vain != NULL && i < m->catalog.n_experts; i++) {
            m->in_vain[i] = 0;
        }
        atomic_store(&m->counters.cached, (uint64_t) hb_cache_n_ready(m->cache));
    }
    hb_model_unlock(m);
}

void hobbit_model_observe(struct hobbit_model *m, int64_t *histogram) {
    hb_model_lock(m);
    m->gathered.scores = histogram;
    hb_model_unlock(m);
}

void hobbit_model_collect(struct hobbit_model *m, float *const *sums, int64_t *const *counts) {
    hb_model_lock(m);
    m->gathered.sums = sums;
    m->gathered.counts = counts;
    hb_model_unlock(m);
}

void *hobbit_model_stream(struct hobbit_model *m, char *err, size_t err_len) {
    return hb_gguf_stream_open(m->extents, m->n_extents, m->catalog.paths, m->catalog.n_files,
                               &m->counters.dense_bytes, err, err_len);
}

int32_t hobbit_stream_close(void *file) {
    return fclose(file);
}

void hobbit_model_close(struct hobbit_model *m) {
    if (m == NULL) {
        return;
    }
    hb_reader_close(m->reader);
    release_arena(m);
    for (int32_t i = 0; i < m->n_extents; i++) {
        free((void *) (uintptr_t) m->extents[i].data);
    }
    free(m->extents);
    free(m->rule.t1);
    free(m->rule.t2);
    free(m->ranges);
    free(m->in_vain);
    (void) hb_schedule_close(m->schedule);
    free_asked(m);
    hb_catalog_close(&m->catalog);
    pthread_mutex_destroy(&m->error_lock);
    pthread_mutex_destroy(&m->lock);
    free(m);
}

bool hb_model_cancelled(const struct hobbit_model *m) {
    return m->cancelled != NULL && __atomic_load_n(m->cancelled, __ATOMIC_RELAXED) != 0;
}

void hobbit_model_take_error(struct hobbit_model *m, char *err, size_t err_len) {
    pthread_mutex_lock(&m->error_lock);
    snprintf(err, err_len, "%s", m->error);
    m->error[0] = '\0';
    pthread_mutex_unlock(&m->error_lock);
}

void hobbit_model_stats(const struct hobbit_model *m, struct hobbit_stats *out) {
    const struct hb_counters *c = &m->counters;
    *out = (struct hobbit_stats) {
        .hits = atomic_load(&c->hits),
        .misses = atomic_load(&c->misses),
        .evictions = atomic_load(&c->evictions),
        .stall_ns = atomic_load(&c->stall_ns),
        .compute_ns = atomic_load(&c->compute_ns),
        .splits = atomic_load(&c->splits),
        .dense_bytes = atomic_load(&c->dense_bytes),
        .n_cached = (int32_t) atomic_load(&c->cached),
        .read_low_bytes = atomic_load(&c->read_low_bytes),
        .pairs_high = atomic_load(&c->pairs[HOBBIT_HIGH]),
        .pairs_low = atomic_load(&c->pairs[HOBBIT_LOW]),
        .pairs_skip = atomic_load(&c->pairs[HOBBIT_SKIP]),
        .scored = atomic_load(&c->scored),
        .unscored = atomic_load(&c->unscored),
        .promotions = atomic_load(&c->promotions),
        .stand_ins = atomic_load(&c->stand_ins),
        .cache_bytes = m->cache != NULL ? m->cache_bytes : 0,
        .direct_io = 1,
    };
    hb_reader_counters(m->reader, &out->read_bytes, &out->read_calls);
    for (int32_t i = 0; i < m->catalog.n_files; i++) {
        out->direct_io &= m->catalog.files[i].direct;
    }
    for (int32_t p = 0; m->cache != NULL && p < m->n_pools; p++) {
        out->n_slots += m->pools[p].banks[HOBBIT_HIGH].arena.n_slots;
    }
}

void hb_model_lock(struct hobbit_model *m) {
    pthread_mutex_lock(&m->lock);
}

void hb_model_unlock(struct hobbit_model *m) {
    pthread_mutex_unlock(&m->lock);
}

bool hb_model_ready(const struct hobbit_model *m) {
    return m->cache != NULL;
}

const struct hb_catalog *hb_model_catalog(const struct hobbit_model *m) {
    return &m->catalog;
}

struct hb_counters *hb_model_counters(struct hobbit_model *m) {
    return &m->counters;
}

const struct hb_rule *hb_model_rule(const struct hobbit_model *m) {
    return &m->rule;
}

const struct hb_gathered *hb_model_gathered(const struct hobbit_model *m) {
    return &m->gathered;
}

struct hb_arena hb_model_arena(const struct hobbit_model *m, int32_t group, int32_t precision) {
    return m->pools[m->pool_of_group[group]].banks[precision].arena;
}

int32_t hb_model_home(const struct hobbit_model *m, int32_t group) {
    return hb_cache_home(m->cache, group);
}

bool hb_model_is_cached(const struct hobbit_model *m, int32_t group, int32_t expert) {
    return is_cached(m, group, expert, HOBBIT_HIGH);
}

float hb_model_mean_range(struct hobbit_model *m, int32_t group, float range) {
    struct range *r = &m->ranges[group];
    r->sum += (double) range;
    r->n++;
    return (float) (r->sum / (double) r->n);
}

bool hb_model_has_schedule(const struct hobbit_model *m) {
    return m->schedule != NULL;
}

bool hb_model_schedule(struct hobbit_model *m, int32_t group, int32_t n, const int32_t *experts,
                       int32_t *precisions) {
    static const char *const reasons[] = {
        [HB_SCHEDULE_ENDED] = "the replayed precision schedule ends here: it is of a shorter run",
        [HB_SCHEDULE_OTHER] = "the run departs from the replayed precision schedule: the prompt, the seed, the batch sizes "
                              "and the model have to be those of the recorded run",
    };
    enum hb_schedule_step step = hb_schedule_next(m->schedule, group, n, experts, precisions);
    if (step == HB_SCHEDULE_IO) {
        char text[ERROR_BYTES];
        snprintf(text, sizeof text, "the precision schedule cannot be %s: %s",
                 hb_schedule_is_replay(m->schedule) ? "read" : "written", strerror(errno));
        hb_model_fail(m, text);
    } else if (step != HB_SCHEDULE_OK) {
        hb_model_fail(m, reasons[step]);
    }
    return step == HB_SCHEDULE_OK;
}

/* At most so many high copies are promoted at a time: more would fill memory bandwidth and slots with guesses. */
#define MAX_BACKGROUND 2

/* Promote where there is room, or for what was asked for since about as many others were as fit the cache. */
static void ask_for_high(struct hobbit_model *m, struct hb_key key) {
    uint64_t *asked_at = &m->asked_at[key.group][key.expert];
    uint64_t before = *asked_at;
    *asked_at = ++m->asks;
    uint64_t window = (uint64_t) hb_model_arena(m, key.group, HOBBIT_HIGH).n_slots;
    bool again = before > 0 && m->asks - before <= window;
    if ((again || hb_cache_has_room(m->cache, key)) && m->in_background < MAX_BACKGROUND && start_read(m, key, true)) {
        m->in_background++;
        atomic_fetch_add(&m->counters.promotions, 1);
    }
}

/* With patience: whether the low copy has to do this time too. */
static bool stands_in(struct hobbit_model *m, struct hb_key key) {
    uint16_t *in_vain = &m->in_vain[m->catalog.groups[key.group].first_expert + key.expert];
    bool low = *in_vain + 1 < m->rule.patience;
    *in_vain = low ? *in_vain + 1 : 0;
    atomic_fetch_add(&m->counters.stand_ins, low);
    return low;
}

int32_t hb_model_choose(struct hobbit_model *m, int32_t group, int32_t expert, int32_t need) {
    struct hb_key high = {group, expert, HOBBIT_HIGH};
    bool patient = m->rule.patience > 1 && m->catalog.groups[group].copies[HOBBIT_LOW].n_matrices > 0;
    if (m->rule.deterministic || (need == HOBBIT_HIGH && !m->low_kept && !patient)) {
        return need;
    }
    if (hb_cache_peek(m->cache, high) >= 0) {
        return HOBBIT_HIGH;
    }
    if (need == HOBBIT_HIGH && !m->low_kept) {
        return stands_in(m, high) ? HOBBIT_LOW : HOBBIT_HIGH;
    }
    bool low = is_cached(m, group, expert, HOBBIT_LOW);
    if (need == HOBBIT_HIGH && low) {
        atomic_fetch_add(&m->counters.stand_ins, 1);
        if (hb_cache_slot(m->cache, high) < 0) {
            ask_for_high(m, high);
        }
    }
    return low ? HOBBIT_LOW : need;
}

int32_t hb_model_look_up(struct hobbit_model *m, struct hb_key key) {
    int32_t slot = hb_cache_find(m->cache, key);
    if (slot >= 0) {
        hb_cache_pin(m->cache, key, true);
        atomic_fetch_add(&m->counters.hits, 1);
    } else {
        atomic_fetch_add(&m->counters.misses, 1);
        if (key.precision == HOBBIT_HIGH && is_cached(m, key.group, key.expert, HOBBIT_LOW)) {
            atomic_fetch_add(&m->counters.promotions, 1);
        }
    }
    return slot;
}

enum hb_fetch hb_model_fetch(struct hobbit_model *m, struct hb_key key, int32_t *slot) {
    int32_t ready = hb_cache_peek(m->cache, key);
    if (ready >= 0) {
        hb_cache_pin(m->cache, key, true);
        *slot = ready;
        return HB_FETCH_READY;
    }
    int32_t claimed = hb_cache_slot(m->cache, key);
    if (claimed < 0) {
        return start_read(m, key, false) ? HB_FETCH_STARTED : HB_FETCH_WAIT;
    }
    struct load *load = &bank_of(m, key)->loads[claimed];
    if (load->background && load->key.expert == key.expert && load->key.group == key.group) {
        load->background = false; /* wait for it after all */
        m->in_background--;
        return HB_FETCH_STARTED;
    }
    return HB_FETCH_WAIT; /* a low copy that is being read with its high one */
}

void hb_model_fail(struct hobbit_model *m, const char *reason) {
    pthread_mutex_lock(&m->error_lock);
    snprintf(m->error, sizeof m->error, "%s", reason);
    pthread_mutex_unlock(&m->error_lock);
}

/* `error` as in struct hb_job. */
static void keep_read_error(struct hobbit_model *m, int error, int32_t file, uint64_t offset) {
    const char *reason = error == HB_SHORT_READ ? "the file is shorter than that; did it change while in use?"
                         : error == HB_FORKED   ? "the process was forked after the model was loaded"
                                                : strerror(error);
    char text[ERROR_BYTES];
    snprintf(text, sizeof text, "reading %s at offset %llu failed: %s", m->catalog.paths[file],
             (unsigned long long) offset, reason);
    hb_model_fail(m, text);
}

static void count_arrival(struct hobbit_model *m, struct hb_key key) {
    if (key.precision == HOBBIT_LOW) {
        uint64_t bytes = m->catalog.groups[key.group].copies[HOBBIT_LOW].expert_bytes;
        atomic_fetch_add(&m->counters.read_low_bytes, bytes);
        return;
    }
    if (!m->rule.deterministic && !m->low_kept && hb_cache_peek(m->cache, low_of(key)) >= 0) {
        hb_cache_drop(m->cache, low_of(key)); /* promoted: see hb_model_choose */
    }
}

/* The low copy that a nested high one was made from is a copy like others now. */
static void release_low(struct hobbit_model *m, const struct load *load) {
    if (load->job.error != 0) {
        give_up_low(m, load->key, load->with_low);
        return;
    }
    if (load->with_low) {
        hb_cache_loaded(m->cache, low_of(load->key));
    }
    hb_cache_pin(m->cache, low_of(load->key), false);
}

/* False when the read failed. */
static bool take_in(struct hobbit_model *m, const struct load *load) {
    const struct hb_job *job = &load->job;
    if (load->nested != NULL) {
        release_low(m, load);
    }
    if (job->error == 0) {
        hb_cache_loaded(m->cache, load->key);
        count_arrival(m, load->key);
    } else {
        /* Nobody waits for a background read: if it matters, the same read fails in the foreground. */
        if (job->error != ECANCELED && !load->background) {
            keep_read_error(m, job->error, job->error_file, job->error_offset);
        }
        hb_cache_drop(m->cache, load->key);
    }
    if (load->background) {
        m->in_background--;
        if (job->error == 0) {
            hb_cache_pin(m->cache, load->key, false);
        }
    }
    atomic_store(&m->counters.cached, (uint64_t) hb_cache_n_ready(m->cache));
    return job->error == 0;
}

void hb_model_settle(struct hobbit_model *m) {
    while (m->in_background > 0) {
        struct hb_job *job = hb_reader_next(m->reader, false);
        if (job == NULL) {
            break;
        }
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
        const struct load *load = job->owner;
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

bool hb_model_read(struct hobbit_model *m, const struct hb_matrix *matrix, void *dst, uint64_t offset,
                   size_t length) {
    if (matrix->file_bytes != matrix->expert_bytes) {
        hb_model_fail(m, "the experts of a nested copy cannot be read as a tensor");
        return false;
    }
    struct hb_file file;
    size_t done = 0;
    int error = hb_file_open(&file, m->catalog.paths[matrix->file], false);
    if (error == 0) {
        error = hb_file_read(&file, dst, length, matrix->offset + offset, &done);
        hb_file_close(&file);
    }
    if (error == 0 && done < length) {
        error = HB_SHORT_READ;
    }
    if (error != 0) {
        keep_read_error(m, error, matrix->file, matrix->offset + offset + done);
    }
    return error == 0;
}
