/* Description: what goes to a device: only what is worth more than what is there, a bounded number of bytes a token, and
 * nothing when it declines or is lost. */
#include "tier.h"

#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

#include "check.h"

#define EXPERTS 6
#define BYTES 100
#define LOW_BYTES 30

#define SOME_TIME_MS 60000

/* In place of a device: what was copied into each slot of high copies, and of low ones. */
struct hb_executor {
    int group[HOBBIT_PRECISIONS][16];
    const char *data[HOBBIT_PRECISIONS][16];
    pthread_mutex_t gate;
    bool lose;
};

static void copy(struct hb_executor *x, struct hb_key key, int32_t slot, const char *data) {
    pthread_mutex_lock(&x->gate);
    x->group[key.precision][slot] = key.group;
    x->data[key.precision][slot] = data;
    pthread_mutex_unlock(&x->gate);
    if (x->lose) {
        hb_worker_lose(hb_worker_current(), "gone");
        for (;;) {
            pause();
        }
    }
}

static struct hb_executor device;
static struct hb_worker *worker;

static struct hb_tier *open_mixed_tier(int32_t n_high, int32_t n_low, uint64_t token_bytes) {
    device = (struct hb_executor) {.gate = PTHREAD_MUTEX_INITIALIZER};
    worker = hb_worker_new(2);
    const int32_t n_expert[] = {EXPERTS, EXPERTS}, pool_of_group[] = {0, 0};
    const struct hobbit_device_pool pool = {{BYTES, LOW_BYTES}, {n_high, n_low}};
    struct hb_tier *t = hb_tier_new(&(struct hb_tier_device) {"GPU0", &device, worker, HB_COPIES, copy},
                                    &(struct hb_tier_sizes) {2, 1, n_expert, pool_of_group, &pool, token_bytes});
    CHECK(t != NULL);
    const struct hobbit_policy lfu = {.kind = HOBBIT_POLICY_LFU};
    CHECK(hb_tier_set_policy(t, &lfu));
    return t;
}

static struct hb_tier *open_tier(int32_t n_slots, uint64_t token_bytes) {
    return open_mixed_tier(n_slots, 0, token_bytes);
}

static void close_tier(struct hb_tier *t) {
    hb_tier_free(t);
    (void) hb_worker_close(worker);
}

static struct hb_key key_of(int32_t group, int32_t expert) {
    return (struct hb_key) {group, expert, HOBBIT_HIGH};
}

/* One token's use of an expert: whether it is there. */
static bool use(struct hb_tier *t, int32_t expert) {
    hb_tier_begin(t, 0, 1, true);
    bool there = hb_tier_look_up(t, key_of(0, expert), 1) >= 0;
    if (there) {
        hb_tier_release(t, key_of(0, expert));
    }
    return there;
}

static char bytes_of[EXPERTS];

static bool offer(struct hb_tier *t, int32_t expert) {
    return hb_tier_offer(t, key_of(0, expert), &bytes_of[expert], BYTES);
}

static void take_all(struct hb_tier *t) {
    struct hb_key key;
    while (hb_tier_taken(t, SOME_TIME_MS, &key)) {
        CHECK_EQUAL(key.group, 0);
    }
}

static void what_is_used_more_takes_the_place_of_what_is_used_less(void) {
    struct hb_tier *t = open_tier(2, 1000);
    for (int32_t e = 0; e < 2; e++) {
        CHECK(!use(t, e));
        CHECK(offer(t, e)); /* there is room */
        CHECK(!offer(t, e)); /* it is on its way */
        CHECK(!hb_tier_has(t, key_of(0, e)));
    }
    take_all(t);
    CHECK(hb_tier_has(t, key_of(0, 0)) && use(t, 0) && use(t, 1));
    CHECK(!use(t, 2));
    CHECK(!offer(t, 2)); /* once, and the others twice */
    CHECK(!use(t, 2) && !offer(t, 2)); /* as often */
    CHECK(!use(t, 2) && offer(t, 2));
    take_all(t);
    CHECK(use(t, 2) && !use(t, 0) && use(t, 1));
    CHECK(!hb_tier_has(t, (struct hb_key) {0, 2, HOBBIT_LOW}));
    CHECK_EQUAL(hb_tier_look_up(t, (struct hb_key) {0, 2, HOBBIT_LOW}, 1), -1);
    int32_t slot = hb_tier_look_up(t, key_of(0, 2), 1);
    CHECK(device.data[HOBBIT_HIGH][slot] == &bytes_of[2] && device.group[HOBBIT_HIGH][slot] == 0);
    CHECK(hb_tier_executor(t) == &device);
    hb_tier_release(t, key_of(0, 2));
    hb_tier_forget(t);
    CHECK(!use(t, 2) && !use(t, 1));
    close_tier(t);
}

static void what_is_in_use_stays(void) {
    struct hb_tier *t = open_tier(1, 1000);
    CHECK(!use(t, 0) && offer(t, 0));
    take_all(t);
    CHECK(hb_tier_look_up(t, key_of(0, 0), 1) >= 0);
    for (int i = 0; i < 9; i++) {
        CHECK(!use(t, 1) && !offer(t, 1));
    }
    hb_tier_release(t, key_of(0, 0));
    CHECK(offer(t, 1));
    take_all(t);
    close_tier(t);
}

static void bytes_a_token_are_bounded(void) {
    struct hb_tier *t = open_tier(EXPERTS, 40);
    int32_t offered = 0;
    for (int token = 0; token < 10; token++) { /* 400 bytes */
        (void) use(t, offered);
        offered += offer(t, offered);
        take_all(t);
    }
    CHECK_EQUAL(offered, 4);
    hb_tier_begin(t, 0, 10, true);
    hb_tier_begin(t, 1, 10, false); /* the same tokens */
    CHECK(offer(t, 4) + offer(t, 5) == 2);
    take_all(t);
    close_tier(t);
    t = open_tier(EXPERTS, 0);
    CHECK(!use(t, 0) && !offer(t, 0)); /* nothing goes there */
    close_tier(t);
}

static void only_so_many_are_under_way(void) {
    struct hb_tier *t = open_tier(EXPERTS, 10000);
    struct hb_key key;
    pthread_mutex_lock(&device.gate);
    CHECK(!use(t, 0) && offer(t, 0));
    CHECK(!hb_tier_taken(t, 0, &key));
    pthread_mutex_unlock(&device.gate);
    CHECK(hb_tier_taken(t, SOME_TIME_MS, &key));
    CHECK_EQUAL(key.expert, 0);
    CHECK(!hb_tier_taken(t, SOME_TIME_MS, &key));
    close_tier(t);
}

static void a_declined_group_is_left_alone(void) {
    struct hb_tier *t = open_tier(EXPERTS, 10000);
    CHECK(!use(t, 0) && offer(t, 0));
    take_all(t);
    CHECK(!use(t, 1) && offer(t, 1)); /* still under way */
    hb_tier_decline(t, 0, HOBBIT_HIGH);
    take_all(t);
    CHECK(!use(t, 0) && !use(t, 1) && !offer(t, 2));
    CHECK(hb_tier_offer(t, key_of(1, 0), bytes_of, BYTES));
    struct hb_key key;
    CHECK(hb_tier_taken(t, SOME_TIME_MS, &key));
    CHECK(hb_tier_has(t, key_of(1, 0)));
    close_tier(t);
}

static struct hb_key low_of(int32_t expert) {
    return (struct hb_key) {0, expert, HOBBIT_LOW};
}

static bool offer_low(struct hb_tier *t, int32_t expert) {
    return hb_tier_offer(t, low_of(expert), &bytes_of[expert], LOW_BYTES);
}

static bool use_low(struct hb_tier *t, int32_t expert) {
    hb_tier_begin(t, 0, 1, true);
    bool there = hb_tier_look_up(t, low_of(expert), 1) >= 0;
    if (there) {
        hb_tier_release(t, low_of(expert));
    }
    return there;
}

/* Neither takes the other's place, whatever is used more. */
static void each_precision_has_slots_of_its_own(void) {
    struct hb_tier *t = open_mixed_tier(1, 2, 10000);
    CHECK(!use(t, 0) && offer(t, 0));
    CHECK(!use_low(t, 1) && offer_low(t, 1));
    CHECK(!use_low(t, 2) && offer_low(t, 2)); /* there is room for these, and no more */
    take_all(t);
    CHECK(use(t, 0) && use_low(t, 1) && use_low(t, 2) && !use(t, 1) && !use_low(t, 0));
    for (int i = 0; i < 9; i++) {
        CHECK(!use_low(t, 3));
    }
    CHECK(offer_low(t, 3));
    take_all(t);
    CHECK(hb_tier_has(t, low_of(3)) && hb_tier_has(t, low_of(1)) + hb_tier_has(t, low_of(2)) == 1);
    CHECK(hb_tier_has(t, key_of(0, 0)));
    for (int i = 0; i < 20; i++) {
        CHECK(!use(t, 4));
    }
    CHECK(offer(t, 4));
    take_all(t);
    CHECK(hb_tier_has(t, key_of(0, 4)) && !hb_tier_has(t, key_of(0, 0)) && hb_tier_has(t, low_of(3)));
    int32_t slot = hb_tier_look_up(t, low_of(3), 1);
    CHECK(slot >= 0 && device.data[HOBBIT_LOW][slot] == &bytes_of[3]);
    hb_tier_drop(t, low_of(3)); /* it is in use */
    CHECK(hb_tier_has(t, low_of(3)));
    hb_tier_release(t, low_of(3));
    hb_tier_drop(t, low_of(3));
    hb_tier_drop(t, low_of(3)); /* nothing is there */
    CHECK(!hb_tier_has(t, low_of(3)));
    close_tier(t);
}

static void a_precision_is_declined_by_itself(void) {
    struct hb_tier *t = open_mixed_tier(EXPERTS, EXPERTS, 10000);
    CHECK(!use(t, 0) && offer(t, 0) && !use_low(t, 1) && offer_low(t, 1));
    take_all(t);
    hb_tier_decline(t, 0, HOBBIT_LOW);
    CHECK(use(t, 0) && !use_low(t, 1) && !offer_low(t, 1) && offer(t, 1));
    take_all(t);
    CHECK(use(t, 1));
    close_tier(t);
}

/* A low copy counts as many bytes as it has. */
static void low_copies_are_within_the_bounds_too(void) {
    struct hb_tier *t = open_mixed_tier(EXPERTS, EXPERTS, 2 * LOW_BYTES);
    CHECK(!use_low(t, 0));
    CHECK(offer_low(t, 0) && offer_low(t, 1) && !offer_low(t, 2) && !offer(t, 2));
    take_all(t);
    close_tier(t);
}

static struct hb_tier *left[2]; /* for the sanitizers: a lost worker's is never freed */
static struct hb_worker *left_worker;

static void a_lost_device_gives_back_what_it_had(void) {
    struct hb_tier *t = left[0] = open_tier(EXPERTS, 10000);
    struct hb_key key;
    CHECK(!use(t, 0) && offer(t, 0));
    take_all(t);
    device.lose = true;
    CHECK(!use(t, 1) && offer(t, 1));
    CHECK(!use(t, 2) && offer(t, 2));
    CHECK(hb_tier_taken(t, SOME_TIME_MS, &key) && hb_tier_is_abandoned(t));
    CHECK(hb_tier_taken(t, 0, &key));
    CHECK(!hb_tier_taken(t, SOME_TIME_MS, &key));
    CHECK(!use(t, 0) && !offer(t, 3) && !hb_tier_has(t, key_of(0, 0)));
    close_tier(t);
}

static void *shut_and_open(void *argument) {
    pthread_mutex_lock(&device.gate);
    atomic_store((atomic_int *) argument, 1);
    usleep(50000);
    atomic_store((atomic_int *) argument, 2);
    pthread_mutex_unlock(&device.gate);
    return NULL;
}

/* Its thread is in the middle of a copy, which ends before what it reads is given back; those behind it never begin. */
static void a_device_that_failed_is_left_to_rest(void) {
    struct hb_tier *t = left[1] = open_tier(EXPERTS, 10000);
    left_worker = worker;
    struct hb_key key;
    pthread_t thread;
    static atomic_int gate;
    atomic_store(&gate, 0);
    CHECK(pthread_create(&thread, NULL, shut_and_open, &gate) == 0);
    while (atomic_load(&gate) == 0) {
        usleep(100);
    }
    CHECK(!use(t, 0) && offer(t, 0) && !use(t, 1) && offer(t, 1));
    while (!hb_worker_is_busy(worker)) {
        usleep(100);
    }
    hb_tier_abandon(t, "it failed to compute");
    CHECK_EQUAL(atomic_load(&gate), 2);
    CHECK(!hb_worker_is_busy(worker) && device.data[HOBBIT_HIGH][0] != NULL && device.data[HOBBIT_HIGH][1] == NULL);
    CHECK(hb_tier_taken(t, 0, &key) && hb_tier_taken(t, 0, &key) && !hb_tier_is_copying(t));
    CHECK(pthread_join(thread, NULL) == 0);
    close_tier(t);
}

int main(void) {
    RUN(what_is_used_more_takes_the_place_of_what_is_used_less);
    RUN(what_is_in_use_stays);
    RUN(bytes_a_token_are_bounded);
    RUN(only_so_many_are_under_way);
    RUN(a_declined_group_is_left_alone);
    RUN(each_precision_has_slots_of_its_own);
    RUN(a_precision_is_declined_by_itself);
    RUN(low_copies_are_within_the_bounds_too);
    RUN(a_device_that_failed_is_left_to_rest);
    RUN(a_lost_device_gives_back_what_it_had);
    return 0;
}
