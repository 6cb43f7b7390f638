/* What a model is made of: for the files that implement model.h, and no others. */
#ifndef HB_MODEL_IMPL_H
#define HB_MODEL_IMPL_H

#include <pthread.h>

#include "model.h"
#include "schedule.h"
#include "trial.h"
#include "trace.h"

#define HB_DEFAULT_IO_THREADS 4
#define HB_ERROR_BYTES 512
/* At most so many high copies are promoted at a time: more would take memory bandwidth from the computation. */
#define HB_MAX_BACKGROUND 1
#define HB_MOST_EXPECTED 512

/* The reading of one copy into one slot. */
struct hb_load {
    struct hb_job job;
    struct hb_key key;
    int32_t slot;
    bool under_way;  /* else the rest is of the read before: a low copy may also come with its high one */
    bool background; /* nobody waits for it */
    bool ahead;      /* it was predicted, and has not been used yet */
    /* Of a nested high copy: the low one that it is made from, pinned; `with_low` when it is read by the same job. */
    const struct hb_group *nested;
    bool with_low;
    char *data, *low_data;
};

/* A copy that a layer to come will probably use. */
struct hb_expected {
    struct hb_key key;
    bool pinned; /* it is cached, and stays so until that layer begins */
};

struct hb_bank {
    struct hb_arena arena;
    struct hb_load *loads; /* one a slot, so that nothing is allocated while decoding */
};

struct hb_pool {
    void *space;
    size_t space_bytes;
    uint64_t bytes; /* that both banks share */
    struct hb_bank banks[HOBBIT_PRECISIONS];
};

struct hobbit_model {
    struct hb_catalog catalog;
    struct hobbit_extent *extents; /* `data` of memory extents is ours */
    int32_t n_extents;
    struct hb_reader *reader;
    struct hb_cache *cache; /* NULL until the arena is allocated */
    struct hb_tier *tier; /* experts on a device, or NULL */
    bool keeps_space; /* see hb_model_keep_space */
    struct hb_pool *pools;
    int32_t *pool_of_group;
    int32_t n_pools;
    struct hb_rule rule;
    struct range {
        double sum;
        uint64_t n;
    } *ranges; /* one a group: of the router's logits */
    uint16_t *in_vain; /* one an expert: how often its high copy was needed since it was read last */
    struct hb_gathered gathered;
    struct hb_schedule *schedule; /* recorded or replayed, or NULL */
    struct hb_trace *trace;       /* or NULL */
    int32_t n_sequences;          /* begun so far */
    struct hb_rows *rows;         /* of the llama_decode that runs, or NULL */
    bool low_kept;
    uint64_t *asked_at; /* one an expert, with low_kept: when its missing high copy was asked for last */
    uint64_t asks;
    uint64_t *used; /* one an expert: look-ups */
    struct hb_look_ups *look_ups; /* one a group */
    struct hb_key *warm; /* high copies to read before they are asked for; those before `next_warm` are dealt with */
    int32_t n_warm, next_warm;
    uint64_t evicted_before; /* in caches that this one took the place of */
    int32_t in_foreground, in_background; /* reads under way that are waited for, and that are not */
    struct hb_key wanted[HB_MAX_BACKGROUND]; /* high copies to read in the background */
    int32_t n_wanted;
    struct hb_expected expected[HB_MOST_EXPECTED];
    int32_t n_expected;
    struct hb_router *routers; /* one a group */
    struct hb_forecast *forecast; /* NULL: not wanted */
    struct hb_map_predictor *map_predictor; /* NULL: not wanted */
    struct hobbit_prediction prediction;
    struct hb_trial trial; /* of predictors */
    struct {
        int32_t group;  /* computed last */
        uint64_t start; /* of its first layer, ns */
        bool single;    /* it is of one token */
        int32_t last_rows; /* of the last group, when it was computed last */
    } pass;
    pthread_mutex_t lock;       /* see model.h */
    pthread_mutex_t error_lock; /* guards `error` */
    char error[HB_ERROR_BYTES];
    enum hobbit_status error_status;
    struct hb_counters counters;
    const int32_t *cancelled; /* the caller's, or NULL */
};

/* Count a look-up: for the model, and for its group. */
void hb_model_count(struct hobbit_model *model, int32_t group, bool hit);
/* Start reading a copy that has no slot yet; false when too much is pinned or under way. */
bool hb_model_start_read(struct hobbit_model *model, struct hb_key key, bool background);
/* Read nothing in the background any more, and nothing of what is wanted so. Returns when no read is under way. */
void hb_model_end_background(struct hobbit_model *model);
/* Start those of the warm list that there is room for, a few at a time. */
void hb_model_warm_on(struct hobbit_model *model);
/* The low copy beside a cached high one goes, unless it is pinned: see hb_model_choose. `key` is of either. */
void hb_model_drop_replaced(struct hobbit_model *model, struct hb_key key);
/* Protect no more what is expected of the group; -1: of any. */
void hb_model_unprotect(struct hobbit_model *model, int32_t group);
/* A pass through the layers begins: see trial.h. */
void hb_model_note_pass(struct hobbit_model *model, int32_t n_tokens);
/* Keep a sentence about a failed read; `error` as in struct hb_job. */
void hb_model_read_failed(struct hobbit_model *model, int error, int32_t file, uint64_t offset);

/* Of all experts, in the order of the groups. */
static inline int32_t hb_model_number(const struct hobbit_model *model, struct hb_key key) {
    return model->catalog.groups[key.group].first_expert + key.expert;
}

static inline struct hb_key hb_key_in(struct hb_key key, int32_t precision) {
    return (struct hb_key) {key.group, key.expert, precision};
}

#endif
