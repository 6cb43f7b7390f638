/* The public C interface of hobbit's ggml plugin.
 *
 * A `hobbit_model` owns everything needed to stream the experts of one GGUF model: the catalog of where each
 * expert's bytes are, the reader threads, the cache arena and the counters. It is opened from a description of
 * the files that the caller has already parsed and checked; llama.cpp then loads the model through
 * `hobbit_model_stream` (a FILE* that skips expert data) with the expert tensors overridden to
 * a `hobbit_buffer_type_new`, and every context on that model computes its experts here.
 *
 * Threads: one computation at a time per model (contexts are serialised a layer at a time); stats and
 * take_error may be called from any thread. Close a model after every llama_context and llama_model on it.
 */
#ifndef HOBBIT_H
#define HOBBIT_H

#include <stddef.h>
#include <stdint.h>

#define HOBBIT_API __attribute__((visibility("default")))
#pragma GCC visibility push(default)
#ifdef __cplusplus
extern "C" {
#endif

/* cffi reads the declarations between these two marks. */
/* cdef begin */
enum hobbit_status {
    HOBBIT_OK          = 0,
    HOBBIT_IO          = 1, /* a file could not be opened or read */
    HOBBIT_FORMAT      = 2, /* the description does not fit the files */
    HOBBIT_NOMEM       = 3,
    HOBBIT_ARG         = 4,
    HOBBIT_UNSUPPORTED = 5,
};

enum hobbit_io {
    HOBBIT_IO_AUTO     = 0, /* direct where a probe read succeeds, buffered elsewhere */
    HOBBIT_IO_DIRECT   = 1,
    HOBBIT_IO_BUFFERED = 2,
};

enum hobbit_source {
    HOBBIT_SOURCE_FILE   = 0,
    HOBBIT_SOURCE_MEMORY = 1,
    HOBBIT_SOURCE_HOLE   = 2, /* expert data: reading it yields unspecified bytes and no I/O */
};

struct hobbit_file {
    const char *path;
    uint64_t size; /* bytes */
};

/* One expert matrix stack: n_expert matrices of ne0 x ne1, `expert_bytes` apart in the file. */
struct hobbit_matrix {
    const char *name; /* the tensor's name in llama.cpp */
    int32_t group;
    int32_t file;
    int32_t type; /* enum ggml_type */
    int64_t ne0, ne1;
    uint64_t offset; /* of expert 0 in the file, bytes */
    uint64_t expert_bytes;
};

/* What is cached as a unit: all matrices of one expert of one layer. */
struct hobbit_group {
    int32_t layer;
    int32_t n_expert;
};

/* A piece of the virtual file that llama.cpp reads. */
struct hobbit_extent {
    uint64_t offset, length; /* in the virtual file, bytes; extents are sorted and leave no gap */
    int32_t source;          /* enum hobbit_source */
    int32_t file;
    uint64_t file_offset;
    const void *data; /* for HOBBIT_SOURCE_MEMORY; copied at open */
};

struct hobbit_options {
    const struct hobbit_file *files;
    const struct hobbit_matrix *matrices;
    const struct hobbit_group *groups;
    const struct hobbit_extent *extents;
    int32_t n_files, n_matrices, n_groups, n_extents;
    int32_t io;         /* enum hobbit_io */
    int32_t io_threads; /* 0 = choose */
    const int32_t *cancelled; /* while it is not 0, computations stop; outlives the model. NULL: never */
};

struct hobbit_pool {
    int32_t n_slots;
    uint64_t slot_bytes; /* at least hobbit_model_slot_bytes of each of its groups */
};

struct hobbit_stats {
    uint64_t hits, misses, evictions; /* expert look-ups: one per distinct expert, layer and ubatch */
    uint64_t read_bytes;              /* bytes of expert data delivered, alignment padding excluded */
    uint64_t read_calls;
    uint64_t stall_ns;   /* the computation waited for reads */
    uint64_t compute_ns; /* inside the expert matrices */
    uint64_t splits;     /* graph pieces computed here */
    uint64_t dense_bytes; /* served to llama.cpp while loading */
    uint64_t cache_bytes; /* the arena */
    int32_t direct_io;    /* 1: reads bypass the page cache */
    int32_t n_slots;
    int32_t n_cached;
};

struct hobbit_context_memory {
    uint64_t model_bytes, kv_bytes, compute_bytes;
};

/* As llama.cpp's llama_model_tensor_buft_override. */
struct hobbit_override {
    const char *pattern;
    void *buffer_type;
};

struct hobbit_model;
struct llama_context;

/* Add the device to ggml's registry, unless ggml speaks another version of the interface; idempotent. */
int32_t hobbit_register(char *err, size_t err_len);
int32_t hobbit_model_open(const struct hobbit_options *options, struct hobbit_model **out, char *err,
                          size_t err_len);
/* Bytes one slot of this group takes in the arena, padding for direct I/O included. */
uint64_t hobbit_model_slot_bytes(const struct hobbit_model *model, int32_t group);
/* Reserve the arena. `pool_of_group` has one entry a group. */
int32_t hobbit_model_allocate(struct hobbit_model *model, const struct hobbit_pool *pools, int32_t n_pools,
                              const int32_t *pool_of_group, char *err, size_t err_len);
/* A ggml_backend_buffer_type_t for the model's expert tensors; free it after the llama_model. NULL: no memory. */
void *hobbit_buffer_type_new(struct hobbit_model *model);
/* Call it when a llama_model has been loaded: gives its expert tensors their names back. */
void hobbit_buffer_type_loaded(void *buffer_type);
void hobbit_buffer_type_free(void *buffer_type);
void *hobbit_model_stream(struct hobbit_model *model, char *err, size_t err_len); /* FILE* or NULL */
int32_t hobbit_stream_close(void *file);
void hobbit_model_stats(const struct hobbit_model *model, struct hobbit_stats *out);
/* The last failed read as a sentence ("" if none), and forget it. */
void hobbit_model_take_error(struct hobbit_model *model, char *err, size_t err_len);
void *hobbit_abort_callback(void); /* a ggml_abort_callback; its data is an int32_t, as `cancelled` above */
void hobbit_model_close(struct hobbit_model *model); /* joins the threads; NULL is fine */
/* What a context (also one of a model loaded with no_alloc) holds outside our arena. */
void hobbit_context_memory(const struct llama_context *ctx, struct hobbit_context_memory *out);
/* Q8_0 blocks as two planes, and back: see nested.h. HOBBIT_UNSUPPORTED where a block's scale is out of range. */
int32_t hobbit_nested_split(const void *q8_0, void *high_plane, void *low_plane, size_t n_blocks,
                            const float *importance, size_t row_blocks);
void hobbit_nested_merge(const void *high_plane, const void *low_plane, void *q8_0, size_t n_blocks);
/* cdef end */

#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop

#endif
