/* Description: rows are followed through ubatches and layers; when the layers have others, none is known. */
#include "rows.h"

#include "check.h"
#include "faults.h"

static const int32_t sequences[] = {0, 0, 1, 1, 4, 1};
static const int32_t tokens[] = {7, 8, 0, 1, 5, 2};
static const int32_t outputs[] = {0, 1, 0, 0, 1, 1};

static struct hb_rows *two_ubatches(void) {
    struct hb_rows *rows = hb_rows_new(&(struct hobbit_rows) {
        .sequences = sequences, .tokens = tokens, .outputs = outputs, .ubatches = (int32_t[]) {4, 2}, .n_rows = 6,
        .n_ubatches = 2});
    CHECK(rows != NULL);
    return rows;
}

static void check_owners(struct hb_owners owners, int64_t n, const int32_t *seqs, const int32_t *toks, int32_t most) {
    CHECK(owners.sequences != NULL && owners.tokens != NULL);
    CHECK(memcmp(owners.sequences, seqs, (size_t) n * sizeof *seqs) == 0);
    CHECK(memcmp(owners.tokens, toks, (size_t) n * sizeof *toks) == 0);
    CHECK_EQUAL(owners.most, most);
}

static void check_unknown(struct hb_owners owners) {
    CHECK(owners.sequences == NULL && owners.tokens == NULL && owners.most == 0);
}

static void rows_are_followed_layer_by_layer(void) {
    struct hb_rows *rows = two_ubatches();
    for (int32_t group = 0; group < 2; group++) {
        check_owners(hb_rows_next(rows, group, 3, 4), 4, sequences, tokens, 2);
    }
    check_owners(hb_rows_next(rows, 1, 3, 4), 4, sequences, tokens, 2); /* a layer in two pieces */
    check_owners(hb_rows_next(rows, 2, 3, 1), 1, (int32_t[]) {0}, (int32_t[]) {8}, 1);
    for (int32_t group = 0; group < 3; group++) {
        check_owners(hb_rows_next(rows, group, 3, 2), 2, sequences + 4, tokens + 4, 1);
    }
    check_unknown(hb_rows_next(rows, 0, 3, 4)); /* a ubatch that nobody spoke of */
    check_unknown(hb_rows_next(rows, 1, 3, 4));
    hb_rows_free(rows);
}

static void one_group_ends_a_ubatch_each_time(void) {
    struct hb_rows *rows = two_ubatches();
    check_owners(hb_rows_next(rows, 0, 1, 4), 4, sequences, tokens, 2);
    check_owners(hb_rows_next(rows, 0, 1, 2), 2, sequences + 4, tokens + 4, 1);
    check_unknown(hb_rows_next(rows, 0, 1, 2));
    hb_rows_free(rows);
}

static void a_layer_with_other_rows_ends_it(void) {
    struct hb_rows *rows = two_ubatches();
    check_owners(hb_rows_next(rows, 0, 2, 4), 4, sequences, tokens, 2);
    check_unknown(hb_rows_next(rows, 1, 2, 3));
    check_unknown(hb_rows_next(rows, 0, 2, 2));
    hb_rows_free(rows);
    check_unknown(hb_rows_next(NULL, 0, 2, 4));
}

static void a_layer_may_have_no_rows(void) {
    const int32_t none[6] = {0};
    struct hb_rows *rows = hb_rows_new(&(struct hobbit_rows) {
        .sequences = sequences, .tokens = tokens, .outputs = none, .ubatches = (int32_t[]) {6}, .n_rows = 6,
        .n_ubatches = 1});
    check_owners(hb_rows_next(rows, 0, 2, 6), 6, sequences, tokens, 3);
    check_owners(hb_rows_next(rows, 1, 2, 0), 0, sequences, tokens, 0);
    hb_rows_free(rows);
}

static bool make_sense(int32_t sequence, int32_t token, int32_t ubatch, int32_t n_rows, int32_t n_ubatches) {
    return hb_rows_make_sense(&(struct hobbit_rows) {.sequences = &sequence, .tokens = &token, .outputs = outputs,
                                                     .ubatches = &ubatch, .n_rows = n_rows,
                                                     .n_ubatches = n_ubatches});
}

static void nonsense_is_told(void) {
    CHECK(make_sense(0, 0, 1, 1, 1) && make_sense(0, 0, 0, 0, 0));
    CHECK(!make_sense(-1, 0, 1, 1, 1) && !make_sense(0, -1, 1, 1, 1));
    CHECK(!make_sense(0, 0, 2, 1, 1) && !make_sense(0, 0, 0, 0, 1) && !make_sense(0, 0, 1, 1, 0));
    CHECK(!make_sense(0, 0, 1, -1, 1) && !make_sense(0, 0, 1, 1, -1) && !make_sense(0, 0, -1, 1, 1));
}

static void every_failed_allocation_is_survived(void) {
    for (int n = 1; n <= 3; n++) {
        atomic_store(&faults_allocation, n);
        CHECK(hb_rows_new(&(struct hobbit_rows) {.sequences = sequences, .tokens = tokens, .outputs = outputs,
                                                 .ubatches = (int32_t[]) {6}, .n_rows = 6, .n_ubatches = 1}) == NULL);
        atomic_store(&faults_allocation, 0);
    }
    hb_rows_free(NULL);
}

int main(void) {
    RUN(rows_are_followed_layer_by_layer);
    RUN(one_group_ends_a_ubatch_each_time);
    RUN(a_layer_with_other_rows_ends_it);
    RUN(a_layer_may_have_no_rows);
    RUN(nonsense_is_told);
    RUN(every_failed_allocation_is_survived);
    return 0;
}
