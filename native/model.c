#include "model.h"

#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "gguf_stream.h"

#define DEFAULT_IO_THREADS 4
#define ERROR_BYTES 512

/* The reading of one expert into one slot. */
struct load {
    struct hb_job job;
    int32_t group, expert, slot;
};

struct pool {
    struct hb_arena arena;
    struct load *loads; /* one a slot, so that nothing is allocated while decoding */
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
    void *arena;
    size_t arena_bytes;
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

uint64_t hobbit_model_slot_bytes(const struct hobbit_model *m, int32_t group) {
    return m->catalog.groups[group].slot_bytes;
}

static bool pools_fit(const struct hobbit_model *m, const struct hobbit_pool *pools, int32_t n_pools,
                      const int32_t *pool_of_group) {
    uint64_t total = 0, bytes;
    for (int32_t p = 0; p < n_pools; p++) {
        if (pools[p].n_slots < 1 ||
            __builtin_mul_overflow(pools[p].slot_bytes, (uint64_t) pools[p].n_slots, &bytes) ||
            __builtin_add_overflow(total, bytes, &total) || total > SIZE_MAX / 2) {
            return false;
        }
    }
    for (int32_t g = 0; g < m->catalog.n_groups; g++) {
        int32_t p = pool_of_group[g];
        if (p < 0 || p >= n_pools || pools[p].slot_bytes % HB_PAGE != 0 ||
            pools[p].slot_bytes < m->catalog.groups[g].slot_bytes) {
            return false;
        }
    }
    return true;
}

static enum hobbit_status new_cache(struct hobbit_model *m, const struct hobbit_pool *pools) {
    int32_t n_groups = m->catalog.n_groups;
    int32_t *slots = calloc((size_t) m->n_pools, sizeof *slots);
    int32_t *experts = calloc((size_t) n_groups, sizeof *experts);
    if (slots != NULL && experts != NULL) {
        for (int32_t p = 0; p < m->n_pools; p++) {
            slots[p] = pools[p].n_slots;
        }
        for (int32_t g = 0; g < n_groups; g++) {
            experts[g] = m->catalog.groups[g].n_expert;
        }
        m->cache = hb_cache_new(m->n_pools, slots, n_groups, experts, m->pool_of_group);
    }
    free(slots);
    free(experts);
    return m->cache != NULL ? HOBBIT_OK : HOBBIT_NOMEM;
}

static void release_arena(struct hobbit_model *m) {
    hb_cache_free(m->cache);
    m->cache = NULL;
    for (int32_t p = 0; m->pools != NULL && p < m->n_pools; p++) {
        free(m->pools[p].loads);
    }
    free(m->pools);
    m->pools = NULL;
    free(m->pool_of_group);
    m->pool_of_group = NULL;
    hb_space_release(m->arena, m->arena_bytes);
    m->arena = NULL;
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
    if (m->pools == NULL || m->pool_of_group == NULL) {
        goto err;
    }
    memcpy(m->pool_of_group, pool_of_group, groups_bytes);
    m->arena_bytes = 0;
    for (int32_t p = 0; p < n_pools; p++) {
        m->arena_bytes += pools[p].slot_bytes * (uint64_t) pools[p].n_slots;
    }
    for (int32_t p = 0; p < n_pools; p++) {
        m->pools[p].loads = calloc((size_t) pools[p].n_slots, sizeof *m->pools[p].loads);
        if (m->pools[p].loads == NULL) {
            goto err;
        }
    }
    if (hb_space_map(&m->arena, m->arena_bytes) != 0) {
        goto err;
    }
    char *base = m->arena;
    for (int32_t p = 0; p < n_pools; p++) {
        m->pools[p].arena = (struct hb_arena) {base, pools[p].slot_bytes, pools[p].n_slots};
        base += pools[p].slot_bytes * (uint64_t) pools[p].n_slots;
    }
    status = new_cache(m, pools);
    if (status == HOBBIT_OK) {
        return HOBBIT_OK;
    }
err:
    release_arena(m);
    snprintf(err, err_len, "no memory for an expert cache of %zu bytes", m->arena_bytes);
    return status;
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
        .direct_io = 1,
    };
    hb_reader_counters(m->reader, &out->read_bytes, &out->read_calls);
    for (int32_t i = 0; i < m->catalog.n_files; i++) {
        out->direct_io &= m->catalog.files[i].direct;
    }
    for (int32_t p = 0; m->cache != NULL && p < m->n_pools; p++) {
        out->cache_bytes += m->pools[p].arena.slot_bytes * (uint64_t) m->pools[p].arena.n_slots;
        out->n_slots += m->pools[p].arena.n_slots;
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

struct hb_arena hb_model_arena(const struct hobbit_model *m, int32_t group) {
    return m->pools[m->pool_of_group[group]].arena;
}

int32_t hb_model_home(const struct hobbit_model *m, int32_t group) {
    return hb_cache_home(m->cache, group);
}

int32_t hb_model_look_up(struct hobbit_model *m, int32_t group, int32_t expert) {
    int32_t slot = hb_cache_find(m->cache, group, expert);
    if (slot >= 0) {
        hb_cache_pin(m->cache, group, expert, true);
        atomic_fetch_add(&m->counters.hits, 1);
    } else {
        atomic_fetch_add(&m->counters.misses, 1);
    }
    return slot;
}

static void set_piece(const struct hobbit_model *m, struct hb_piece *piece, const struct hb_matrix *matrix,
                      int32_t expert, char *slot) {
    *piece = (struct hb_piece) {
        .file = &m->catalog.files[matrix->file],
        .file_index = matrix->file,
        .bounce = matrix->bounce,
        .offset = matrix->offset + (uint64_t) expert * matrix->expert_bytes,
        .length = matrix->expert_bytes,
        .dst = slot + matrix->slot_offset,
    };
}

bool hb_model_fetch(struct hobbit_model *m, int32_t group, int32_t expert) {
    int32_t slot = hb_cache_claim(m->cache, group, expert);
    if (slot < 0) {
        return false;
    }
    atomic_store(&m->counters.evictions, hb_cache_evictions(m->cache));
    const struct hb_group *g = &m->catalog.groups[group];
    struct pool *pool = &m->pools[m->pool_of_group[group]];
    struct load *load = &pool->loads[slot];
    load->group = group;
    load->expert = expert;
    load->slot = slot;
    load->job.owner = load;
    load->job.n_pieces = g->n_matrices;
    for (int32_t i = 0; i < g->n_matrices; i++) {
        set_piece(m, &load->job.pieces[i], g->matrices[i], expert,
                  pool->arena.base + (uint64_t) slot * pool->arena.slot_bytes);
    }
    hb_reader_submit(m->reader, &load->job);
    return true;
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

struct hb_arrival hb_model_arrival(struct hobbit_model *m, bool wait) {
    struct hb_job *job = hb_reader_next(m->reader, false);
    if (job == NULL && wait) {
        uint64_t start = hb_now_ns();
        job = hb_reader_next(m->reader, true);
        atomic_fetch_add(&m->counters.stall_ns, hb_now_ns() - start);
    }
    if (job == NULL) {
        return (struct hb_arrival) {.expert = -1};
    }
    const struct load *load = job->owner;
    bool failed = job->error != 0;
    if (failed) {
        if (job->error != ECANCELED) {
            keep_read_error(m, job->error, job->error_file, job->error_offset);
        }
        hb_cache_failed(m->cache, load->group, load->expert);
    } else {
        hb_cache_loaded(m->cache, load->group, load->expert);
    }
    atomic_store(&m->counters.cached, (uint64_t) hb_cache_n_ready(m->cache));
    return (struct hb_arrival) {load->expert, load->slot, failed};
}

void hb_model_release(struct hobbit_model *m, int32_t group, int32_t expert) {
    hb_cache_pin(m->cache, group, expert, false);
}

void hb_model_withdraw(struct hobbit_model *m) {
    hb_reader_withdraw(m->reader);
}

bool hb_model_read(struct hobbit_model *m, const struct hb_matrix *matrix, void *dst, uint64_t offset,
                   size_t length) {
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
