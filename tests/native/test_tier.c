/* Description: what goes to a device: only what is worth more than what is there, a bounded number of bytes a token, and
 * nothing when it declines or is lost. */
#include "tier.h"

#include <pthread.h>
#include <unistd.h>

#include "check.h"

#define EXPERTS 6
#define BYTES 100

/* In place of a device: what was copied into each slot. */
struct hb_executor {
    int group[16];
    const char *data[16];
    pthread_mutex_t gate;
    bool lose;
};

static void copy(struct hb_executor *x, int32_t group, int32_t slot, const char *data) {
    pthread_mutex_lock(&x->gate);
    x->group[slot] = group;
    x->data[slot] = data;
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

static struct hb_tier *open_tier(int32_t n_slots, uint64_t token_bytes) {
    device = (struct hb_executor) {.gate = PTHREAD_MUTEX_INITIALIZER};
    worker = hb_worker_new();
    const int32_t n_expert[] = {EXPERTS, EXPERTS}, pool_of_group[] = {0, 0}, slots[] = {n_slots};
    const uint64_t bytes[] = {BYTES};
    struct hb_tier *t = hb_tier_new(&(struct hb_tier_device) {&device, worker, copy},
                                    &(struct hb_tier_sizes) {2, 1, n_expert, pool_of_group, bytes, slots, token_bytes});
    CHECK(t != NULL);
    const struct hobbit_policy lfu = {.kind = HOBBIT_POLICY_LFU};
    CHECK(hb_tier_set_policy(t, &lfu));
    return t;
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
    while (hb_tier_taken(t, true, &key)) {
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
    CHECK(device.data[slot] == &bytes_of[2] && device.group[slot] == 0);
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
    CHECK(!hb_tier_taken(t, false, &key));
    pthread_mutex_unlock(&device.gate);
    CHECK(hb_tier_taken(t, true, &key));
    CHECK_EQUAL(key.expert, 0);
    CHECK(!hb_tier_taken(t, true, &key));
    close_tier(t);
}

static void a_declined_group_is_left_alone(void) {
    struct hb_tier *t = open_tier(EXPERTS, 10000);
    CHECK(!use(t, 0) && offer(t, 0));
    take_all(t);
    CHECK(!use(t, 1) && offer(t, 1)); /* still under way */
    hb_tier_decline(t, 0);
    take_all(t);
    CHECK(!use(t, 0) && !use(t, 1) && !offer(t, 2));
    CHECK(hb_tier_offer(t, key_of(1, 0), bytes_of, BYTES));
    struct hb_key key;
    CHECK(hb_tier_taken(t, true, &key));
    CHECK(hb_tier_has(t, key_of(1, 0)));
    close_tier(t);
}

static struct hb_tier *left; /* for the sanitizers: a lost worker's is never freed */

static void a_lost_device_gives_back_what_it_had(void) {
    struct hb_tier *t = left = open_tier(EXPERTS, 10000);
    struct hb_key key;
    CHECK(!use(t, 0) && offer(t, 0));
    take_all(t);
    device.lose = true;
    CHECK(!use(t, 1) && offer(t, 1));
    CHECK(!use(t, 2) && offer(t, 2));
    CHECK(hb_tier_taken(t, true, &key) && hb_tier_is_abandoned(t));
    CHECK(hb_tier_taken(t, false, &key));
    CHECK(!hb_tier_taken(t, true, &key));
    CHECK(!use(t, 0) && !offer(t, 3) && !hb_tier_has(t, key_of(0, 0)));
    close_tier(t);
}

int main(void) {
    RUN(what_is_used_more_takes_the_place_of_what_is_used_less);
    RUN(what_is_in_use_stays);
    RUN(bytes_a_token_are_bounded);
    RUN(only_so_many_are_under_way);
    RUN(a_declined_group_is_left_alone);
    RUN(a_lost_device_gives_back_what_it_had);
    return 0;
}
