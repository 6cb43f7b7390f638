/* Whose the rows of a computation are: said from outside, asked for layer by layer. */
#include "model_impl.h"

static bool add_sequences(struct hobbit_model *m, const struct hobbit_rows *rows) {
    bool good = true;
    for (int32_t i = 0; good && i < rows->n_rows; i++) {
        bool new = i == 0 || rows->sequences[i] != rows->sequences[i - 1];
        good = !new || hb_cache_add_sequence(m->cache, rows->sequences[i]);
    }
    return good;
}

static void exchange(struct hobbit_model *m, struct hb_rows *rows) {
    struct hb_rows *old = m->rows;
    m->rows = rows;
    hb_rows_free(old);
}

int32_t hobbit_model_rows(struct hobbit_model *m, const struct hobbit_rows *rows, char *err, size_t err_len) {
    int32_t status = HOBBIT_OK;
    hb_model_lock(m);
    if (rows == NULL) {
        exchange(m, NULL);
    } else if (m->cache == NULL || !hb_rows_make_sense(rows)) {
        snprintf(err, err_len, "the rows of the batch make no sense");
        status = HOBBIT_ARG;
    } else {
        exchange(m, add_sequences(m, rows) ? hb_rows_new(rows) : NULL);
        if (m->rows == NULL) {
            snprintf(err, err_len, "out of memory");
            status = HOBBIT_NOMEM;
        }
    }
    hb_model_unlock(m);
    return status;
}

void hobbit_model_end_sequence(struct hobbit_model *m, int32_t sequence) {
    hb_model_lock(m);
    if (m->cache != NULL && sequence >= 0) {
        hb_cache_reset(m->cache, sequence);
        if (m->trace != NULL) {
            (void) hb_trace_sequence(m->trace, sequence); /* the next event reports the error */
        }
    }
    hb_model_unlock(m);
}

struct hb_owners hb_model_owners(struct hobbit_model *m, int32_t group, int64_t n_rows) {
    return hb_rows_next(m->rows, group, m->catalog.n_groups, n_rows);
}
