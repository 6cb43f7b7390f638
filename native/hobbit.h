/* The public C interface of hobbit's ggml plugin.
 *
 * A `hobbit_model` owns everything needed to stream the experts of one GGUF model: the catalog of where each
 * expert's bytes are, the reader threads, the cache arena and the counters. It is opened from a description of
 * the files that the caller has already parsed and checked; llama.cpp then loads the model through
 * `hobbit_model_stream` (a FILE* that skips expert data) with the expert tensors overridden to
 * a `hobbit_buffer_type_new`, and every context on that model computes its experts here.
 *
 * Threads: one computation at a time per model (contexts are serialised a layer at a time); stats, look_ups, usage,
 * settle and take_error may be called from any thread. Close a model after every llama_context and llama_model on it.
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
    HOBBIT_DEVICE      = 6, /* a device or server failed, or is not there */
};

enum hobbit_io {
    HOBBIT_IO_AUTO     = 0, /* direct where a probe read succeeds, buffered elsewhere */
    HOBBIT_IO_DIRECT   = 1,
    HOBBIT_IO_BUFFERED = 2,
};

/* Of a copy of an expert, and what a (token, expert) pair needs. */
enum hobbit_precision {
    HOBBIT_HIGH       = 0, /* the model's own bytes */
    HOBBIT_LOW        = 1, /* fewer bits, from another file */
    HOBBIT_SKIP       = 2, /* not computed: the expert adds nothing */
    HOBBIT_PRECISIONS = 2, /* kinds of copies */
};

enum { HOBBIT_SCORE_BINS = 1000 };

enum hobbit_trace_flags {
    HOBBIT_TRACE_PROBS = 1, /* the router's softmax over all experts too, where it is a softmax of a linear layer */
};

/* What a routing trace has: docs/trace.md. */
enum hobbit_event {
    HOBBIT_EVENT_END       = 0,
    HOBBIT_EVENT_LAYER     = 1,
    HOBBIT_EVENT_SEQUENCE  = 2,
    HOBBIT_EVENT_PREDICTED = 3,
    HOBBIT_EVENT_FORGET    = 4,
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

/* One expert matrix stack: n_expert matrices of ne0 x ne1, `expert_bytes` apart in the file. A group has low copies
 * of all its matrices or of none; a low matrix has the name and the shape of its high one, and comes after it. */
struct hobbit_matrix {
    const char *name; /* the tensor's name in llama.cpp */
    int32_t group;
    int32_t precision; /* HOBBIT_HIGH or HOBBIT_LOW */
    int32_t file;
    int32_t type; /* enum ggml_type */
    int64_t ne0, ne1;
    uint64_t offset; /* of expert 0 in the file, bytes */
    uint64_t expert_bytes;
    uint64_t plane_bytes; /* of a nested high matrix: what the file has of an expert there, the plane that completes the
                             low copy (see nested.h); 0: all of it */
};

/* What is cached as a unit: all matrices of one expert of one layer, in one precision. */
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

/* Memory for cached copies of the groups that use it. High and low copies share `bytes`, whatever the mixture. */
struct hobbit_pool {
    uint64_t bytes;
    uint64_t slot_bytes[2]; /* by precision: at least hobbit_model_slot_bytes of each of its groups */
    int32_t n_slots[2];     /* by precision: the most copies that are cached at a time; 0 low ones: none ever */
};

/* Which precision a (token, expert) pair needs. Its score s is the sum of the token's larger gate weights, of all
 * its gate weights scaled to sum 1: 0 for the most important expert (HOBBIT, arXiv 2411.01433, section 3.2).
 * s <= t1: high; s <= t2: low; else skip. In a ubatch an expert gets the strongest need of its tokens. */
struct hobbit_rule {
    const float *t1, *t2;  /* one a group, t1 <= t2; copied. NULL: no scoring, everything is high */
    int32_t deterministic; /* the need decides alone; else a better copy that is cached is used */
    int32_t renormalise;   /* after a skip, the token's other gate weights grow to the old sum */
    int32_t patience;      /* an expert's high copy is read when it was needed so often; before, a low one is used */
    int32_t experts;       /* a token's others are skipped; 0: all are used */
    int32_t reversed;      /* for comparisons: s sums the smaller gate weights, so that the important go first */
    float substitute;      /* lambda of cache-aware routing, for comparisons; 0: off. See native/substitute.h */
    int32_t per_token;     /* with deterministic: each pair gets its own need, not the strongest of the ubatch */
};

/* Who is evicted; the formulas are in native/policy.h. */
enum hobbit_policy_kind {
    HOBBIT_POLICY_LRU      = 0,
    HOBBIT_POLICY_LFU      = 1,
    HOBBIT_POLICY_LFRU     = 2,
    HOBBIT_POLICY_LCU      = 3,
    HOBBIT_POLICY_HOBBIT   = 4,
    HOBBIT_POLICY_DECAY    = 5,
    HOBBIT_POLICY_FARTHEST = 6, /* for simulations: Belady */
};

struct hobbit_policy {
    int32_t kind;
    float w_lru, w_lfu, w_lhu, w_fld; /* HOBBIT; DECAY uses w_fld */
    float half_life;                  /* DECAY, in tokens */
    float low_cost;                   /* LCU: bytes of a low copy over those of a high one */
};

/* A routing trace in arrays, as hobbit/trace.py reads it. */
struct hobbit_routing {
    int64_t n_events, n_pairs;
    const uint8_t *kind;                    /* [n_events] enum hobbit_event */
    const int32_t *group, *n_rows, *n_used; /* [n_events]; of a prediction one row */
    const int64_t *pair_at;                 /* [n_events] where its n_rows * n_used pairs begin */
    const uint8_t *has_weights;             /* [n_events] */
    const int32_t *experts;                 /* [n_pairs] */
    const float *weights;                   /* [n_pairs] gate weights; of a prediction the probabilities */
};

/* A cache that a trace is replayed against, and who decides; native/simulate.h says how. */
struct hobbit_simulation {
    int32_t n_groups, n_pools;
    const int32_t *n_expert, *pool_of_group; /* [n_groups] */
    const uint64_t *expert_bytes;            /* [n_groups][2] of a copy, by precision; 0: there is none */
    const struct hobbit_pool *pools;
    struct hobbit_policy policy;             /* any kind */
    struct hobbit_rule rule;                 /* without `substitute`: the trace has what was computed */
    int32_t predicted;                       /* take in the trace's predictions */
    double least_odds;                       /* what is predicted with smaller ones is protected, but not read ahead */
    double disk_bytes_s;                     /* 0: reading takes no time */
    double compute_s;                        /* of one layer, for one token */
};

/* What came of it. The arrays are the caller's, [n_events]: a layer's are at its event, others have 0. */
struct hobbit_simulated {
    uint32_t *hits, *misses, *evictions;
    uint64_t *read_bytes, *read_low_bytes; /* low copies are in both */
    double *seconds;
    uint64_t pairs[3];              /* by precision */
    uint64_t promotions, stand_ins; /* as in hobbit_stats, as the next three */
    uint64_t ahead, ahead_used, ahead_wasted_bytes;
    uint64_t crowded; /* layers that needed more at once than there was room for: in the engine, arrivals decide then */
};

/* Which experts the next layers will use. */
enum hobbit_predict {
    HOBBIT_PREDICT_NONE = 0,
    HOBBIT_PREDICT_GATE = 1, /* the next layers' routers on this layer's input: see native/forecast.h */
    HOBBIT_PREDICT_MAP  = 2, /* what earlier tokens with a similar routing used (fMoE): see native/map_predictor.h */
    HOBBIT_PREDICT_AUTO = 3, /* whichever is fastest: of none and gate, and of map where map_capacity is not 0 */
};

struct hobbit_prediction {
    int32_t kind;   /* enum hobbit_predict */
    int32_t depth;  /* layers to look ahead at most */
    int32_t always; /* not of AUTO; else it is left out for tokens for which that was found to be faster */
    int32_t n_embd; /* what routers get of a token */
    float least_odds; /* what is predicted with smaller ones is not read ahead */
    int32_t map_capacity; /* MAP and AUTO: how many tokens' maps are kept */
};

/* The rows of a llama_decode, in the order in which they are computed: see hobbit/batches.py. */
struct hobbit_rows {
    const int32_t *sequences; /* [n_rows], llama.cpp's sequence ids */
    const int32_t *tokens;    /* [n_rows], the number of the token in its sequence, from 0 */
    const int32_t *outputs;   /* [n_rows], not 0: logits are asked for, so that every layer computes the row */
    const int32_t *ubatches;  /* [n_ubatches], the rows of each ubatch */
    int32_t n_rows, n_ubatches;
};

struct hobbit_stats {
    uint64_t hits, misses, evictions; /* expert look-ups: one per distinct copy, layer and ubatch */
    uint64_t read_bytes;              /* bytes of expert data delivered, alignment padding excluded */
    uint64_t read_calls;
    uint64_t read_low_bytes;                      /* of them, of low copies */
    uint64_t pairs_high, pairs_low, pairs_skip;   /* (token, expert) pairs by the precision they got */
    uint64_t scored, unscored;                    /* pairs with a score, and those whose gate weights are not seen */
    uint64_t promotions;                          /* high copies read although a low one was cached */
    uint64_t stand_ins;                           /* experts that needed high and got a low copy that is kept */
    int32_t predictor;        /* enum hobbit_predict: in force now */
    uint64_t predicted, predicted_right; /* experts predicted for the next layer, and those that it chose */
    uint64_t ahead, ahead_used; /* copies that prediction asked for, and those of them that were used in time */
    uint64_t ahead_bytes, ahead_wasted_bytes; /* read for predictions, and of that for copies never used */
    uint64_t stall_ns;   /* the computation waited for reads */
    uint64_t predict_ns; /* it predicted which experts come next */
    uint64_t manage_ns;  /* it looked up, evicted and asked for reads */
    uint64_t compute_ns; /* inside the expert matrices */
    uint64_t splits;     /* graph pieces computed here */
    uint64_t dense_bytes; /* served to llama.cpp while loading */
    uint64_t device_hits, device_pairs; /* look-ups, all of them hits, and pairs, of experts on the device */
    uint64_t device_low_pairs;          /* of these pairs, those in low precision */
    uint64_t device_bytes;              /* copied into it */
    uint64_t device_brought;            /* experts that were copied there to be computed in the same layer */
    /* Layers that both computed: all of it, each one's part, and the longer part. */
    uint64_t split_ns, split_cpu_ns, split_device_ns, split_longer_ns;
    uint64_t break_even_pairs; /* hb_costs_break_even, as of now */
    uint64_t device_ns, device_wait_ns; /* it had a batch; and the computation had nothing to do but wait for it */
    uint64_t device_declined;           /* batches that it could not compute after all */
    uint64_t cache_bytes; /* the arena */
    int32_t direct_io;    /* 1: reads bypass the page cache */
    int32_t n_slots;
    int32_t n_cached;
};

struct hobbit_device_memory {
    char name[64];
    uint64_t model_bytes, kv_bytes, compute_bytes;
};

/* In the machine's memory, which is also that of some devices; and what devices have in memory of their own. */
struct hobbit_context_memory {
    uint64_t model_bytes, kv_bytes, compute_bytes;
    int32_t n_devices;
    struct hobbit_device_memory devices[16];
};

/* As llama.cpp's llama_model_tensor_buft_override. */
struct hobbit_override {
    const char *pattern;
    void *buffer_type;
};

/* A device of ggml's. */
struct hobbit_device_info {
    char name[64], description[128];
    int32_t shares_memory; /* its memory is the machine's own */
    uint64_t free_bytes, total_bytes;
};

/* Who computes an expert, where there is a device. */
enum hobbit_dispatch {
    HOBBIT_DISPATCH_AUTO,   /* by what it costs: the CPU, or the device, where weights are copied for it if that pays */
    HOBBIT_DISPATCH_DEVICE, /* the device, where weights are copied that are not there */
    HOBBIT_DISPATCH_CPU,    /* the CPU */
    HOBBIT_DISPATCH_SPLIT,  /* the device, those that are there; the CPU the others */
};

/* An arena for the groups that use a stack set: in each precision that has slots, their matrices have the same types
 * and shapes. Stacks do not share bytes, so that the two kinds of slots do not become one another. */
struct hobbit_device_pool {
    uint64_t expert_bytes[HOBBIT_PRECISIONS];
    int32_t n_slots[HOBBIT_PRECISIONS]; /* 0: none of them go there */
};

struct hobbit_device_plan {
    const struct hobbit_device_pool *pools;
    const int32_t *pool_of_group; /* one a group of the model */
    int32_t n_pools;
    uint64_t batch_bytes; /* for the activations of what is computed at a time */
    uint64_t token_bytes; /* the most that are copied there for each token, but for what is computed at once */
    int32_t dispatch;     /* enum hobbit_dispatch */
    int32_t n_threads;    /* of the CPU, for what is measured at start */
    uint64_t read_ns_per_mib; /* what reading an expert takes, as of the start; 0: unknown */
};

/* For experiments: a device takes at least so long. */
struct hobbit_device_delays {
    uint64_t batch_ns, pair_ns; /* a batch, and besides for each of its pairs */
    uint64_t copy_ns_per_mib;   /* a copy there */
    int32_t turns; /* if not 0: it copies and computes by turns, though it could do both */
};

struct hobbit_model;
struct hobbit_device;
struct hobbit_caller;
struct hobbit_call;
typedef void hobbit_function(void *context);
struct llama_context;

/* Add the device to ggml's registry, unless ggml speaks another version of the interface; idempotent. */
int32_t hobbit_register(char *err, size_t err_len);
int32_t hobbit_model_open(const struct hobbit_options *options, struct hobbit_model **out, char *err,
                          size_t err_len);
/* Bytes one slot of this group takes in the arena, padding for direct I/O included. */
uint64_t hobbit_model_slot_bytes(const struct hobbit_model *model, int32_t group, int32_t precision);
/* Reserve the arena; `pool_of_group` has one entry a group. Again: another one in its place, from the next layer on.
 * What was cached is dropped, and the policy (LRU again), low copies that are kept and what the cache knows of uses
 * begin anew; hobbit_model_usage does not. HOBBIT_NOMEM leaves the model without a cache. */
int32_t hobbit_model_allocate(struct hobbit_model *model, const struct hobbit_pool *pools, int32_t n_pools,
                              const int32_t *pool_of_group, char *err, size_t err_len);
/* In force from the next layer on. HOBBIT_ARG: a number makes no sense, or low copies are asked for and not there. */
int32_t hobbit_model_set_rule(struct hobbit_model *model, const struct hobbit_rule *rule, char *err, size_t err_len);
/* Write to a file which precision each expert gets from now on, or take it from such a file in place of the rule: a
 * replay then computes what the recorded run did. `note` is the caller's, at the head of the file. One at a time. */
int32_t hobbit_model_record(struct hobbit_model *model, const char *path, const char *note, char *err, size_t err_len);
int32_t hobbit_model_replay(struct hobbit_model *model, const char *path, char *err, size_t err_len);
int32_t hobbit_model_schedule_end(struct hobbit_model *model, char *err, size_t err_len); /* nothing open is fine */
/* Write to a file which experts the router chooses from now on: the format is in docs/trace.md. `note` is the caller's,
 * at the head of the file. For a model with a cache; one at a time, which ends the one before. */
int32_t hobbit_model_trace(struct hobbit_model *model, const char *path, const char *note, uint32_t flags, char *err,
                           size_t err_len);
int32_t hobbit_model_trace_end(struct hobbit_model *model, char *err, size_t err_len); /* nothing open is fine */
/* Read every low copy and keep it from now on. Then no computation under a rule that is not deterministic waits for a
 * read: where the high copy is missing the low one answers, and the high one is read in the background if it is asked
 * for again before as many others were as there is room for. */
int32_t hobbit_model_keep_low(struct hobbit_model *model, char *err, size_t err_len);
/* Evict by this policy from now on; a model starts with LRU. HOBBIT_ARG: a number makes no sense. */
int32_t hobbit_model_set_policy(struct hobbit_model *model, const struct hobbit_policy *policy, char *err,
                                size_t err_len);
/* The bytes that predicting so takes, for groups with so many experts. */
uint64_t hobbit_prediction_bytes(const struct hobbit_prediction *prediction, int32_t n_groups,
                                 const int32_t *n_experts);
/* HOBBIT_ARG: a number makes no sense. */
int32_t hobbit_model_set_prediction(struct hobbit_model *model, const struct hobbit_prediction *prediction, char *err,
                                    size_t err_len);
/* Keep the expert maps in a file, whole or not at all, and take them from it again; `identity` has the 32 bytes that
 * tell this model. Without maps, or with no new ones, nothing is written. HOBBIT_IO: errno says why in words;
 * HOBBIT_FORMAT: the file is of another model, shape or capacity, or damaged: the model goes on without any. */
int32_t hobbit_model_save_maps(struct hobbit_model *model, const char *path, const uint8_t *identity, char *err,
                               size_t err_len);
int32_t hobbit_model_load_maps(struct hobbit_model *model, const char *path, const uint8_t *identity, char *err,
                               size_t err_len);
/* What comes now is another sequence: what the policy knows of the uses in the last one is out of date. Those that
 * hobbit_model_rows tells apart are sequences beside it, but for number 0, which is this one. */
void hobbit_model_new_sequence(struct hobbit_model *model);
/* Say whose the rows of the next llama_decode are, for the policy and the trace: what is computed does not depend on
 * it. From the first layer on that has other rows, and from the next call with NULL on, rows are sequence 0's.
 * HOBBIT_ARG: a number makes no sense. */
int32_t hobbit_model_rows(struct hobbit_model *model, const struct hobbit_rows *rows, char *err, size_t err_len);
/* One that hobbit_model_rows named is over, or its number is given to another: what the policy knows of its uses is out
 * of date, and of the others' is not. */
void hobbit_model_end_sequence(struct hobbit_model *model, int32_t sequence);
/* Drop every cached copy that is not kept, and read no more in advance. */
void hobbit_model_forget(struct hobbit_model *model);
/* How often each expert was looked up since the model was opened: [n_experts], of all groups in order. */
void hobbit_model_usage(struct hobbit_model *model, uint64_t *counts);
/* The look-ups of each group since the model was opened: [n_groups] each. Waits for nothing. */
void hobbit_model_look_ups(const struct hobbit_model *model, uint64_t *hits, uint64_t *misses);
/* Read the high copies of these experts, (groups[i], experts[i]), in this order and in the background, as far as there
 * is room without evicting any copy; a later list replaces what is left of an earlier one. The first few are asked for
 * now, and more whenever a layer is computed or hobbit_model_settle is called. HOBBIT_ARG: one does not exist, or the
 * model has no cache yet. A read that fails is not reported: if the expert is needed, it fails again. */
int32_t hobbit_model_warm(struct hobbit_model *model, const int32_t *groups, const int32_t *experts, int32_t n,
                          char *err, size_t err_len);
/* Take in what was read in the background, and go on with it; from any thread. Returns how many are still to come: no
 * more calls are needed at 0. Waits for nobody: while a layer is computed, which does the same, it only returns 1. */
int32_t hobbit_model_settle(struct hobbit_model *model);
/* Count scores above 0 into [n_groups][HOBBIT_SCORE_BINS] from now on; the last bin holds 1. NULL ends it. */
void hobbit_model_observe(struct hobbit_model *model, int64_t *histogram);
/* Sum the squared inputs of expert matrices from now on, and count the rows: sums[m] is [n_expert][ne0] and counts[m]
 * [n_expert] for high matrix m of the options; sums[m] may be NULL. Twice NULL ends it. */
void hobbit_model_collect(struct hobbit_model *model, float *const *sums, int64_t *const *counts);
/* A ggml_backend_buffer_type_t for the model's expert tensors; free it after the llama_model. NULL: no memory. */
void *hobbit_buffer_type_new(struct hobbit_model *model);
/* Call it when a llama_model has been loaded: gives its expert tensors their names back. */
void hobbit_buffer_type_loaded(void *buffer_type);
void *hobbit_host_buffer_type(void); /* ggml's, of the machine's memory */
void hobbit_buffer_type_free(void *buffer_type);
void *hobbit_model_stream(struct hobbit_model *model, char *err, size_t err_len); /* FILE* or NULL */
int32_t hobbit_stream_close(void *file);
void hobbit_model_stats(const struct hobbit_model *model, struct hobbit_stats *out);
/* What failed last, a read (HOBBIT_IO) or a device (HOBBIT_DEVICE), as a sentence ("" if nothing, and HOBBIT_OK), and
 * forget it. */
int32_t hobbit_model_take_error(struct hobbit_model *model, char *err, size_t err_len);
void *hobbit_abort_callback(void); /* a ggml_abort_callback; its data is an int32_t, as `cancelled` above */
void hobbit_model_close(struct hobbit_model *model); /* joins the threads; NULL is fine */
/* Instead, of a model that a lost thread may still use, perhaps with its lock: give the cached experts' memory back, and
 * nothing else. What that thread still computes is nonsense that nobody reads. */
void hobbit_model_abandon(struct hobbit_model *model);
/* What a context (also one of a model loaded with no_alloc) holds outside our arena. */
void hobbit_context_memory(const struct llama_context *ctx, struct hobbit_context_memory *out);

/* Make the devices of one of llama.cpp's RPC servers (HOST:PORT) known to hobbit; llama.cpp does not see them. Those of
 * one that was lost get new names. `name` comes with the one that is wanted, or "" for the first, and leaves with what it
 * is called now. `library`: ggml's RPC backend, loaded where ggml has none built in. */
int32_t hobbit_rpc_connect(const char *library, const char *endpoint, char *name, size_t name_len, char *err,
                           size_t err_len);
/* Start such a server with the CPU; returns only when it cannot, which is HOBBIT_DEVICE. For tests. */
int32_t hobbit_rpc_serve(const char *library, const char *endpoint, int32_t n_threads, char *err, size_t err_len);
/* Of the devices that can hold experts, one after another with a comma between. */
void hobbit_device_names(char *names, size_t names_len);
/* A device by ggml's name for it, ready to compute; n_threads is for the CPU's. */
int32_t hobbit_device_open(const char *name, int32_t n_threads, struct hobbit_device **out, char *err, size_t err_len);
int32_t hobbit_device_takes_layers(const struct hobbit_device *device); /* 0: llama.cpp would not give it any */
int32_t hobbit_device_is_remote(const struct hobbit_device *device); /* an RPC server's */
/* As llama.cpp's llama_model_params has `devices`, so that its layers go there, if anywhere; the device's own. */
void *hobbit_device_for_layers(struct hobbit_device *device);
/* A thread for calls of llama.cpp that need a device, which is NULL for any of this process: what fails there would end
 * the process, or never return. The device outlives it; while `cancelled` is set, one that hangs is given up. */
int32_t hobbit_caller_new(struct hobbit_device *device, const int32_t *cancelled, struct hobbit_caller **out);
/* Have the function called there. HOBBIT_DEVICE: none is any more. */
int32_t hobbit_caller_start(struct hobbit_caller *caller, hobbit_function *function, void *context,
                            struct hobbit_call **out, char *err, size_t err_len);
/* Wait for it, so many milliseconds at most; `done`: it has ended, and the call is no more; it is the status that is
 * returned, and 1. HOBBIT_DEVICE: in vain, or it never will, but may be running still; nor will another. */
int32_t hobbit_call_wait(struct hobbit_call *call, int32_t timeout_ms, int32_t *done, char *err, size_t err_len);
void hobbit_caller_close(struct hobbit_caller *caller); /* NULL is fine */
void hobbit_device_delay(struct hobbit_device *device, const struct hobbit_device_delays *delays); /* before it is used */
void hobbit_device_describe(const struct hobbit_device *device, struct hobbit_device_info *out);
/* Give the model's experts memory there, once, after hobbit_model_allocate. What is there is computed there while the
 * rest is computed here. If the device fails, the computation that needs it does, and later ones do without. */
int32_t hobbit_model_use_device(struct hobbit_model *model, struct hobbit_device *device,
                                const struct hobbit_device_plan *plan, char *err, size_t err_len);
/* Who computes what from the next layer on. */
int32_t hobbit_model_set_dispatch(struct hobbit_model *model, int32_t dispatch);
void hobbit_device_close(struct hobbit_device *device); /* after its model; NULL is fine */

/* Whether rows of one ggml_type can be made into another, and whether making that type takes an importance. */
int32_t hobbit_can_quantize(int32_t from_type, int32_t to_type);
int32_t hobbit_needs_importance(int32_t type);
/* Make `n_rows` rows of `row_len` weights into another type. `importance` has `row_len` weights of columns, finite and
 * not negative, or is NULL. The sums of (w - w')^2 and of w^2 tell what is lost. HOBBIT_ARG: the row length fits no
 * blocks, or the importance is missing or unusable; HOBBIT_UNSUPPORTED: one of the types; HOBBIT_FORMAT: a weight is
 * not finite; HOBBIT_NOMEM. Needs no model, keeps no state: from any thread. */
int32_t hobbit_quantize(int32_t from_type, const void *src, int32_t to_type, void *dst, int64_t n_rows,
                        int64_t row_len, const float *importance, double *squared_error, double *squared_norm);
/* Q8_0 blocks as two planes, and back: see nested.h. HOBBIT_UNSUPPORTED where a block's scale is out of range. */
int32_t hobbit_nested_split(const void *q8_0, void *high_plane, void *low_plane, size_t n_blocks,
                            const float *importance, size_t row_blocks);
void hobbit_nested_merge(const void *high_plane, const void *low_plane, void *q8_0, size_t n_blocks);
/* Replay a trace, from an empty cache. HOBBIT_ARG: a number makes no sense, the cache is too small for what one layer
 * needs, or the rule wants gate weights that the trace does not have. Needs no model and keeps no state. */
int32_t hobbit_simulate(const struct hobbit_routing *trace, const struct hobbit_simulation *simulation,
                        struct hobbit_simulated *out, char *err, size_t err_len);
/* cdef end */

#ifdef __cplusplus
}
#endif
#pragma GCC visibility pop

#endif
