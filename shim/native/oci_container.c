// SPDX-License-Identifier: Apache-2.0
// A container, from the first operation of its plan to the last. The helper executes up to CLONE; from there on it is the
// container's own process. Nobody waits for the helper but its creator, who is told the pid and is the container's parent.
//
//   creator ──plan (memfd)──► helper ──clone(CLONE_PARENT, into the leaf)──► container's process
//           ◄──up: CLONED pid───                                             │
//           ───down: m, state────────────────────────────────────────────────►  maps are written; what hooks are told
//           ◄──up: READY, PARKED, or FAILED with the operation───────────────│
//           ───down: c───────────────────────────────────────────────────────►  the creator has noted it all down
//
// End of file on `down` before c means that the creator died: the process exits, and the kernel clears up with it.
#include "oci.h"
#include <linux/mman.h>
#include <linux/mount.h>
#include <linux/prctl.h>
#include <linux/sched.h>

static struct container self;

void event_send(const struct container *c, uint32_t kind, uint32_t step, long err, uint32_t op) {
    struct plan_event event = {kind, step, (int)-err, op, sys_monotonic_ns()};
    long n;
    do n = sys_write(c->up, &event, sizeof event);
    while (n == -EINTR);
}

__attribute__((noreturn)) static void fail(struct container *c, uint32_t step, long err) {
    event_send(c, KIND_FAILED, step, err, c->at);
    sys_exit(1);
}

// ---------------------------------------------------------------- the plan

static bool strings_inside(const char *p, const char *end, uint32_t count) {
    for (; count; count--) {
        while (p < end && *p) p++;
        if (p++ >= end) return false;
    }
    return true;
}

// Bytes of payload behind the strings that an operation must have.
static uint64_t blob_need(const struct plan_op *op) {
    switch (op->type) {
    case COP_IDS: return (uint64_t)op->c * 4;
    case COP_PROGRAM:
    case COP_SECCOMP: return (uint64_t)op->a * 8;
    case COP_USERNS: return (uint64_t)op->b * sizeof(struct plan_map);
    case COP_LIMIT: return 16;
    case COP_BOUND: return 8;
    case COP_CAPS: return 32;
    case COP_SCHED: return 56;
    case COP_AFFINITY: return op->a;
    case COP_MEMPOLICY: return op->b;
    default: return 0;
    }
}

static bool op_check(const struct plan_op *op, size_t room) {
    if (room < sizeof *op || op->size < sizeof *op || op->size > room || op->size % 8) return false;
    const char *p = op_text(op), *end = (const char *)op + op->size;
    for (unsigned i = 0; i < sizeof container_strings / sizeof container_strings[0]; i++) {
        if (container_strings[i].type != op->type) continue;
        if (!strings_inside(p, end, container_strings[i].strings)) return false;
        for (unsigned k = container_strings[i].strings; k; k--) p = text_next(p);
        if (container_strings[i].strings) p = op_blob(op, p);
        if (p > end || blob_need(op) > (uint64_t)(end - p)) return false;
        bool lists = op->type == COP_EXEC || op->type == COP_HOOK;
        if (lists && (op->a == 0 || op->a > op->size || op->b > op->size || !strings_inside(p, end, op->a + op->b))) return false;
        bool slot = op->type == COP_TREE || op->type == COP_ATTR || op->type == COP_USERNS || op->type == COP_OPEN ||
                    op->type == COP_ROOT || op->type == COP_ATTACH || op->type == COP_LABEL;
        return !(slot && op->a >= MAX_SLOTS) && !(op->type == COP_TREE && op->c > MAX_SLOTS);
    }
    return false;
}

static bool plan_check(struct container *c, const char *plan, size_t len) {
    const struct plan_header *head = (const void *)plan;
    const struct plan_shape *shape = (const void *)(head + 1);
    size_t at = sizeof *head + sizeof *shape;
    if (len < at || head->magic != PLAN_MAGIC || head->version != PLAN_VERSION || head->kind != KIND_CONTAINER || head->length != len)
        return false;
    c->first = c->op = (const void *)(plan + at), c->nops = shape->nops;
    uint32_t last = 0;
    for (c->at = 0; c->at < c->nops; c->at++) {
        const struct plan_op *op = (const void *)(plan + at);
        if (!op_check(op, len - at)) return false;
        last = op->type;
        at += op->size;
    }
    c->at = 0;
    return at == len && last == COP_EXEC;
}

static char *plan_map(int fd, size_t *len) {
    long size = SYS3(__NR_lseek, fd, 0, 2 /* SEEK_END */);
    if (size <= 0) return NULL;
    long p = sys6(__NR_mmap, 0, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    *len = (size_t)size;
    return p < 0 && p > -4096 ? NULL : (char *)p;
}

// ---------------------------------------------------------------- the helper's operations

static long join(const char *path, uint32_t flag) {
    long fd = sys_openat(AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0);
    if (fd < 0) return fd;
    long err = SYS2(__NR_setns, fd, flag);
    sys_close((int)fd);
    return err;
}

static long cgroup_open(struct container *c, const char *path) {
    long fd = sys_openat(AT_FDCWD, path, O_PATH | O_DIRECTORY | O_CLOEXEC, 0);
    if (fd >= 0) c->leaf = (int)fd;
    return fd;
}

static long listen_at(struct container *c, const char *path) {
    struct { uint16_t family; char path[108]; } address = {AF_UNIX_, {0}};
    size_t n = str_len(path);
    if (n >= sizeof address.path) return -ENAMETOOLONG;
    memcpy(address.path, path, n);
    long fd = SYS3(__NR_socket, AF_UNIX_, SOCK_SEQPACKET_ | SOCK_CLOEXEC_, 0);
    if (fd < 0) return fd;
    long err = SYS3(__NR_bind, fd, &address, sizeof address);
    if (err >= 0) err = SYS2(__NR_listen, fd, 16);
    c->listen = (int)fd;
    return err;
}

// A user namespace with given maps, held by a process that is gone when this returns.
static long userns_make(struct container *c, const struct plan_op *op) {
    const struct plan_map *maps = (const void *)op_text(op);
    int pidfd = -1, status;
    long pid = SYS5(__NR_clone, CLONE_NEWUSER | CLONE_PIDFD | 17 /* SIGCHLD */, 0, &pidfd, NULL, 0);
    if (pid == 0)
        for (;;) SYS1(__NR_pause, 0);
    if (pid < 0) return pid;
    char path[64];
    char *name = str_add_u64(str_add(path, path + sizeof path, "/proc/"), path + sizeof path, (uint64_t)pid);
    long err = 0;
    for (uint32_t gid = 0; gid < 2 && err >= 0; gid++) {
        char text[PATH_ROOM], *p = text, *end = text + sizeof text;
        for (uint32_t i = 0; i < op->b; i++) {
            if (maps[i].gid != gid) continue;
            const uint32_t ids[3] = {maps[i].inside, maps[i].outside, maps[i].count};
            for (int k = 0; k < 3; k++) p = str_add(str_add_u64(p, end, ids[k]), end, k < 2 ? " " : "\n");
        }
        str_add(name, path + sizeof path, gid ? "/gid_map" : "/uid_map");
        long fd = err = sys_openat(AT_FDCWD, path, O_WRONLY | O_CLOEXEC, 0);
        if (fd >= 0) err = sys_write((int)fd, text, (size_t)(p - text)), sys_close((int)fd);
    }
    str_add(name, path + sizeof path, "/ns/user");
    if (err >= 0) err = c->slots[op->a] = (int)sys_openat(AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0);
    SYS4(__NR_pidfd_send_signal, pidfd, 9 /* SIGKILL */, NULL, 0);
    SYS4(__NR_wait4, pid, &status, 0, NULL);
    sys_close(pidfd);
    return err;
}

// The fork of the plan: the helper tells who was born and is done; the child goes on with the next operation.
static long birth(struct container *c) {
    uint32_t how = 0;
    int pidfd = -1;
    long err = 0, pid = spawn(c->op->a, c->leaf, &how, &pidfd, &err);
    if (pid == 0) {
        // Nobody in the container may look into it, or at what it has open, before it is the program. In a new user namespace
        // there is nobody yet, and its creator has to write its maps: MASTER does it then.
        return c->op->a & CLONE_NEWUSER ? 0 : sys_prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    }
    if (err < 0) return err;
    event_send(c, EVENT_CLONED, 0, 0, (uint32_t)pid);
    sys_exit(0);
}

// ---------------------------------------------------------------- the container's operations

static long wait_byte(const struct container *c, char wanted) {
    char got = 0;
    long n;
    do n = sys_read(c->down, &got, 1);
    while (n == -EINTR);
    if (n != 1 || got != wanted) sys_exit(1);  // the creator is gone
    return 0;
}

static long state_receive(struct container *c) {
    uint32_t len = 0;
    event_send(c, KIND_READY, 0, 0, 0);
    if (sys_read(c->down, &len, sizeof len) != sizeof len || len > 1u << 24) sys_exit(1);
    long p = sys6(__NR_mmap, 0, (long)len + 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p < 0 && p > -4096) return p;
    c->state = (char *)p, c->state_len = len;
    for (size_t got = 0; got < len;) {
        long n = sys_read(c->down, c->state + got, len - got);
        if (n == -EINTR) continue;
        if (n <= 0) sys_exit(1);
        got += (size_t)n;
    }
    return 0;
}

// Ready but for `start`. A connection without the byte is somebody who asks whether we still wait: `state`.
static long park(struct container *c) {
    event_send(c, EVENT_PARKED, 0, 0, 0);
    wait_byte(c, 'c');
    sys_close(c->up);
    sys_close(c->down);
    c->up = c->down = -1;
    for (;;) {
        char byte = 0;
        long conn = SYS4(__NR_accept4, c->listen, NULL, NULL, SOCK_CLOEXEC_), n;
        if (conn == -EINTR || conn == -ECONNABORTED) continue;
        if (conn < 0) sys_exit(1);
        do n = sys_read((int)conn, &byte, 1);
        while (n == -EINTR);
        if (n == 1 && byte == 'g') {
            sys_close(c->listen);  // from now on nobody can start it, and it counts as running
            c->listen = -1;
            c->up = (int)conn;
            return 0;
        }
        sys_close((int)conn);
    }
}

static long master(void) {
    long err;
    if ((err = SYS2(__NR_setgroups, 0, NULL)) < 0 && err != -EPERM) return err;  // EPERM: /proc/self/setgroups says deny
    if ((err = SYS3(__NR_setresgid, 0, 0, 0)) < 0) return err;
    if ((err = SYS3(__NR_setresuid, 0, 0, 0)) < 0) return err;
    return sys_prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
}

static long write_file(const char *path, const char *text) {
    long fd = sys_openat(AT_FDCWD, path, O_WRONLY | O_CLOEXEC, 0);
    if (fd < 0) return fd;
    long n = sys_write((int)fd, text, str_len(text));
    sys_close((int)fd);
    return n;
}

static long keyring(const char *name) {
    long ring = SYS2(__NR_keyctl, 1 /* KEYCTL_JOIN_SESSION_KEYRING */, name);
    if (ring == -EACCES || ring == -EPERM) ring = SYS2(__NR_keyctl, 1, NULL);  // the name is another user's: one without
    return ring == -ENOSYS || ring == -EDQUOT ? 0 : ring;  // no keys in this kernel, or too many: the old ring stays
}

static long execute(struct container *c) {
    const struct plan_op *op = c->op;
    const char *one = op_text(op), *two = one;
    const void *blob = one;
    for (unsigned i = 0; i < sizeof container_strings / sizeof container_strings[0]; i++)
        if (container_strings[i].type == op->type && container_strings[i].strings) {
            const char *end = two = text_next(one);
            for (unsigned k = container_strings[i].strings; k > 1; k--) end = text_next(end);
            blob = op_blob(op, end);
        }
    switch (op->type) {
    case COP_JOIN: return join(one, op->a);
    case COP_ENTER: return SYS2(__NR_setns, op->a, op->b);
    case COP_UNSHARE: return SYS1(__NR_unshare, op->a);
    case COP_LEAF: return cgroup_open(c, one);
    case COP_PROGRAM: return device_program(c, one);
    case COP_TREE: return tree_open(c, one);
    case COP_ATTR: return tree_attr(c);
    case COP_USERNS: return userns_make(c, op);
    case COP_OPEN: return c->slots[op->a] = (int)sys_openat(AT_FDCWD, one, (int)op->b | O_CLOEXEC, 0);
    case COP_CONSOLE: return c->console = (int)unix_connect(one);
    case COP_AGENT: return c->agent = (int)unix_connect(one);
    case COP_LISTEN: return listen_at(c, one);
    case COP_CLONE: return birth(c);
    case COP_WAIT: return wait_byte(c, (char)op->a);
    case COP_STATE: return state_receive(c);
    case COP_ROOT: return root_enter(c, one);
    case COP_MASTER: return master();
    case COP_FSMOUNT: return filesystem_mount(c, one);
    case COP_ATTACH: return tree_attach(c, one);
    case COP_NODE: return node_make(c, one);
    case COP_LINK: return link_make(c, one);
    case COP_MASKED: return path_mask(c, one);
    case COP_FROZEN: return path_freeze(c, one);
    case COP_WRITE: return write_file(one, two);
    case COP_HOSTNAME: return SYS2(__NR_sethostname, one, str_len(one));
    case COP_DOMAIN: return SYS2(__NR_setdomainname, one, str_len(one));
    case COP_LOOPBACK: return loopback_up();
    case COP_TTY: return terminal_make(c);
    case COP_HOOK: return hook_run(c, one);
    case COP_ROOT_ATTR: {
        struct mount_attr attr = {.attr_set = op->a};
        return SYS5(__NR_mount_setattr, c->root, "", AT_EMPTY_PATH_, &attr, sizeof attr);
    }
    case COP_PIVOT: return root_pivot(c);
    case COP_CWD: return work_directory(one, op->a);
    case COP_FIND: return program_find(c, one);
    case COP_PARK: return park(c);
    case COP_LIMIT: return limit_set(op);
    case COP_BOUND: return bounding_set(*(const uint64_t *)blob);
    case COP_KEEP: return sys_prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0);
    case COP_RAISE: return capabilities_raise();
    case COP_IDS: return ids_set(op);
    case COP_CAPS: return capabilities_become(blob);
    case COP_NNP: return sys_prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    case COP_SECCOMP: return seccomp_load(c);
    case COP_LABEL: return sys_write(c->slots[op->a], one, str_len(one));
    case COP_PERSONALITY: return SYS1(__NR_personality, op->a);
    case COP_SCHED: return SYS3(__NR_sched_setattr, 0, blob, 0);
    case COP_IOPRIO: return SYS3(__NR_ioprio_set, 1 /* IOPRIO_WHO_PROCESS */, 0, op->a);
    case COP_UMASK: return SYS1(__NR_umask, op->a);
    case COP_KEYRING: return keyring(one);
    case COP_AFFINITY: return SYS3(__NR_sched_setaffinity, 0, op->a, blob);
    case COP_MEMPOLICY: return SYS3(__NR_set_mempolicy, op->a, blob, op->b * 8ul + 1);
    case COP_SESSION: return SYS1(__NR_setsid, 0);
    case COP_EXEC: program_exec(c);
    default: return -EINVAL;
    }
}

static unsigned number(const char *text) {
    unsigned value = 0;
    for (; *text >= '0' && *text <= '9'; text++) value = value * 10 + (unsigned)(*text - '0');
    return value;
}

// argv: _container, plan, up, down, keep
int container_main(int argc, char **argv) {
    struct container *c = &self;
    size_t len = 0;
    if (argc != 5) return 2;
    c->leaf = c->console = c->agent = c->listen = c->root = -1;
    c->up = (int)number(argv[2]), c->down = (int)number(argv[3]), c->keep = number(argv[4]);
    for (unsigned i = 0; i < MAX_SLOTS; i++) c->slots[i] = -1;
    SYS3(__NR_fcntl, c->up, 2 /* F_SETFD */, 1);
    SYS3(__NR_fcntl, c->down, 2 /* F_SETFD */, 1);
    char *plan = plan_map((int)number(argv[1]), &len);
    sys_close((int)number(argv[1]));
    if (!plan || !plan_check(c, plan, len)) fail(c, STEP_PLAN, -EINVAL);
    for (;; c->at++, c->op = op_next(c->op)) {
        long err = execute(c);
        if (err < 0) fail(c, 0, err);
    }
}
