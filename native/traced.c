/* The routing trace of a model: begun and ended from outside, written to by whoever computes. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "model_impl.h"

static void describe_pools(const struct hobbit_model *m, struct hobbit_pool *pools) {
    for (int32_t i = 0; i < m->n_pools; i++) {
        pools[i].bytes = m->pools[i].bytes;
        for (int32_t p = 0; p < HOBBIT_PRECISIONS; p++) {
            pools[i].slot_bytes[p] = m->pools[i].banks[p].arena.slot_bytes;
            pools[i].n_slots[p] = m->pools[i].banks[p].arena.n_slots;
        }
    }
}

static void describe_groups(const struct hobbit_model *m, struct hb_trace_group *groups) {
    for (int32_t g = 0; g < m->catalog.n_groups; g++) {
        const struct hb_group *group = &m->catalog.groups[g];
        groups[g] = (struct hb_trace_group) {
            .layer = group->layer, .n_expert = group->n_expert, .pool = m->pool_of_group[g]};
        for (int32_t p = 0; p < HOBBIT_PRECISIONS; p++) {
            groups[g].expert_bytes[p] = group->copies[p].expert_bytes;
            groups[g].slot_bytes[p] = group->copies[p].slot_bytes;
        }
    }
}

/* NULL with errno set. */
static struct hb_trace *new_trace(const struct hobbit_model *m, const char *path, const char *note, uint32_t flags) {
    struct hobbit_pool *pools = calloc((size_t) m->n_pools, sizeof *pools);
    struct hb_trace_group *groups = calloc((size_t) m->catalog.n_groups, sizeof *groups);
    struct hb_trace *trace = NULL;
    if (pools != NULL && groups != NULL) {
        describe_pools(m, pools);
        describe_groups(m, groups);
        const struct hb_trace_head head = {.note = note, .flags = flags, .pools = pools, .groups = groups,
                                           .n_pools = m->n_pools, .n_groups = m->catalog.n_groups};
        trace = hb_trace_create(path, &head);
    }
    int error = pools == NULL || groups == NULL ? ENOMEM : errno;
    free(groups);
    free(pools);
    errno = error;
    return trace;
}

static struct hb_trace *exchange(struct hobbit_model *m, struct hb_trace *trace) {
    hb_model_lock(m);
    struct hb_trace *old = m->trace;
    m->trace = trace;
    hb_model_unlock(m);
    return old;
}

int32_t hobbit_model_trace(struct hobbit_model *m, const char *path, const char *note, uint32_t flags, char *err,
                           size_t err_len) {
    (void) hb_trace_close(exchange(m, NULL)); /* before another is begun: it may be in the same file */
    int32_t status = HOBBIT_OK;
    hb_model_lock(m);
    if (!hb_model_ready(m)) {
        snprintf(err, err_len, "the model has no expert cache yet");
        status = HOBBIT_ARG;
    } else if ((m->trace = new_trace(m, path, note, flags)) == NULL) {
        snprintf(err, err_len, "%s: %s", path, strerror(errno));
        status = HOBBIT_IO;
    }
    hb_model_unlock(m);
    return status;
}

int32_t hobbit_model_trace_end(struct hobbit_model *m, char *err, size_t err_len) {
    if (!hb_trace_close(exchange(m, NULL))) {
        snprintf(err, err_len, "the routing trace cannot be written: %s", strerror(errno));
        return HOBBIT_IO;
    }
    return HOBBIT_OK;
}

struct hb_trace *hb_model_trace(const struct hobbit_model *m) {
    return m->trace;
}
