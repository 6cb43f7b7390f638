/* Description: the pairing heaps give the smallest node whatever was inserted and removed, checked against a search
 * through all nodes. */
#include "heap.h"

#include <math.h>

#include "check.h"

enum { NODES = 200, HEAPS = 3 };

static struct hb_heap_node nodes[NODES];
static int32_t heaps[HEAPS];
static int heap_of[NODES]; /* or -1 */

static void empty_all(void) {
    for (int i = 0; i < HEAPS; i++) {
        heaps[i] = HB_HEAP_NONE;
    }
    for (int i = 0; i < NODES; i++) {
        heap_of[i] = -1;
    }
}

/* By looking at all nodes. */
static int32_t smallest(int heap) {
    int32_t best = HB_HEAP_NONE;
    for (int32_t i = 0; i < NODES; i++) {
        if (heap_of[i] != heap) {
            continue;
        }
        if (best == HB_HEAP_NONE || nodes[i].key < nodes[best].key ||
            (nodes[i].key == nodes[best].key && nodes[i].tie < nodes[best].tie)) {
            best = i;
        }
    }
    return best;
}

static void insert(int32_t node, int heap, double key, uint64_t tie) {
    nodes[node].key = key;
    nodes[node].tie = tie;
    hb_heap_insert(nodes, &heaps[heap], node);
    heap_of[node] = heap;
}

static void take_out(int32_t node) {
    hb_heap_remove(nodes, &heaps[heap_of[node]], node);
    heap_of[node] = -1;
}

static void random_operations_keep_the_order(void) {
    for (uint64_t start = 1; start <= 20; start++) {
        uint64_t seed = start;
        empty_all();
        for (uint64_t step = 0; step < 3000; step++) {
            int32_t node = (int32_t) check_random(&seed, NODES);
            if (heap_of[node] >= 0) {
                take_out(node);
            } else { /* few keys, so that many are equal */
                double key = (double) check_random(&seed, start % 2 ? 8 : 1000) - 4;
                insert(node, (int) check_random(&seed, HEAPS), key, step);
            }
            for (int heap = 0; heap < HEAPS; heap++) {
                CHECK_EQUAL(heaps[heap], smallest(heap));
            }
        }
        for (int heap = 0; heap < HEAPS; heap++) { /* what is left comes out in order */
            while (heaps[heap] != HB_HEAP_NONE) {
                CHECK_EQUAL(heaps[heap], smallest(heap));
                take_out(heaps[heap]);
            }
            CHECK_EQUAL(smallest(heap), HB_HEAP_NONE);
        }
    }
}

static void equal_keys_go_by_the_tie_whatever_the_order(void) {
    for (int backwards = 0; backwards < 2; backwards++) {
        empty_all();
        for (int32_t i = 0; i < 10; i++) {
            int32_t node = backwards ? 9 - i : i;
            insert(node, 0, 1.5, (uint64_t) node);
        }
        for (int32_t i = 0; i < 10; i++) {
            CHECK_EQUAL(heaps[0], i);
            take_out(i);
        }
    }
}

static void infinite_keys_have_a_place(void) {
    empty_all();
    insert(0, 0, 1, 0);
    insert(1, 0, -INFINITY, 1);
    insert(2, 0, INFINITY, 2);
    CHECK_EQUAL(heaps[0], 1);
    take_out(1);
    CHECK_EQUAL(heaps[0], 0);
    take_out(0);
    CHECK_EQUAL(heaps[0], 2);
}

int main(void) {
    RUN(random_operations_keep_the_order);
    RUN(equal_keys_go_by_the_tie_whatever_the_order);
    RUN(infinite_keys_have_a_place);
    return 0;
}
