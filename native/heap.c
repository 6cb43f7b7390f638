#include "heap.h"

#include <stdbool.h>

static bool goes_before(const struct hb_heap_node *a, const struct hb_heap_node *b) {
    return a->key < b->key || (a->key == b->key && a->tie < b->tie);
}

/* Both are roots without siblings, or none. */
static int32_t merge(struct hb_heap_node *nodes, int32_t a, int32_t b) {
    if (a == HB_HEAP_NONE || b == HB_HEAP_NONE) {
        return a == HB_HEAP_NONE ? b : a;
    }
    if (goes_before(&nodes[b], &nodes[a])) {
        int32_t swap = a;
        a = b;
        b = swap;
    }
    nodes[b].next = nodes[a].child;
    nodes[b].prev = a;
    if (nodes[a].child != HB_HEAP_NONE) {
        nodes[nodes[a].child].prev = b;
    }
    nodes[a].child = b;
    return a;
}

static int32_t detach_sibling(struct hb_heap_node *nodes, int32_t *list) {
    int32_t first = *list;
    if (first != HB_HEAP_NONE) {
        *list = nodes[first].next;
        nodes[first].next = nodes[first].prev = HB_HEAP_NONE;
    }
    return first;
}

/* The siblings from `list` on become one heap: in pairs from the left, then all from the right. */
static int32_t merge_siblings(struct hb_heap_node *nodes, int32_t list) {
    int32_t pairs = HB_HEAP_NONE, heap = HB_HEAP_NONE;
    while (list != HB_HEAP_NONE) {
        int32_t a = detach_sibling(nodes, &list);
        int32_t b = detach_sibling(nodes, &list);
        int32_t pair = merge(nodes, a, b);
        nodes[pair].next = pairs;
        pairs = pair;
    }
    while (pairs != HB_HEAP_NONE) {
        int32_t pair = detach_sibling(nodes, &pairs);
        heap = merge(nodes, heap, pair);
    }
    return heap;
}

void hb_heap_insert(struct hb_heap_node *nodes, int32_t *heap, int32_t node) {
    nodes[node].child = nodes[node].next = nodes[node].prev = HB_HEAP_NONE;
    *heap = merge(nodes, *heap, node);
}

void hb_heap_remove(struct hb_heap_node *nodes, int32_t *heap, int32_t node) {
    int32_t below = merge_siblings(nodes, nodes[node].child);
    if (node == *heap) {
        *heap = below;
        return;
    }
    int32_t prev = nodes[node].prev, next = nodes[node].next;
    if (nodes[prev].child == node) {
        nodes[prev].child = next;
    } else {
        nodes[prev].next = next;
    }
    if (next != HB_HEAP_NONE) {
        nodes[next].prev = prev;
    }
    *heap = merge(nodes, *heap, below);
}
