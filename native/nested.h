/* One copy of a Q8_0 matrix as two planes: the half that is worth most is an ordinary low-precision matrix, and the
 * other half completes it to the original bytes.
 *
 * A block of Q8_0 is {fp16 d; int8 q[32]}. It is cut into 16 steps: q = base + step h + l with h < 16 and l < step.
 * The high plane has, for each block, a Q4_1 block of ggml's {fp16 scale; fp16 minimum; 16 bytes of nibbles h}, and
 * the low plane 16 bytes of nibbles l in the same order: element j in the low half of byte j, element j + 16 in its
 * high half.
 *
 * A step of 16 would do for every block. But most blocks reach 127 on one side only, and then a smaller step covers
 * them: steps from 9 to 16 up from -127 or down from 127. The scale is step d rounded to fp16, the minimum puts the
 * block's (weighted) mean where it was. What is needed to go back is in the minimum's lowest 5 bits, which are worth
 * less than the rounding to steps: the side, the step, and which of the two d that have this scale.
 */
#ifndef HB_NESTED_H
#define HB_NESTED_H

#include <stdbool.h>
#include <stddef.h>

#define HB_Q8_0_BLOCK 34
#define HB_HIGH_BLOCK 20
#define HB_LOW_BLOCK 16

/* `importance` has a weight for each column of a matrix whose rows have `row_blocks` blocks, the first of which is a
 * row's first; NULL: all count alike. It moves the minimum only.
 * False where a block's scale is not finite or too large for the planes; what is written then means nothing. */
bool hb_nested_split(const void *q8_0, void *high_plane, void *low_plane, size_t n_blocks, const float *importance,
                     size_t row_blocks);

/* The inverse. The low plane may lie within the output if it begins at least 18 bytes a block after it, as it does at
 * its end; the high plane may not. */
void hb_nested_merge(const void *high_plane, const void *low_plane, void *q8_0, size_t n_blocks);

#endif
