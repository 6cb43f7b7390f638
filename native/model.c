#include "model.h"

#include <stdlib.h>
#include <string.h>

#include "gguf_stream.h"
#include "model_impl.h"

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
        m->used = calloc((size_t) m->catalog.n_experts, sizeof *m->used);
        m->look_ups = calloc((size_t) m->catalog.n_groups, sizeof *m->look_ups);
        m->routers = calloc((size_t) m->catalog.n_groups, sizeof *m->routers);
        status = m->used != NULL && m->look_ups != NULL && m->routers != NULL ? HOBBIT_OK : HOBBIT_NOMEM;
    }
    if (status == HOBBIT_OK) {
        status = copy_extents(m, o);
        if (status == HOBBIT_FORMAT) {
            snprintf(err, err_len, "the extents of the virtual file do not follow one another");
        }
    }
    if (status == HOBBIT_OK) {
        int error = hb_reader_open(&m->reader, o->io_threads > 0 ? o->io_threads : HB_DEFAULT_IO_THREADS);
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
        m->keeps_space ? hb_space_drop(m->pools[i].space, m->pools[i].space_bytes)
                       : hb_space_release(m->pools[i].space, m->pools[i].space_bytes);
    }
    free(m->pools);
    m->pools = NULL;
    free(m->pool_of_group);
    m->pool_of_group = NULL;
}

/* Address space for both banks side by side: together they may be larger than the pool's bytes, which the cache keeps
 * to. Where they share, a slot's memory must come and go by itself, and huge pages would keep it. */
static bool new_pool(struct hb_pool *pool, const struct hobbit_pool *size) {
    bool shared = size->n_slots[HOBBIT_LOW] > 0;
    pool->bytes = size->bytes;
    for (int32_t p = 0; p < HOBBIT_PRECISIONS; p++) {
        pool->space_bytes += size->slot_bytes[p] * (uint64_t) size->n_slots[p];
    }
    if (hb_space_map(&pool->space, pool->space_bytes, !shared) != 0) {
        pool->space = NULL;
        return false;
    }
    char *base = pool->space;
    for (int32_t p = 0; p < HOBBIT_PRECISIONS; p++) {
        struct hb_bank *bank = &pool->banks[p];
        bank->arena = (struct hb_arena) {base, size->slot_bytes[p], size->n_slots[p]};
        base += size->slot_bytes[p] * (uint64_t) size->n_slots[p];
        bank->loads = calloc((size_t) size->n_slots[p] + 1, sizeof *bank->loads);
        if (bank->loads == NULL) {
            return false;
        }
    }
    return true;
}

/* Before another cache takes its place. */
static void drop_cache(struct hobbit_model *m) {
    hb_model_end_uploads(m);
    hb_model_end_background(m);
    m->evicted_before += hb_cache_evictions(m->cache);
    hb_rows_free(m->rows);
    m->rows = NULL; /* the new one has no records of them */
    m->low_kept = false;
    atomic_store(&m->counters.cached, 0);
    if (m->trace != NULL) {
        (void) hb_trace_forget(m->trace); /* the next event reports the error */
    }
    release_arena(m);
}

static enum hobbit_status allocate(struct hobbit_model *m, const struct hobbit_pool *pools, int32_t n_pools,
                                   const int32_t *pool_of_group) {
    enum hobbit_status status = HOBBIT_NOMEM;
    uint64_t bytes = 0, n_slots = 0;
    size_t groups_bytes = (size_t) m->catalog.n_groups * sizeof *m->pool_of_group;
    m->n_pools = n_pools;
    m->pools = calloc((size_t) n_pools, sizeof *m->pools);
    m->pool_of_group = malloc(groups_bytes);
    bool good = m->pools != NULL && m->pool_of_group != NULL;
    for (int32_t i = 0; good && i < n_pools; i++) {
        good = new_pool(&m->pools[i], &pools[i]);
        bytes += pools[i].bytes;
        n_slots += (uint64_t) pools[i].n_slots[HOBBIT_HIGH];
    }
    if (good) {
        memcpy(m->pool_of_group, pool_of_group, groups_bytes);
        status = new_cache(m, pools);
    }
    if (status != HOBBIT_OK) {
        release_arena(m);
        bytes = n_slots = 0;
    }
    atomic_store(&m->counters.cache_bytes, bytes);
    atomic_store(&m->counters.n_slots, n_slots);
    return status;
}

int32_t hobbit_model_allocate(struct hobbit_model *m, const struct hobbit_pool *pools, int32_t n_pools,
                              const int32_t *pool_of_group, char *err, size_t err_len) {
    if (n_pools < 1 || !pools_fit(m, pools, n_pools, pool_of_group)) {
        snprintf(err, err_len, "the pools do not fit the model's experts");
        return HOBBIT_ARG;
    }
    hb_model_lock(m);
    if (m->cache != NULL) {
        drop_cache(m);
    }
    enum hobbit_status status = allocate(m, pools, n_pools, pool_of_group);
    hb_model_unlock(m);
    if (status != HOBBIT_OK) {
        snprintf(err, err_len, "no memory for the expert cache");
    }
    return status;
}

int32_t hobbit_model_set_policy(struct hobbit_model *m, const struct hobbit_policy *policy, char *err,
                                size_t err_len) {
    if (m->cache == NULL || policy->kind == HOBBIT_POLICY_FARTHEST || !hb_policy_makes_sense(policy)) {
        snprintf(err, err_len, "the cache policy has a number that makes no sense");
        return HOBBIT_ARG;
    }
    hb_model_lock(m);
    bool good = hb_cache_set_policy(m->cache, policy) && (m->tier == NULL || hb_tier_set_policy(m->tier, policy));
    hb_model_unlock(m);
    if (!good) {
        snprintf(err, err_len, "out of memory");
        return HOBBIT_NOMEM;
    }
    return HOBBIT_OK;
}

void hobbit_model_new_sequence(struct hobbit_model *m) {
    hb_model_lock(m);
    if (m->cache != NULL) {
        hb_cache_reset(m->cache, 0);
    }
    if (m->tier != NULL) {
        hb_tier_new_sequence(m->tier);
    }
    m->n_sequences++;
    if (m->trace != NULL) {
        (void) hb_trace_sequence(m->trace, m->n_sequences); /* the next event reports the error */
    }
    hb_model_unlock(m);
}

void hobbit_model_forget(struct hobbit_model *m) {
    hb_model_lock(m);
    if (m->cache != NULL) {
        hb_model_end_background(m);
        hb_model_end_uploads(m);
        hb_cache_forget(m->cache);
        if (m->tier != NULL) {
            hb_tier_forget(m->tier);
        }
        for (int32_t i = 0; m->in_vain != NULL && i < m->catalog.n_experts; i++) {
            m->in_vain[i] = 0;
        }
        atomic_store(&m->counters.cached, (uint64_t) hb_cache_n_ready(m->cache));
        if (m->trace != NULL) {
            (void) hb_trace_forget(m->trace); /* the next event reports the error */
        }
    }
    hb_model_unlock(m);
}

void *hobbit_model_stream(struct hobbit_model *m, char *err, size_t err_len) {
    return hb_gguf_stream_open(m->extents, m->n_extents, m->catalog.paths, m->catalog.n_files,
                               &m->counters.dense_bytes, err, err_len);
}

int32_t hobbit_stream_close(void *file) {
    return fclose(file);
}

void hobbit_model_abandon(struct hobbit_model *m) {
    for (int32_t i = 0; m->pools != NULL && i < m->n_pools; i++) {
        hb_space_drop(m->pools[i].space, m->pools[i].space_bytes);
    }
}

void hobbit_model_close(struct hobbit_model *m) {
    if (m == NULL) {
        return;
    }
    hb_reader_close(m->reader);
    hb_model_end_uploads(m);
    hb_tier_free(m->tier);
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
    (void) hb_trace_close(m->trace);
    hb_rows_free(m->rows);
    free(m->asked_at);
    free(m->used);
    free(m->look_ups);
    free(m->routers);
    hb_forecast_free(m->forecast);
    hb_map_predictor_free(m->map_predictor);
    free(m->warm);
    hb_catalog_close(&m->catalog);
    pthread_mutex_destroy(&m->error_lock);
    pthread_mutex_destroy(&m->lock);
    free(m);
}

bool hb_model_cancelled(const struct hobbit_model *m) {
    return m->cancelled != NULL && __atomic_load_n(m->cancelled, __ATOMIC_RELAXED) != 0;
}

int32_t hobbit_model_take_error(struct hobbit_model *m, char *err, size_t err_len) {
    pthread_mutex_lock(&m->error_lock);
    snprintf(err, err_len, "%s", m->error);
    enum hobbit_status status = m->error[0] == '\0' ? HOBBIT_OK : m->error_status;
    m->error[0] = '\0';
    pthread_mutex_unlock(&m->error_lock);
    return status;
}

void hobbit_model_stats(const struct hobbit_model *m, struct hobbit_stats *out) {
    const struct hb_counters *c = &m->counters;
    *out = (struct hobbit_stats) {
        .hits = atomic_load(&c->hits),
        .misses = atomic_load(&c->misses),
        .evictions = atomic_load(&c->evictions),
        .predictor = (int32_t) atomic_load(&c->predictor),
        .predicted = atomic_load(&c->predicted),
        .predicted_right = atomic_load(&c->predicted_right),
        .ahead = atomic_load(&c->ahead),
        .ahead_used = atomic_load(&c->ahead_used),
        .ahead_bytes = atomic_load(&c->ahead_bytes),
        .ahead_wasted_bytes = atomic_load(&c->ahead_wasted_bytes),
        .stall_ns = atomic_load(&c->stall_ns),
        .predict_ns = atomic_load(&c->predict_ns),
        .manage_ns = atomic_load(&c->manage_ns),
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
        .cache_bytes = atomic_load(&c->cache_bytes),
        .n_slots = (int32_t) atomic_load(&c->n_slots),
        .device_hits = atomic_load(&c->device_hits),
        .device_pairs = atomic_load(&c->device_pairs),
        .device_low_pairs = atomic_load(&c->device_low_pairs),
        .device_bytes = atomic_load(&c->device_bytes),
        .device_brought = atomic_load(&c->device_brought),
        .split_ns = atomic_load(&c->split_ns),
        .split_cpu_ns = atomic_load(&c->split_cpu_ns),
        .split_device_ns = atomic_load(&c->split_device_ns),
        .split_longer_ns = atomic_load(&c->split_longer_ns),
        .break_even_pairs = atomic_load(&c->break_even_pairs),
        .device_ns = atomic_load(&c->device_ns),
        .device_wait_ns = atomic_load(&c->device_wait_ns),
        .device_declined = atomic_load(&c->device_declined),
        .direct_io = 1,
    };
    hb_reader_counters(m->reader, &out->read_bytes, &out->read_calls);
    for (int32_t i = 0; i < m->catalog.n_files; i++) {
        out->direct_io &= m->catalog.files[i].direct;
    }
}

void hb_model_lock(struct hobbit_model *m) {
    pthread_mutex_lock(&m->lock);
}

bool hb_model_try_lock(struct hobbit_model *m) {
    return pthread_mutex_trylock(&m->lock) == 0;
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

struct hb_arena hb_model_arena(const struct hobbit_model *m, int32_t group, int32_t precision) {
    return m->pools[m->pool_of_group[group]].banks[precision].arena;
}

int32_t hb_model_home(const struct hobbit_model *m, int32_t group) {
    return hb_cache_home(m->cache, group);
}

static void fail(struct hobbit_model *m, enum hobbit_status status, const char *reason) {
    pthread_mutex_lock(&m->error_lock);
    snprintf(m->error, sizeof m->error, "%s", reason);
    m->error_status = status;
    pthread_mutex_unlock(&m->error_lock);
}

void hb_model_keep_space(struct hobbit_model *m) {
    m->keeps_space = true;
}

void hb_model_fail(struct hobbit_model *m, const char *reason) {
    fail(m, HOBBIT_IO, reason);
}

void hb_model_device_failed(struct hobbit_model *m, const char *reason) {
    hb_tier_abandon(m->tier, reason);
    hb_model_keep_space(m);
    fail(m, HOBBIT_DEVICE, reason);
}

void hb_model_read_failed(struct hobbit_model *m, int error, int32_t file, uint64_t offset) {
    const char *reason = error == HB_SHORT_READ ? "the file is shorter than that; did it change while in use?"
                         : error == HB_FORKED   ? "the process was forked after the model was loaded"
                                                : strerror(error);
    char text[HB_ERROR_BYTES];
    snprintf(text, sizeof text, "reading %s at offset %llu failed: %s", m->catalog.paths[file],
             (unsigned long long) offset, reason);
    hb_model_fail(m, text);
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
        hb_model_read_failed(m, error, matrix->file, matrix->offset + offset + done);
    }
    return error == 0;
}
