/* Pairing heaps over numbered nodes in one array. A node is in one heap or in none, and a heap is the number of its
 * smallest node. Insertion is O(1), removal of any node O(log n) amortised; nothing is ever allocated. Nodes are
 * ordered by key, then by `tie`, which must be unique: the smallest is then the same in whatever order they came. */
#ifndef HB_HEAP_H
#define HB_HEAP_H

#include <stdint.h>

#define HB_HEAP_NONE (-1)

struct hb_heap_node {
    double key;
    uint64_t tie;
    int32_t child, next, prev; /* prev: the sibling before, or the parent of a first child */
};

/* Set key and tie first. */
void hb_heap_insert(struct hb_heap_node *nodes, int32_t *heap, int32_t node);
void hb_heap_remove(struct hb_heap_node *nodes, int32_t *heap, int32_t node);

#endif
