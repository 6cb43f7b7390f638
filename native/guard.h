/* ggml ends the process when a device fails: its RPC client does when a server goes away, CUDA when a call fails. While
 * a worker is guarded, that costs the worker and not the process: see worker.h.
 *
 * ggml calls the hook in the thread that found the failure. That is the worker's own, or one of the RPC client, which
 * the worker waits for: of those it is not known for which server they are, so that all that are busy are lost, and
 * where none is, all: their connection is, and whatever would use it waits for ever.
 */
#ifndef HB_GUARD_H
#define HB_GUARD_H

#include <stdbool.h>

struct hb_worker;

/* `what` it uses, or NULL: the same for all that share a connection, as the devices of a server do; it stays the
 * caller's. `remote`: with ggml's RPC client. False when memory is short. */
bool hb_guard_add(struct hb_worker *worker, const char *what, bool remote);
void hb_guard_remove(struct hb_worker *worker); /* one that is lost stays guarded: its thread must never return */
/* What this worker uses answers no more, though nothing has failed: its thread may come back and remove it. */
void hb_guard_fail(struct hb_worker *worker);
/* Wait so many seconds at most for such threads of `what`: until they come back, or fail. */
void hb_guard_wait_for_silent(const char *what, int seconds);
/* Whether it failed under any worker: ggml would not answer for it any more. */
bool hb_guard_has_failed(const char *what);
/* Whether a worker has it, also a lost one, and it has not failed. */
bool hb_guard_has(const char *what);

#endif
