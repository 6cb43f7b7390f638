/* One copy of a Q8_0 matrix as two planes: the half that is worth most is an ordinary low-precision matrix, and the
 * other half completes it to the original bytes.
 *
 * A block of Q8_0 is {fp16 d; int8 q[32]}. With q + 128 = 16 h + l the high plane has, for each block, a Q4_1 block
 * of ggml's {fp16 scale; fp16 minimum; 16 bytes of nibbles h}, and the low plane 16 bytes of nibbles l in the same
 * order: element j in the low half of byte j, element j + 16 in its high half. The scale is 16 d, exact in fp16, so d
 * comes back from it. The minimum is not needed for that: it is the one that puts the block's mean where it was, which
 * costs a fifth less KL than a constant -120 d.
 */
#ifndef HB_NESTED_H
#define HB_NESTED_H

#include <stdbool.h>
#include <stddef.h>

#define HB_Q8_0_BLOCK 34
#define HB_HIGH_BLOCK 20
#define HB_LOW_BLOCK 16

/* False where a block's scale is not finite or too large for the planes; what is written then means nothing. */
bool hb_nested_split(const void *q8_0, void *high_plane, void *low_plane, size_t n_blocks);

/* The inverse. The low plane may lie within the output if it begins at least 18 bytes a block after it, as it does at
 * its end; the high plane may not. */
void hb_nested_merge(const void *high_plane, const void *low_plane, void *q8_0, size_t n_blocks);

#endif
