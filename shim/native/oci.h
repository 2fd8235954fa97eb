// SPDX-License-Identifier: Apache-2.0
// The OCI runtime's native half: one program, two uses.
//
//   verbs      `agentrun-oci state|start|kill|delete ...` are done here, without Python; all others are passed on to it.
//   container  `agentrun-oci _container PLAN UP DOWN KEEP`: execute a container plan (agentrun_shim/container_plan.py).
#pragma once
#include "slot.h"

enum { PATH_ROOM = 4096, MAX_SLOTS = 1024 };
enum { AT_EMPTY_PATH_ = 0x1000, AT_RECURSIVE_ = 0x8000, AT_SYMLINK_NOFOLLOW_ = 0x100 };

// ---------------------------------------------------------------- oci_container.c

struct container {
    const struct plan_op *first, *op;  // the plan, and the operation that is executed
    uint32_t nops, at;
    int slots[MAX_SLOTS];              // descriptors that operations made, by number
    int up, down;                      // the pipes to the creator, then the connection of `start`
    int leaf, console, agent, listen;  // -1 where there is none
    int root;                          // the root to be, then the root
    unsigned keep;                     // descriptors from 3 on that are the program's
    char *state;                       // the JSON that hooks and the seccomp agent are given
    size_t state_len;
    char home[PATH_ROOM];              // HOME=..., where the configuration has none
};

int container_main(int argc, char **argv);
void event_send(const struct container *c, uint32_t kind, uint32_t step, long err, uint32_t op);
static inline const char *op_blob(const struct plan_op *op, const char *after) {
    return (const char *)op + (((size_t)(after - (const char *)op) + 7) & ~7ul);
}

// ---------------------------------------------------------------- oci_tree.c: paths within the root, mounts

long root_open(const struct container *c, const char *path, int flags);
long tree_open(struct container *c, const char *source);
long tree_attr(const struct container *c);
long root_enter(struct container *c, const char *path);
long tree_attach(const struct container *c, const char *dest);
long filesystem_mount(const struct container *c, const char *type);
long node_make(const struct container *c, const char *path);
long link_make(const struct container *c, const char *target);
long path_mask(const struct container *c, const char *path);
long path_freeze(const struct container *c, const char *path);
long root_pivot(const struct container *c);
long work_directory(const char *path, bool make);
long tree_copy(int from, int to, unsigned depth);

// ---------------------------------------------------------------- oci_process.c: what the container's process becomes

long terminal_make(struct container *c);
long hook_run(const struct container *c, const char *path);
long program_find(struct container *c, const char *name);
long ids_set(const struct plan_op *op);
long limit_set(const struct plan_op *op);
long bounding_set(uint64_t keep);
long capabilities_raise(void);
long capabilities_become(const uint64_t *sets);
long seccomp_load(const struct container *c);
long device_program(const struct container *c, const char *cgroup);
long unix_connect(const char *path);
__attribute__((noreturn)) void program_exec(struct container *c);

// ---------------------------------------------------------------- oci_verbs.c, oci_cgroup.c, oci_front.c

struct front {
    const char *root, *log, *id;
    bool json_log, force, all;
    char **argv, **envp;
};

__attribute__((noreturn)) void python(const struct front *f, const char *internal);
__attribute__((noreturn)) void die(const struct front *f, ...);  // strings, NULL: said on stderr and in the log
int verb_state(const struct front *f);
int verb_start(const struct front *f);
int verb_kill(const struct front *f, const char *signal);
int verb_delete(const struct front *f);
const char *error_text(long err);
long file_read(int dirfd, const char *path, char *buf, size_t room);
long file_write(int dirfd, const char *path, const char *text);
long cgroup_kill(const char *path);
long cgroup_signal(int cgroup, int signal);
long cgroup_remove(const char *path, int patience_ms);
void sleep_ms(unsigned ms);
