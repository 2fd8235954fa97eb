// SPDX-License-Identifier: Apache-2.0
// The native slot: three programs in one binary, in the order they come to be.
//
//   zygote    one per shape, root, a child of the daemon. Builds the shape's mount template once, then clones slots.
//   init      PID 1 of a slot: the mounts only a new pid namespace can make; then it reaps and guards.
//   runner    PID 2 of a slot, a child of the daemon (CLONE_PARENT): enters init's namespaces, drops everything,
//             reports READY and waits; on RUN it becomes the tool by execve.
//
// Who ends whom: init holds the read end of a pipe whose only writer is the daemon. Its end of file means the daemon
// died; init exits and the kernel kills whatever lives in its pid namespace. The zygote exits when its socket closes.
#pragma once
#include "sys.h"
#include "plan.h"

// Close-on-exec descriptors with fixed numbers, so that "close everything else" is one close_range().
enum { FD_CONTROL = 3, FD_LIFE = 4, FD_PAIR = 5, FD_INIT = 6, FD_RULES = 7, FD_FREE = 8 };

struct failure { uint32_t step, op; int error; };

// A shape's plan, checked once by plan_load() and walked without further checks by whoever executes a part of it.
struct shape { uint32_t namespaces, nops; const struct plan_op *first; };

static inline const struct plan_op *op_next(const struct plan_op *op) {
    return (const struct plan_op *)((const char *)op + op->size);
}
static inline const char *op_text(const struct plan_op *op) { return (const char *)(op + 1); }
static inline const char *text_next(const char *text) { return text + str_len(text) + 1; }

// plan.c
bool plan_load(const char *msg, size_t len, unsigned nfds, struct shape *shape, struct failure *why);

// template.c
bool template_build(const struct shape *shape, const int *fds, struct failure *why);

// init.c
__attribute__((noreturn)) void init_main(const struct shape *shape, int pair);

// runner.c
__attribute__((noreturn)) void runner_main(const struct shape *shape, int pair, int control, int init_pidfd);

// shared.c
long spawn(uint64_t flags, int leaf, uint32_t *how, int *pidfd, long *err);
long loopback_up(void);
long ids_become(const struct plan_op *op);
const char *env_get(char *const *envp, const char *name);
long exec_path(char *const *argv, char *const *envp);

// landlock.c
long landlock_prepare(const struct plan_op *op);
long landlock_enter(const char *workspace);

// rights.c
long securebits_lock(void);
void keyring_seal(void);
long bounding_drop_all(void);
long capabilities_set(uint64_t mask);
void signals_default(void);
