/* What is known of the experts' uses, sequence by sequence, and added up for the policy.
 *
 * The policy sees one record an expert: uses and heat are summed over the sequences, the last use is the latest. While
 * there is only one sequence that sum is its record. From the second on each has one of its own beside, so that its
 * part can be taken away when it ends; the others' stay what they were, to the bit. All have one clock, struct
 * hb_moment: a ubatch counts as many tokens as the sequence with most rows has, so that what is remembered of a
 * sequence ages as it would alone. T, the tokens so far, begins again when nothing is remembered of any.
 *
 * Memory is allocated when a sequence is added; looking up is O(1), a use O(sequences that share it). At most
 * HB_RECORDS sequences are told apart: those from HB_RECORDS - 1 on share a record, which ends with any of them. */
#ifndef HB_RECORDS_H
#define HB_RECORDS_H

#include <stdbool.h>
#include <stdint.h>

#include "policy.h"

#define HB_RECORDS 64

/* Of the (token, expert) pairs that use an expert, those of one sequence. */
struct hb_share {
    int32_t sequence; /* not negative; sequence 0 is always known, and stands for those that were not added */
    int32_t n_pairs;
};

struct hb_records;

struct hb_records *hb_records_new(int32_t n_experts); /* NULL when memory is short */
void hb_records_free(struct hb_records *records);     /* NULL is fine */
/* Keep what this sequence uses apart from now on. False when memory is short. */
bool hb_records_add(struct hb_records *records, int32_t sequence);
/* What the policy sees, [n_experts]. It stays where it is; only next_use is the caller's to set. */
struct hb_usage *hb_records_sums(struct hb_records *records);
/* As hb_policy_use, for each share. */
void hb_records_use(struct hb_records *records, const struct hobbit_policy *policy, int32_t expert, int32_t precision,
                    const struct hb_share *shares, int32_t n_shares, uint64_t pass, const struct hb_moment *now);
/* The sequence ended: its part is forgotten, or aged where the policy says so. Nothing happens where several sequences
 * are known and this one has had no use since. True when the experts' order may be another now. */
bool hb_records_end(struct hb_records *records, const struct hobbit_policy *policy, int32_t sequence,
                    struct hb_moment *now);

/* The number of the record, below HB_RECORDS, that a sequence has if it was added. */
static inline int32_t hb_records_index(int32_t sequence) {
    return sequence < HB_RECORDS ? sequence : HB_RECORDS - 1;
}

#endif
