#include "rows.h"

#include <stdlib.h>

#include "records.h"

/* Some rows of a ubatch, consecutive in the lists. */
struct span {
    int32_t first, n, most;
};

struct hb_rows {
    int32_t n_ubatches, ubatch; /* the one being computed; n_ubatches: what comes is not known */
    int32_t last_group;
    int32_t *sequences, *tokens; /* all rows, then those with outputs once more */
    struct {
        struct span all, outputs;
    } ubatches[];
};

bool hb_rows_make_sense(const struct hobbit_rows *rows) {
    int64_t n = 0;
    bool good = rows->n_rows >= 0 && rows->n_ubatches >= 0;
    for (int32_t u = 0; good && u < rows->n_ubatches; u++) {
        good = rows->ubatches[u] > 0;
        n += rows->ubatches[u];
    }
    for (int32_t i = 0; good && i < rows->n_rows; i++) {
        good = rows->sequences[i] >= 0 && rows->tokens[i] >= 0;
    }
    return good && n == rows->n_rows;
}

void hb_rows_free(struct hb_rows *r) {
    if (r != NULL) {
        free(r->sequences);
        free(r->tokens);
        free(r);
    }
}

/* Appends the rows first .. first + n - 1, or of them those with outputs. */
static struct span append(struct hb_rows *r, const struct hobbit_rows *from, int32_t first, int32_t n, int32_t to,
                          bool outputs) {
    struct span span = {.first = to};
    int32_t counts[HB_RECORDS] = {0};
    for (int32_t i = first; i < first + n; i++) {
        if (outputs && from->outputs[i] == 0) {
            continue;
        }
        r->sequences[to + span.n] = from->sequences[i];
        r->tokens[to + span.n++] = from->tokens[i];
        int32_t count = ++counts[hb_records_index(from->sequences[i])];
        span.most = count > span.most ? count : span.most;
    }
    return span;
}

struct hb_rows *hb_rows_new(const struct hobbit_rows *from) {
    struct hb_rows *r = calloc(1, sizeof *r + (size_t) from->n_ubatches * sizeof *r->ubatches);
    size_t n = 2 * (size_t) from->n_rows + 1;
    if (r == NULL) {
        return NULL;
    }
    r->sequences = malloc(n * sizeof *r->sequences);
    r->tokens = malloc(n * sizeof *r->tokens);
    if (r->sequences == NULL || r->tokens == NULL) {
        hb_rows_free(r);
        return NULL;
    }
    int32_t first = 0, to = from->n_rows;
    for (int32_t u = 0; u < from->n_ubatches; u++) {
        r->ubatches[u].all = append(r, from, first, from->ubatches[u], first, false);
        r->ubatches[u].outputs = append(r, from, first, from->ubatches[u], to, true);
        first += from->ubatches[u];
        to += r->ubatches[u].outputs.n;
    }
    r->n_ubatches = from->n_ubatches;
    r->ubatch = -1;
    return r;
}

static bool begins_ubatch(const struct hb_rows *r, int32_t group, int32_t n_groups) {
    bool same_layer = group == r->last_group && n_groups > 1; /* in two pieces */
    return r->ubatch < 0 || (group <= r->last_group && !same_layer);
}

struct hb_owners hb_rows_next(struct hb_rows *r, int32_t group, int32_t n_groups, int64_t n_rows) {
    const struct hb_owners unknown = {.most = 0};
    if (r == NULL || r->ubatch == r->n_ubatches) {
        return unknown;
    }
    r->ubatch += begins_ubatch(r, group, n_groups);
    r->last_group = group;
    if (r->ubatch == r->n_ubatches) {
        return unknown;
    }
    const struct span *all = &r->ubatches[r->ubatch].all, *outputs = &r->ubatches[r->ubatch].outputs;
    const struct span *span = n_rows == all->n ? all : outputs;
    if (n_rows != span->n) {
        r->ubatch = r->n_ubatches;
        return unknown;
    }
    return (struct hb_owners) {r->sequences + span->first, r->tokens + span->first, span->most};
}
