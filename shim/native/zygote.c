// SPDX-License-Identifier: Apache-2.0
// The zygote: one datagram in, one datagram out. It executes plans and decides nothing.
//
//   descriptors at start: 3 the daemon's socket (SEQPACKET), 4 the read end of the daemon's life pipe
#include "slot.h"
#include <linux/prctl.h>
#include <linux/sched.h>

enum { SIGKILL_ = 9, SIGCHLD_ = 17 };

static char plan[PLAN_MAX_MESSAGE] __attribute__((aligned(8)));     // the shape's, kept for every slot
static char message[PLAN_MAX_MESSAGE] __attribute__((aligned(8)));  // the one being served
static struct shape shape;
static bool ready;

static void answer(const struct failure *why, int init, int runner, uint32_t flags, const int *fds, unsigned nfds) {
    struct { struct plan_header head; struct plan_done done; } msg = {
        {PLAN_MAGIC, PLAN_VERSION, KIND_DONE, sizeof msg, nfds},
        {why->error, why->error ? why->step : STEP_NONE, init, runner, flags, why->op}};
    if (send_fds(FD_CONTROL, &msg, sizeof msg, fds, nfds) < 0) sys_exit(1);  // nobody is left to work for
}

static bool maps_valid(size_t len, const struct plan_slot **slot, const struct plan_map **maps) {
    *slot = (const void *)(message + sizeof(struct plan_header));
    *maps = (const void *)(*slot + 1);
    size_t fixed = sizeof(struct plan_header) + sizeof **slot;
    return len >= fixed && (*slot)->nmaps <= 64 && len == fixed + (*slot)->nmaps * sizeof **maps;
}

// Write the uid and gid maps of a process that waits in a new user namespace; user_namespaces(7): one write each.
static long write_maps(long pid, const struct plan_map *maps, uint32_t count) {
    for (uint32_t gid = 0; gid < 2; gid++) {
        char path[48], text[64 * 36], *p = text, *end = text + sizeof text;
        char *q = str_add(path, path + sizeof path, "/proc/");
        q = str_add_u64(q, path + sizeof path, (uint64_t)pid);
        str_add(q, path + sizeof path, gid ? "/gid_map" : "/uid_map");
        for (uint32_t i = 0; i < count; i++) {
            if (maps[i].gid != gid) continue;
            const uint32_t ids[3] = {maps[i].inside, maps[i].outside, maps[i].count};
            for (int k = 0; k < 3; k++) p = str_add(str_add_u64(p, end, ids[k]), end, k < 2 ? " " : "\n");
        }
        long fd = sys_openat(AT_FDCWD, path, O_WRONLY | O_CLOEXEC, 0);
        if (fd < 0) return fd;
        long n = sys_write((int)fd, text, (size_t)(p - text));
        sys_close((int)fd);
        if (n < 0) return n;
    }
    return 0;
}

static void make_shape(size_t len, const int *fds, unsigned nfds) {
    struct failure why = {STEP_MESSAGE, 0, EALREADY};
    if (!ready) {
        memcpy(plan, message, len);
        if (plan_load(plan, len, nfds, &shape, &why) && template_build(&shape, fds, &why)) {
            ready = true;
            why.error = 0;
        }
    }
    answer(&why, 0, 0, 0, NULL, 0);
    if (why.error && why.step == STEP_TEMPLATE) sys_exit(1);  // half a template serves nobody
}

// fds: the runner's control socket, then the leaf if SLOT_LEAF
static void make_slot(size_t len, const int *fds, unsigned nfds) {
    const struct plan_slot *slot;
    const struct plan_map *maps;
    struct failure why = {STEP_MESSAGE, 0, EINVAL};
    int pair[2], pidfds[2] = {-1, -1};
    if (!maps_valid(len, &slot, &maps) || !ready || nfds != (slot->flags & SLOT_LEAF ? 2 : 1))
        return answer(&why, 0, 0, 0, NULL, 0);
    uint32_t how = slot->flags & SLOT_NO_CLONE3;
    int leaf = slot->flags & SLOT_LEAF ? fds[1] : -1;
    long err = SYS4(__NR_socketpair, AF_UNIX_, SOCK_SEQPACKET_ | SOCK_CLOEXEC_, 0, pair), init = 0, runner = 0;
    if (err < 0) return why.error = (int)-err, answer(&why, 0, 0, 0, NULL, 0);

    why.step = STEP_CLONE_INIT;
    // Whoever makes a user namespace owns it, and pays for what the kernel counts by user (inotify, queues, signals): the
    // tenant, not root. Our capabilities stay: SECBIT_NO_SETUID_FIXUP.
    err = SYS3(__NR_setresuid, -1, slot->nmaps ? maps[0].outside : 0, -1);
    if (err >= 0) init = spawn(shape.namespaces & ~(uint64_t)CLONE_NEWCGROUP, leaf, &how, &pidfds[0], &err);
    if (init == 0 && err >= 0) init_main(&shape, pair[1]);
    if (SYS3(__NR_setresuid, -1, 0, -1) < 0) sys_exit(1);
    if (err >= 0) why.step = STEP_ID_MAP, err = write_maps(init, maps, slot->nmaps);
    if (err >= 0) why.step = STEP_CLONE_RUNNER, err = SYS2(__NR_setns, pidfds[0], CLONE_NEWPID);
    if (err >= 0) {
        runner = spawn(0, leaf, &how, &pidfds[1], &err);
        if (runner == 0) runner_main(&shape, pair[0], fds[0], pidfds[0]);
        long own = sys_openat(AT_FDCWD, "/proc/self/ns/pid", O_RDONLY | O_CLOEXEC, 0);
        if (own < 0 || SYS2(__NR_setns, (int)own, CLONE_NEWPID) < 0) sys_exit(1);  // the next clone would be a stranger's
        sys_close((int)own);
    }
    if (err >= 0) err = sys_write(pair[0], "g", 1);
    if (err < 0 && pidfds[0] >= 0) SYS4(__NR_pidfd_send_signal, pidfds[0], SIGKILL_, NULL, 0);
    why.error = err < 0 ? (int)-err : 0;
    answer(&why, init > 0 ? (int)init : 0, runner > 0 ? (int)runner : 0, how, pidfds, (pidfds[0] >= 0) + (pidfds[1] >= 0));
    for (int i = 0; i < 2; i++) {
        sys_close(pair[i]);
        if (pidfds[i] >= 0) sys_close(pidfds[i]);
    }
}

static void make_userns(size_t len, unsigned nfds) {
    const struct plan_slot *head;
    const struct plan_map *maps;
    struct failure why = {STEP_MESSAGE, 0, EINVAL};
    if (!maps_valid(len, &head, &maps) || nfds) return answer(&why, 0, 0, 0, NULL, 0);
    why.step = STEP_CLONE_INIT;
    int pidfd = -1, ns = -1, status;
    long pid = SYS5(__NR_clone, CLONE_NEWUSER | CLONE_PIDFD | SIGCHLD_, 0, &pidfd, NULL, 0);
    if (pid == 0)
        for (;;) SYS1(__NR_pause, 0);
    long err = pid;
    if (err > 0) why.step = STEP_ID_MAP, err = write_maps(pid, maps, head->nmaps);
    if (err >= 0) {
        char path[48];
        char *q = str_add_u64(str_add(path, path + sizeof path, "/proc/"), path + sizeof path, (uint64_t)pid);
        str_add(q, path + sizeof path, "/ns/user");
        err = ns = (int)sys_openat(AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0);
    }
    if (pid > 0) {
        SYS4(__NR_pidfd_send_signal, pidfd, SIGKILL_, NULL, 0);
        SYS4(__NR_wait4, pid, &status, 0, NULL);
        sys_close(pidfd);
    }
    why.error = err < 0 ? (int)-err : 0;
    answer(&why, 0, 0, 0, &ns, ns >= 0);
    if (ns >= 0) sys_close(ns);
}

static void serve(size_t len, const int *fds, unsigned nfds) {
    const struct plan_header *head = (const void *)message;
    struct failure why = {STEP_MESSAGE, 0, EPROTO};
    bool sound = len >= sizeof *head && head->magic == PLAN_MAGIC && head->version == PLAN_VERSION && head->length == len &&
                 head->nfds == nfds;
    if (sound && head->kind == KIND_SHAPE) make_shape(len, fds, nfds);
    else if (sound && head->kind == KIND_SLOT) make_slot(len, fds, nfds);
    else if (sound && head->kind == KIND_USERNS) make_userns(len, nfds);
    else answer(&why, 0, 0, 0, NULL, 0);
}

int program(int argc, char **argv, char **envp) {
    (void)argc, (void)argv, (void)envp;
    signals_default();
    keyring_seal();
    sys_prctl(PR_SET_SECUREBITS, 0x4 /* SECBIT_NO_SETUID_FIXUP */, 0, 0, 0);
    sys_close_range(FD_PAIR, ~0u);
    for (;;) {
        int fds[MAX_FDS];
        unsigned nfds;
        long n = recv_fds(FD_CONTROL, message, sizeof message, fds, &nfds);
        if (n == 0) return 0;
        if (n < 0 && n != -EMSGSIZE) return 1;
        serve(n < 0 ? 0 : (size_t)n, fds, nfds);
        while (nfds) sys_close(fds[--nfds]);
    }
}
