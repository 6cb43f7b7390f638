#include "rpc.h"

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "guard.h"
#include "hobbit.h"
#include "os.h"
#include "worker.h"

#define MOST 1024
#define TIMEOUT_MS 10000

/* From Python, one thread at a time. */
static ggml_backend_dev_t devices[MOST];
static size_t n_devices, number[MOST]; /* among those of its server */
/* ggml is asked to connect, and holds a lock until it has. */
static atomic_bool asking;

size_t hb_rpc_n_devices(void) {
    return n_devices;
}

ggml_backend_dev_t hb_rpc_device(size_t index) {
    return devices[index];
}

bool hb_rpc_is_remote(ggml_backend_dev_t device) {
    return strncmp(ggml_backend_reg_name(ggml_backend_dev_backend_reg(device)), "RPC", 3) == 0;
}

const char *hb_rpc_connection(ggml_backend_dev_t device) {
    return hb_rpc_is_remote(device) ? ggml_backend_dev_description(device) : ggml_backend_dev_name(device);
}

/* As people write it: HOST:PORT without zeros in front. */
static void readable(const char *endpoint, char *text, size_t length) {
    const char *colon = strrchr(endpoint, ':');
    snprintf(text, length, "%.*s%d", (int) (colon + 1 - endpoint), endpoint, atoi(colon + 1));
}

void hb_rpc_describe(ggml_backend_dev_t device, char *text, size_t length) {
    const char *said = ggml_backend_dev_description(device);
    if (hb_rpc_is_remote(device)) {
        readable(said, text, length);
    } else {
        snprintf(text, length, "%s", said);
    }
}

/* One that is built into ggml, else the library's. */
static ggml_backend_reg_t registry(const char *library) {
    ggml_backend_reg_t reg = ggml_backend_reg_by_name("RPC");
    return reg != NULL ? reg : ggml_backend_load(library);
}

static void *function(const char *library, const char *name, char *err, size_t err_len) {
    ggml_backend_reg_t reg = registry(library);
    void *found = reg != NULL ? ggml_backend_reg_get_proc_address(reg, name) : NULL;
    if (found == NULL) {
        snprintf(err, err_len, "%s is not ggml's RPC backend, or cannot be loaded", library);
    }
    return found;
}

/* Whether something happens to it in time. */
static bool waits(int fd, short events) {
    struct pollfd waiting = {.fd = fd, .events = events};
    int ready;
    do {
        ready = poll(&waiting, 1, TIMEOUT_MS);
    } while (ready < 0 && errno == EINTR);
    return ready > 0;
}

/* 0 or an errno value. */
static int connect_to(int fd, const struct addrinfo *address) {
    int error = 0;
    socklen_t size = sizeof error;
    if (connect(fd, address->ai_addr, address->ai_addrlen) == 0) {
        return 0;
    }
    if (errno != EINPROGRESS) {
        return errno;
    }
    return !waits(fd, POLLOUT)                                         ? ETIMEDOUT
           : getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) != 0 ? errno
                                                                       : error;
}

/* A server has one client at a time, and hangs up on one that has nothing to say, once it comes to it. */
static bool hangs_up(int fd) {
    char byte;
    (void) shutdown(fd, SHUT_WR);
    return waits(fd, POLLIN) && recv(fd, &byte, 1, 0) <= 0;
}

/* NULL: it serves who comes next. Else what is wrong. */
static const char *try_address(const struct addrinfo *address) {
    int fd = socket(address->ai_family, address->ai_socktype, address->ai_protocol);
    if (fd < 0) {
        return strerror(errno);
    }
    (void) fcntl(fd, F_SETFL, O_NONBLOCK);
    int error = connect_to(fd, address);
    const char *wrong = error != 0 ? strerror(error) : hangs_up(fd) ? NULL : "it serves somebody else, or hangs";
    (void) close(fd);
    return wrong;
}

#define LONGEST_HOST 255

static bool is_endpoint(const char *endpoint, char *err, size_t err_len) {
    const char *colon = strrchr(endpoint, ':');
    size_t length = colon != NULL ? (size_t) (colon - endpoint) : 0;
    bool good = length > 0 && length <= LONGEST_HOST && strspn(colon + 1, "0123456789") == strlen(colon + 1) &&
                atoi(colon + 1) >= 1 && atoi(colon + 1) <= 65535;
    if (!good) {
        snprintf(err, err_len, "%s does not name a server: write it like 192.168.0.2:50052", endpoint);
    }
    return good;
}

/* Whether a server there would answer now: ggml would end the process if nobody listens, and wait, holding locks that
 * all other servers' devices need, until it is served. */
static bool answers(const char *endpoint, char *err, size_t err_len) {
    char host[LONGEST_HOST + 1], port[16], name[LONGEST_HOST + 16];
    const char *colon = strrchr(endpoint, ':');
    snprintf(host, sizeof host, "%.*s", (int) (colon - endpoint), endpoint);
    snprintf(port, sizeof port, "%d", atoi(colon + 1));
    readable(endpoint, name, sizeof name);
    struct addrinfo hints = {.ai_family = AF_INET, .ai_socktype = SOCK_STREAM}, *found = NULL;
    int unknown = getaddrinfo(host, port, &hints, &found);
    const char *wrong = unknown != 0 ? gai_strerror(unknown) : try_address(found);
    if (unknown == 0) {
        freeaddrinfo(found);
    }
    if (wrong != NULL) {
        snprintf(err, err_len, "no RPC server answers at %s: %s", name, wrong);
    }
    return wrong == NULL;
}

bool hb_rpc_answers(ggml_backend_dev_t device, char *err, size_t err_len) {
    return answers(ggml_backend_dev_description(device), err, err_len);
}

typedef ggml_backend_reg_t add_server(const char *endpoint);

struct adding {
    struct hb_task task;
    add_server *add;
    char endpoint[512];
    ggml_backend_reg_t reg;
};

static void add(void *context) {
    struct adding *a = context;
    a->reg = a->add(a->endpoint);
    atomic_store(&asking, false);
}

/* NULL, and `err`, when the server does not answer as one does. */
static ggml_backend_reg_t ask(add_server *function, const char *endpoint, char *err, size_t err_len) {
    struct adding *a = calloc(1, sizeof *a);
    struct hb_worker *worker = hb_worker_new(1);
    ggml_backend_reg_t reg = NULL;
    if (a == NULL || worker == NULL || !hb_guard_add(worker, NULL, true)) {
        snprintf(err, err_len, "out of memory");
        free(a);
        (void) hb_worker_close(worker);
        return NULL;
    }
    *a = (struct adding) {.task = {.run = add, .context = a}, .add = function};
    snprintf(a->endpoint, sizeof a->endpoint, "%s", endpoint);
    atomic_store(&asking, true);
    char why[128] = "it has no devices";
    if (hb_worker_call(worker, &a->task, TIMEOUT_MS)) {
        reg = a->reg;
        hb_guard_remove(worker);
        free(a);
    } else {
        hb_worker_reason(worker, why, sizeof why);
    }
    (void) hb_worker_close(worker);
    if (reg == NULL) {
        char text[256];
        readable(endpoint, text, sizeof text);
        snprintf(err, err_len, "%s is no RPC server of this llama.cpp's version: %s", text, why);
    }
    return reg;
}

#define MOST_FAILURES 200

/* ggml knows a server by its name, and never connects anew to one whose connection failed: it gets another name then,
 * with one more zero before its port. */
static void name_after(int n_failures, const char *endpoint, char *name, size_t length) {
    const char *port = strrchr(endpoint, ':') + 1;
    char zeros[MOST_FAILURES + 1];
    memset(zeros, '0', sizeof zeros);
    snprintf(name, length, "%.*s%.*s%s", (int) (port - endpoint), endpoint, n_failures, zeros, port);
}

/* Its first one that has not failed. */
static bool name_for(const char *endpoint, char *name, size_t length) {
    bool found = false;
    for (int n = 0; n < MOST_FAILURES && !found; n++) {
        name_after(n, endpoint, name, length);
        found = !hb_guard_has_failed(name);
    }
    return found;
}

#define COME_BACK_S 5

/* A server that hung and goes on answers our threads that gave it up too. They need the locks that ggml holds while it
 * connects, and the server comes to the new connection when they have let go of theirs. */
static void let_come_back(const char *endpoint) {
    char name[512];
    uint64_t end = hb_now_ns() + COME_BACK_S * UINT64_C(1000000000);
    for (int n = 0; n < MOST_FAILURES && hb_now_ns() < end; n++) {
        name_after(n, endpoint, name, sizeof name);
        hb_guard_wait_for_silent(name, COME_BACK_S);
    }
}

static void add_devices(ggml_backend_reg_t reg) {
    for (size_t i = 0; i < ggml_backend_reg_dev_count(reg) && n_devices < MOST; i++) {
        ggml_backend_dev_t dev = ggml_backend_reg_dev_get(reg, i);
        bool known = false;
        for (size_t k = 0; k < n_devices; k++) {
            known = known || devices[k] == dev;
        }
        if (!known) {
            number[n_devices] = i;
            devices[n_devices++] = dev;
        }
    }
}

/* The device of the server that has this name, or had, before the server was lost; the first, where none is wanted;
 * NULL: it is none of this server's. */
static ggml_backend_dev_t device_now(ggml_backend_reg_t reg, const char *endpoint, const char *wanted) {
    char asked[256], its[256];
    readable(endpoint, asked, sizeof asked);
    for (size_t k = 0; k < n_devices; k++) {
        hb_rpc_describe(devices[k], its, sizeof its);
        if (strcmp(ggml_backend_dev_name(devices[k]), wanted) == 0 && strcmp(asked, its) == 0) {
            return number[k] < ggml_backend_reg_dev_count(reg) ? ggml_backend_reg_dev_get(reg, number[k]) : NULL;
        }
    }
    return wanted[0] == '\0' ? ggml_backend_reg_dev_get(reg, 0) : NULL;
}

int32_t hobbit_rpc_connect(const char *library, const char *endpoint, char *name, size_t name_len, char *err,
                           size_t err_len) {
    add_server *adds = (add_server *) (uintptr_t) function(library, "ggml_backend_rpc_add_server", err, err_len);
    char called[512];
    if (adds == NULL || !is_endpoint(endpoint, err, err_len)) {
        return HOBBIT_DEVICE;
    }
    if (!name_for(endpoint, called, sizeof called)) {
        snprintf(err, err_len, "%s was lost too often in this process: start again", endpoint);
        return HOBBIT_DEVICE;
    }
    if (atomic_load(&asking)) {
        snprintf(err, err_len, "ggml is still at an RPC server that failed or does not answer, and connects to no other: start again");
        return HOBBIT_DEVICE;
    }
    if (!hb_guard_has(called)) {
        if (!answers(endpoint, err, err_len)) {
            return HOBBIT_DEVICE;
        }
        let_come_back(endpoint);
        (void) name_for(endpoint, called, sizeof called); /* an old one may do again */
    }
    ggml_backend_reg_t reg = ask(adds, called, err, err_len);
    if (reg == NULL) {
        return HOBBIT_DEVICE;
    }
    add_devices(reg);
    ggml_backend_dev_t now = device_now(reg, endpoint, name);
    if (now != NULL) {
        snprintf(name, name_len, "%s", ggml_backend_dev_name(now));
    }
    return HOBBIT_OK;
}

typedef void start_server(const char *endpoint, const char *cache, size_t n_threads, size_t n_devices,
                          ggml_backend_dev_t *devices);

int32_t hobbit_rpc_serve(const char *library, const char *endpoint, int32_t n_threads, char *err, size_t err_len) {
    start_server *serve = (start_server *) (uintptr_t) function(library, "ggml_backend_rpc_start_server", err, err_len);
    if (serve != NULL) {
        ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
        serve(endpoint, NULL, (size_t) n_threads, 1, &cpu);
        snprintf(err, err_len, "an RPC server cannot listen at %s", endpoint);
    }
    return HOBBIT_DEVICE;
}
