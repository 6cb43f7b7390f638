#include "gguf_stream.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "os.h"

struct hb_gguf_stream {
    const struct hobbit_extent *extents; /* the model's */
    int32_t n_extents, n_files;
    atomic_uint_fast64_t *served;
    struct hb_file files[];
};

static const struct hobbit_extent *extent_at(const struct hb_gguf_stream *s, uint64_t offset) {
    int32_t low = 0, high = s->n_extents - 1;
    while (low < high) {
        int32_t middle = low + (high - low + 1) / 2;
        if (s->extents[middle].offset <= offset) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return &s->extents[low];
}

/* A fread of several extents comes back here for each, as short reads are completed by stdio. */
static int64_t read_extent(void *context, uint64_t offset, void *dst, size_t length) {
    struct hb_gguf_stream *s = context;
    const struct hobbit_extent *e = extent_at(s, offset);
    uint64_t within = offset - e->offset;
    if (length > e->length - within) {
        length = (size_t) (e->length - within);
    }
    if (e->source == HOBBIT_SOURCE_MEMORY) {
        memcpy(dst, (const char *) e->data + within, length);
    } else if (e->source == HOBBIT_SOURCE_FILE) {
        size_t done = 0;
        int error = hb_file_read(&s->files[e->file], dst, length, e->file_offset + within, &done);
        if (error != 0 || done == 0) {
            errno = error != 0 ? error : EIO;
            return -1;
        }
        length = done;
        atomic_fetch_add(s->served, length);
    }
    return (int64_t) length;
}

static void close_stream(void *context) {
    struct hb_gguf_stream *s = context;
    for (int32_t i = 0; i < s->n_files; i++) {
        hb_file_close(&s->files[i]);
    }
    free(s);
}

FILE *hb_gguf_stream_open(const struct hobbit_extent *extents, int32_t n_extents, char *const *paths, int32_t n_files,
                          atomic_uint_fast64_t *served, char *err, size_t err_len) {
    struct hb_gguf_stream *s = calloc(1, sizeof *s + (size_t) n_files * sizeof s->files[0]);
    if (s == NULL) {
        snprintf(err, err_len, "out of memory");
        return NULL;
    }
    s->extents = extents;
    s->n_extents = n_extents;
    s->served = served;
    for (; s->n_files < n_files; s->n_files++) {
        int error = hb_file_open(&s->files[s->n_files], paths[s->n_files], false);
        if (error != 0) {
            snprintf(err, err_len, "cannot open %s: %s", paths[s->n_files], strerror(error));
            close_stream(s);
            return NULL;
        }
    }
    const struct hobbit_extent *last = &extents[n_extents - 1];
    FILE *file = hb_stream_new(s, &(struct hb_stream_ops) {read_extent, close_stream}, last->offset + last->length);
    if (file == NULL) {
        snprintf(err, err_len, "cannot make a stream: %s", strerror(errno));
        close_stream(s);
    }
    return file;
}
