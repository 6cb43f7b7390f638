/* ggml ends the process when a device fails: its RPC client does when a server goes away, CUDA when a call fails. While
 * a worker is guarded, that costs the worker and not the process: see worker.h.
 *
 * ggml calls the hook in the thread that found the failure. That is the worker's own, or one of the RPC client, which
 * the worker waits for: of those it is not known for which server they are, so that all that are busy are lost.
 */
#ifndef HB_GUARD_H
#define HB_GUARD_H

#include <stdbool.h>

struct hb_worker;

/* `remote`: it uses ggml's RPC client. False: too many are guarded. */
bool hb_guard_add(struct hb_worker *worker, bool remote);
void hb_guard_remove(struct hb_worker *worker); /* one that is lost stays guarded: its thread must never return */

#endif
