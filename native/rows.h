/* Whose the rows of a layer are. llama.cpp tells a backend the routing of each row and nothing else, so the caller
 * says before a llama_decode in which order the rows of the batch will be computed, and this follows the layers as
 * they come.
 *
 * A ubatch ends where a group comes that is not after the one before. A layer has all rows of its ubatch, or those
 * with outputs (as the last layer, where few logits are asked for). As soon as a layer has another number of rows,
 * what the caller said is not what is computed, and no row is known until it says something new. */
#ifndef HB_ROWS_H
#define HB_ROWS_H

#include <stdbool.h>
#include <stdint.h>

#include "hobbit.h"

struct hb_rows;

/* The rows of one layer; all NULL and 0: not known. */
struct hb_owners {
    const int32_t *sequences, *tokens; /* of each row */
    int32_t most;                      /* rows that the sequence with most of them has */
};

/* The rows to come, which have to make sense; the lists are copied. NULL when memory is short. */
struct hb_rows *hb_rows_new(const struct hobbit_rows *rows);
void hb_rows_free(struct hb_rows *rows); /* NULL is fine */
/* No number is negative, and the ubatches have as many rows as there are. */
bool hb_rows_make_sense(const struct hobbit_rows *rows);
/* Group `group` of `n_groups` is computed, for so many rows. NULL rows are not known. */
struct hb_owners hb_rows_next(struct hb_rows *rows, int32_t group, int32_t n_groups, int64_t n_rows);

#endif
