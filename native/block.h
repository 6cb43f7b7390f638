/* A growable block of aligned memory handed out from its start; for work space that is sized before it is used. */
#ifndef HB_BLOCK_H
#define HB_BLOCK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdlib.h>

#define HB_BLOCK_ALIGN 64u

struct hb_block {
    char *data;
    size_t size, used;
};

static inline size_t hb_block_round(size_t size) {
    return (size + HB_BLOCK_ALIGN - 1) / HB_BLOCK_ALIGN * HB_BLOCK_ALIGN;
}

/* Empty the block and make room for `size` bytes (sums of hb_block_round); what it held is lost. */
static inline bool hb_block_reserve(struct hb_block *b, size_t size) {
    b->used = 0;
    if (size <= b->size) {
        return true;
    }
    free(b->data);
    b->size = 0;
    b->data = aligned_alloc(HB_BLOCK_ALIGN, hb_block_round(size));
    if (b->data != NULL) {
        b->size = hb_block_round(size);
    }
    return b->data != NULL;
}

/* Within what was reserved. */
static inline void *hb_block_take(struct hb_block *b, size_t size) {
    void *p = b->data + b->used;
    b->used += hb_block_round(size);
    return p;
}

static inline void hb_block_free(struct hb_block *b) {
    free(b->data);
    *b = (struct hb_block) {0};
}

#endif
