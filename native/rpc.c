#include "rpc.h"

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include "guard.h"
#include "hobbit.h"
#include "worker.h"

#define MOST 64
#define TIMEOUT_MS 10000

/* From Python, one thread at a time. */
static ggml_backend_dev_t devices[MOST];
static size_t n_devices;
/* A connection failed within ggml, which holds its locks for ever. */
static bool stuck;

size_t hb_rpc_n_devices(void) {
    return n_devices;
}

ggml_backend_dev_t hb_rpc_device(size_t index) {
    return devices[index];
}

bool hb_rpc_is_remote(ggml_backend_dev_t device) {
    return strncmp(ggml_backend_reg_name(ggml_backend_dev_backend_reg(device)), "RPC", 3) == 0;
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

/* 0 or an errno value. */
static int try_address(const struct addrinfo *address) {
    int fd = socket(address->ai_family, address->ai_socktype, address->ai_protocol), error = 0;
    socklen_t size = sizeof error;
    if (fd < 0) {
        return errno;
    }
    (void) fcntl(fd, F_SETFL, O_NONBLOCK);
    if (connect(fd, address->ai_addr, address->ai_addrlen) != 0) {
        error = errno;
        struct pollfd waiting = {.fd = fd, .events = POLLOUT};
        if (error == EINPROGRESS) {
            int ready = poll(&waiting, 1, TIMEOUT_MS);
            error = ready == 0 ? ETIMEDOUT : ready < 0 ? errno : 0;
            if (error == 0) {
                (void) getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size);
            }
        }
    }
    (void) close(fd);
    return error;
}

/* Whether anything listens there: ggml would end the process if not. */
static bool listens(const char *endpoint, char *err, size_t err_len) {
    char host[256];
    const char *colon = strrchr(endpoint, ':');
    size_t length = colon != NULL ? (size_t) (colon - endpoint) : 0;
    if (length == 0 || length >= sizeof host || strspn(colon + 1, "0123456789") != strlen(colon + 1) ||
        atoi(colon + 1) < 1 || atoi(colon + 1) > 65535) {
        snprintf(err, err_len, "%s does not name a server: write it like 192.168.0.2:50052", endpoint);
        return false;
    }
    snprintf(host, sizeof host, "%.*s", (int) length, endpoint);
    struct addrinfo hints = {.ai_family = AF_INET, .ai_socktype = SOCK_STREAM}, *found = NULL;
    int unknown = getaddrinfo(host, colon + 1, &hints, &found), error = 0;
    if (unknown == 0) {
        error = try_address(found);
        freeaddrinfo(found);
    }
    if (unknown != 0 || error != 0) {
        snprintf(err, err_len, "no RPC server answers at %s: %s", endpoint,
                 unknown != 0 ? gai_strerror(unknown) : strerror(error));
    }
    return unknown == 0 && error == 0;
}

typedef ggml_backend_reg_t add_server(const char *endpoint);

struct adding {
    struct hb_task task;
    add_server *add;
    char endpoint[300];
    ggml_backend_reg_t reg;
};

static void add(void *context) {
    struct adding *a = context;
    a->reg = a->add(a->endpoint);
}

/* NULL, and `err`, when the server does not answer as one does. */
static ggml_backend_reg_t ask(add_server *function, const char *endpoint, char *err, size_t err_len) {
    struct adding *a = calloc(1, sizeof *a);
    struct hb_worker *worker = hb_worker_new();
    ggml_backend_reg_t reg = NULL;
    if (a == NULL || worker == NULL || !hb_guard_add(worker, true)) {
        snprintf(err, err_len, "out of memory");
        free(a);
        (void) hb_worker_close(worker);
        return NULL;
    }
    *a = (struct adding) {.task = {.run = add, .context = a}, .add = function};
    snprintf(a->endpoint, sizeof a->endpoint, "%s", endpoint);
    hb_worker_submit(worker, &a->task, false);
    if (hb_worker_done(worker, &a->task, TIMEOUT_MS)) {
        reg = a->reg;
        hb_guard_remove(worker);
        free(a);
    } else {
        stuck = true;
        hb_worker_lose(worker, "it does not answer");
    }
    (void) hb_worker_close(worker);
    if (reg == NULL) {
        snprintf(err, err_len, "%s is no RPC server of this llama.cpp's version, or serves somebody else", endpoint);
    }
    return reg;
}

int32_t hobbit_rpc_connect(const char *library, const char *endpoint, char *name, size_t name_len, char *err,
                           size_t err_len) {
    add_server *adds = (add_server *) (uintptr_t) function(library, "ggml_backend_rpc_add_server", err, err_len);
    if (adds == NULL || !listens(endpoint, err, err_len)) {
        return HOBBIT_DEVICE;
    }
    if (stuck) {
        snprintf(err, err_len, "an RPC server failed while this process connected to it: start again");
        return HOBBIT_DEVICE;
    }
    ggml_backend_reg_t reg = ask(adds, endpoint, err, err_len);
    if (reg == NULL) {
        return HOBBIT_DEVICE;
    }
    for (size_t i = 0; i < ggml_backend_reg_dev_count(reg) && n_devices < MOST; i++) {
        ggml_backend_dev_t dev = ggml_backend_reg_dev_get(reg, i);
        bool known = false;
        for (size_t k = 0; k < n_devices; k++) {
            known = known || devices[k] == dev;
        }
        if (!known) {
            devices[n_devices++] = dev;
        }
    }
    snprintf(name, name_len, "%s", ggml_backend_dev_name(ggml_backend_reg_dev_get(reg, 0)));
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
