#include "trace.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BUFFER_BYTES (256u << 10)

static const char magic[8] = {'H', 'B', 'T', 'R', 'A', 'C', 'E', '1'};

enum layer_flags { WITH_WEIGHTS = 0x10, WITH_PROBS = 0x20, LISTED = 0x40 }; /* beside the kind */

struct hb_trace {
    int fd, error; /* errno of the first write that failed */
    uint32_t flags;
    uint64_t n_events;
    int32_t n_groups, last_group; /* of the layer before, -1: none */
    int32_t sequence;
    int64_t next_token, ubatch_rows; /* of the ubatch before the current one, and of the current one */
    size_t used;
    uint8_t buffer[BUFFER_BYTES];
    int32_t n_expert[]; /* one a group */
};

static void flush(struct hb_trace *t) {
    for (size_t done = 0; t->error == 0 && done < t->used;) {
        ssize_t n = write(t->fd, t->buffer + done, t->used - done);
        if (n > 0) {
            done += (size_t) n;
        } else if (n == 0 || errno != EINTR) {
            t->error = n == 0 ? ENOSPC : errno;
        }
    }
    t->used = 0;
}

static void put(struct hb_trace *t, uint8_t byte) {
    if (t->used == BUFFER_BYTES) {
        flush(t);
    }
    t->buffer[t->used++] = byte;
}

/* Little endian. */
static void put_int(struct hb_trace *t, uint64_t value, int bytes) {
    for (int i = 0; i < bytes; i++) {
        put(t, (uint8_t) (value >> (8 * i)));
    }
}

/* LEB128 */
static void put_varint(struct hb_trace *t, uint64_t value) {
    for (; value >= 0x80; value >>= 7) {
        put(t, (uint8_t) (value | 0x80));
    }
    put(t, (uint8_t) value);
}

static void put_float(struct hb_trace *t, float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    put_int(t, bits, 4);
}

static void put_experts(struct hb_trace *t, int32_t group, int64_t n, const int32_t *experts) {
    int bytes = t->n_expert[group] <= 256 ? 1 : 2;
    for (int64_t i = 0; i < n; i++) {
        put_int(t, (uint64_t) experts[i], bytes);
    }
}

static bool event_done(struct hb_trace *t) {
    t->n_events++;
    errno = t->error;
    return t->error == 0;
}

static void put_head(struct hb_trace *t, const struct hb_trace_head *head) {
    size_t note_bytes = strlen(head->note);
    for (size_t i = 0; i < sizeof magic; i++) {
        put(t, (uint8_t) magic[i]);
    }
    put_int(t, head->flags, 4);
    put_int(t, note_bytes, 4);
    for (size_t i = 0; i < note_bytes; i++) {
        put(t, (uint8_t) head->note[i]);
    }
    put_int(t, (uint64_t) head->n_pools, 4);
    put_int(t, (uint64_t) head->n_groups, 4);
    for (const struct hobbit_pool *pool = head->pools; pool < head->pools + head->n_pools; pool++) {
        put_int(t, pool->bytes, 8);
        for (int p = 0; p < HOBBIT_PRECISIONS; p++) {
            put_int(t, pool->slot_bytes[p], 8);
            put_int(t, (uint64_t) pool->n_slots[p], 4);
        }
    }
    for (const struct hb_trace_group *group = head->groups; group < head->groups + head->n_groups; group++) {
        put_int(t, (uint64_t) group->layer, 4);
        put_int(t, (uint64_t) group->n_expert, 4);
        put_int(t, (uint64_t) group->pool, 4);
        for (int p = 0; p < HOBBIT_PRECISIONS; p++) {
            put_int(t, group->expert_bytes[p], 8);
            put_int(t, group->slot_bytes[p], 8);
        }
    }
}

struct hb_trace *hb_trace_create(const char *path, const struct hb_trace_head *head) {
    struct hb_trace *t = malloc(sizeof *t + (size_t) head->n_groups * sizeof *t->n_expert);
    if (t == NULL) {
        errno = ENOMEM;
        return NULL;
    }
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (fd < 0) {
        int error = errno;
        free(t);
        errno = error;
        return NULL;
    }
    memset(t, 0, sizeof *t);
    t->fd = fd;
    t->flags = head->flags;
    t->n_groups = head->n_groups;
    t->last_group = -1;
    for (int32_t g = 0; g < head->n_groups; g++) {
        t->n_expert[g] = head->groups[g].n_expert;
    }
    put_head(t, head);
    return t;
}

bool hb_trace_close(struct hb_trace *t) {
    if (t == NULL) {
        return true;
    }
    put(t, HOBBIT_EVENT_END);
    put_int(t, t->n_events, 8);
    flush(t);
    int error = t->error;
    if (close(t->fd) != 0 && error == 0) {
        error = errno;
    }
    free(t);
    errno = error;
    return error == 0;
}

uint32_t hb_trace_flags(const struct hb_trace *t) {
    return t->flags;
}

/* The number of the layer's first row, where the caller does not know it. */
static int64_t count_rows(struct hb_trace *t, const struct hb_trace_layer *layer) {
    bool same_layer = layer->group == t->last_group && t->n_groups > 1;
    if (layer->group <= t->last_group && !same_layer) {
        t->next_token += t->ubatch_rows;
        t->ubatch_rows = 0;
    }
    t->last_group = layer->group;
    t->ubatch_rows = layer->n_rows > t->ubatch_rows ? layer->n_rows : t->ubatch_rows;
    return t->next_token + t->ubatch_rows - layer->n_rows;
}

static void put_rows(struct hb_trace *t, const struct hb_trace_layer *layer) {
    if (layer->tokens == NULL) {
        put_varint(t, (uint64_t) t->sequence);
        put_varint(t, (uint64_t) count_rows(t, layer));
        return;
    }
    for (int64_t i = 0; i < layer->n_rows; i++) {
        put_varint(t, (uint64_t) layer->sequences[i]);
        put_varint(t, (uint64_t) layer->tokens[i]);
    }
}

bool hb_trace_layer(struct hb_trace *t, const struct hb_trace_layer *layer) {
    int64_t n_pairs = layer->n_rows * layer->n_used;
    put(t, (uint8_t) (HOBBIT_EVENT_LAYER | (layer->weights != NULL ? WITH_WEIGHTS : 0) |
                      (layer->probs != NULL ? WITH_PROBS : 0) | (layer->tokens != NULL ? LISTED : 0)));
    put_varint(t, (uint64_t) layer->group);
    put_varint(t, (uint64_t) layer->n_rows);
    put_varint(t, (uint64_t) layer->n_used);
    put_rows(t, layer);
    put_experts(t, layer->group, n_pairs, layer->experts);
    for (int64_t i = 0; layer->weights != NULL && i < n_pairs; i++) {
        put_float(t, layer->weights[i]);
    }
    for (int64_t i = 0; layer->probs != NULL && i < layer->n_rows * t->n_expert[layer->group]; i++) {
        put_int(t, layer->probs[i], 2);
    }
    return event_done(t);
}

bool hb_trace_sequence(struct hb_trace *t, int32_t sequence) {
    put(t, HOBBIT_EVENT_SEQUENCE);
    put_varint(t, (uint64_t) sequence);
    t->sequence = sequence;
    t->next_token = t->ubatch_rows = 0;
    t->last_group = -1;
    return event_done(t);
}

bool hb_trace_predicted(struct hb_trace *t, int32_t group, int32_t n, const int32_t *experts,
                        const float *probabilities) {
    put(t, HOBBIT_EVENT_PREDICTED);
    put_varint(t, (uint64_t) group);
    put_varint(t, (uint64_t) n);
    put_experts(t, group, n, experts);
    for (int32_t i = 0; i < n; i++) {
        put_float(t, probabilities[i]);
    }
    return event_done(t);
}

bool hb_trace_forget(struct hb_trace *t) {
    put(t, HOBBIT_EVENT_FORGET);
    return event_done(t);
}
