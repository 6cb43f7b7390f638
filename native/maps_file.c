#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "maps_impl.h"

#define VERSION 1
#define HEAD 5 /* numbers before those of the experts */
#define FNV_START 0xcbf29ce484222325u
#define FNV_PRIME 0x100000001b3u

static const char magic[8] = {'H', 'B', 'M', 'A', 'P', 'S', '\r', '\n'};

/* A file and the FNV-1a of what went through it. */
struct stream {
    FILE *file;
    uint64_t sum;
    bool good;
};

static void add(struct stream *s, const void *data, size_t size) {
    const uint8_t *bytes = data;
    for (size_t i = 0; i < size; i++) {
        s->sum = (s->sum ^ bytes[i]) * FNV_PRIME;
    }
}

static void write_some(struct stream *s, const void *data, size_t size) {
    s->good = s->good && fwrite(data, 1, size, s->file) == size;
    add(s, data, size);
}

static void read_some(struct stream *s, void *data, size_t size) {
    s->good = s->good && fread(data, 1, size, s->file) == size;
    if (s->good) {
        add(s, data, size);
    }
}

static void write_all(struct stream *s, const struct hb_maps *m, const uint8_t *identity) {
    size_t n = (size_t) m->n_maps;
    uint32_t head[HEAD] = {VERSION, (uint32_t) m->n_layers, (uint32_t) m->n_embd, (uint32_t) m->capacity,
                           (uint32_t) m->n_maps};
    write_some(s, magic, sizeof magic);
    write_some(s, identity, HB_MAPS_IDENTITY);
    write_some(s, head, sizeof head);
    write_some(s, m->n_experts, (size_t) m->n_layers * sizeof *m->n_experts);
    write_some(s, m->embeddings, n * (size_t) m->n_embd * sizeof *m->embeddings);
    for (int32_t l = 0; l < m->n_layers; l++) {
        write_some(s, hb_maps_layer(m, l), n * (size_t) m->n_experts[l] * sizeof *m->probs);
    }
    uint64_t sum = s->sum;
    write_some(s, &sum, sizeof sum);
}

enum hb_maps_status hb_maps_save(const struct hb_maps *m, const char *path, const uint8_t *identity) {
    char name[PATH_MAX];
    int length = snprintf(name, sizeof name, "%s.%ld.part", path, (long) getpid());
    if (length < 0 || (size_t) length >= sizeof name) {
        errno = ENAMETOOLONG;
        return HB_MAPS_IO;
    }
    struct stream s = {.file = fopen(name, "wb"), .sum = FNV_START, .good = true};
    if (s.file == NULL) {
        return HB_MAPS_IO;
    }
    write_all(&s, m, identity);
    s.good = fclose(s.file) == 0 && s.good;
    if (!s.good || rename(name, path) != 0) {
        int error = errno;
        (void) unlink(name);
        errno = error;
        return HB_MAPS_IO;
    }
    return HB_MAPS_OK;
}

/* Whether the file is a store of this model and shape. Sets the number of its maps. */
static enum hb_maps_status read_head(struct stream *s, const struct hb_maps *m, const uint8_t *identity, uint32_t *n) {
    char start[sizeof magic];
    uint8_t model[HB_MAPS_IDENTITY];
    uint32_t head[HEAD];
    read_some(s, start, sizeof start);
    if (!s->good || memcmp(start, magic, sizeof magic) != 0) {
        return HB_MAPS_FOREIGN;
    }
    read_some(s, model, sizeof model);
    read_some(s, head, sizeof head);
    if (!s->good) {
        return HB_MAPS_DAMAGED;
    }
    *n = head[4];
    bool same = memcmp(model, identity, sizeof model) == 0 && head[0] == VERSION &&
                head[1] == (uint32_t) m->n_layers && head[2] == (uint32_t) m->n_embd &&
                head[3] == (uint32_t) m->capacity;
    for (int32_t l = 0; same && s->good && l < m->n_layers; l++) {
        int32_t n_experts = 0;
        read_some(s, &n_experts, sizeof n_experts);
        same = !s->good || n_experts == m->n_experts[l];
    }
    return !same ? HB_MAPS_FOREIGN : s->good && *n <= (uint32_t) m->capacity ? HB_MAPS_OK : HB_MAPS_DAMAGED;
}

static void read_body(struct stream *s, struct hb_maps *m, size_t n) {
    read_some(s, m->embeddings, n * (size_t) m->n_embd * sizeof *m->embeddings);
    for (int32_t l = 0; l < m->n_layers; l++) {
        read_some(s, hb_maps_layer(m, l), n * (size_t) m->n_experts[l] * sizeof *m->probs);
    }
    uint64_t sum = s->sum, written = 0;
    read_some(s, &written, sizeof written);
    s->good = s->good && written == sum && getc(s->file) == EOF;
}

/* Whether these are numbers that a store writes: others could overflow. */
static bool is_embedding(const int16_t *x, int32_t n) {
    int64_t sum = 0, most = (int64_t) HB_MAPS_ONE * HB_MAPS_ONE;
    for (int32_t i = 0; i < n; i++) {
        sum += (int32_t) x[i] * x[i];
    }
    return sum <= most + most / 16; /* rounding, of at most a million numbers */
}

static bool is_layer(const int16_t *p, int32_t n) {
    int32_t sum = 0;
    bool good = true;
    for (int32_t i = 0; i < n; i++) {
        good = good && p[i] >= 0;
        sum += p[i];
    }
    return good && sum <= HB_MAPS_ONE + n / 2 + 1;
}

/* Checks what was read, and computes what the file does not have. */
static bool take_body(struct hb_maps *m, int32_t n) {
    bool good = true;
    for (int32_t i = 0; good && i < n; i++) {
        const int16_t *x = m->embeddings + (size_t) i * (size_t) m->n_embd;
        good = is_embedding(x, m->n_embd);
        m->embedding_norm[i] = good ? hb_maps_dot(x, x, m->n_embd) : 0;
    }
    for (int32_t l = 0; l < m->n_layers; l++) {
        for (int32_t i = 0; good && i < n; i++) {
            const int16_t *p = hb_maps_layer(m, l) + (size_t) i * (size_t) m->n_experts[l];
            good = is_layer(p, m->n_experts[l]);
            m->norm[(size_t) l * (size_t) m->capacity + (size_t) i] = good ? hb_maps_dot(p, p, m->n_experts[l]) : 0;
        }
    }
    return good;
}

enum hb_maps_status hb_maps_load(struct hb_maps *m, const char *path, const uint8_t *identity) {
    m->n_maps = 0;
    m->observed = -1;
    struct stream s = {.file = fopen(path, "rb"), .sum = FNV_START, .good = true};
    if (s.file == NULL) {
        return HB_MAPS_IO;
    }
    uint32_t n = 0;
    enum hb_maps_status status = read_head(&s, m, identity, &n);
    if (status == HB_MAPS_OK) {
        read_body(&s, m, n);
        status = s.good && take_body(m, (int32_t) n) ? HB_MAPS_OK : HB_MAPS_DAMAGED;
    }
    int error = errno;
    status = ferror(s.file) ? HB_MAPS_IO : status;
    (void) fclose(s.file);
    errno = error;
    m->n_maps = status == HB_MAPS_OK ? (int32_t) n : 0;
    return status;
}
