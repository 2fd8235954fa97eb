// SPDX-License-Identifier: Apache-2.0
// PID 1 of a slot: makes the mounts that need the slot's own namespaces, reaps, attaches the call's workspace, and
// ends the sandbox when the daemon is gone. It runs as uid 0 of the slot's user namespace, the tool never does, so
// the tool can neither signal nor trace it.
#include "slot.h"
#include <linux/capability.h>
#include <linux/mount.h>
#include <linux/prctl.h>
#include <linux/sched.h>
#include <linux/poll.h>

enum { SIGCHLD_ = 17 };

static long make_dir(const struct plan_op *op, const char *path) {
    long err = SYS2(__NR_mkdir, path, 0700);
    if (err < 0 && err != -EEXIST) return err;
    if ((err = SYS3(__NR_chown, path, op->b, op->c)) < 0) return err;
    return SYS2(__NR_chmod, path, op->a);
}

static long bind(const struct plan_op *op) {
    return SYS5(__NR_mount, op_text(op), text_next(op_text(op)), NULL, MS_BIND, NULL);
}

// What a path shows, taken away: a file reads as empty, a directory is. One that is not there needs no mask.
static long mask(const char *path) {
    long err = SYS5(__NR_mount, "/dev/null", path, NULL, MS_BIND, NULL);
    if (err == -ENOTDIR) err = SYS5(__NR_mount, "tmpfs", path, "tmpfs", MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, "size=0,mode=555");
    return err == -ENOENT ? 0 : err;
}

static long read_only(const char *path) {
    struct mount_attr attr = {.attr_set = MOUNT_ATTR_RDONLY};
    long err = SYS5(__NR_mount, path, path, NULL, MS_BIND | MS_REC, NULL);
    if (err < 0) return err == -ENOENT ? 0 : err;
    return SYS5(__NR_mount_setattr, AT_FDCWD, path, 0x8000 /* AT_RECURSIVE */, &attr, sizeof attr);
}

static long execute(const struct plan_op *op, uint32_t *step) {
    const char *one = op_text(op), *two;
    *step = op->type == OP_LOOPBACK ? STEP_NETWORK : STEP_MOUNTS;
    switch (op->type) {
    case OP_MOUNT:
        two = text_next(one);
        return SYS5(__NR_mount, one, two, one, op->a, text_next(two));
    case OP_MKDIR: return make_dir(op, one);
    case OP_SLOT_BIND: return op->a ? 0 : bind(op);
    case OP_HOSTNAME: return SYS2(__NR_sethostname, one, str_len(one));
    case OP_MASK: return mask(one);
    case OP_READ_ONLY: return read_only(one);
    case OP_LOOPBACK: return loopback_up();
    default: return 0;  // the template's or the runner's
    }
}

static bool prepare(const struct shape *shape, struct failure *why) {
    long err;
    *why = (struct failure){STEP_IDENTITY, 0, 0};
    if ((err = SYS2(__NR_setgroups, 0, NULL)) < 0 || (err = SYS3(__NR_setresgid, 0, 0, 0)) < 0 ||
        (err = SYS3(__NR_setresuid, 0, 0, 0)) < 0)
        return why->error = (int)-err, false;
    // Only now: copy_cgroup_ns() takes the cgroup of the caller of clone, which is the zygote's, not the leaf.
    why->step = STEP_ENTER;
    if ((shape->namespaces & CLONE_NEWCGROUP) && (err = SYS1(__NR_unshare, CLONE_NEWCGROUP)) < 0)
        return why->error = (int)-err, false;
    const struct plan_op *op = shape->first;
    for (uint32_t i = 0; i < shape->nops; i++, op = op_next(op)) {
        if ((err = execute(op, &why->step)) < 0) return why->op = i, why->error = (int)-err, false;
    }
    why->step = STEP_CAPABILITIES;
    if ((err = bounding_drop_all()) < 0 || (err = capabilities_set(1ull << CAP_SYS_ADMIN)) < 0 ||
        (err = sys_prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) < 0 || (err = sys_prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)) < 0)
        return why->error = (int)-err, false;
    return true;
}

static bool below(const char *path, const char *top) {
    size_t n = str_len(top);
    return memcmp(path, top, n) == 0 && path[n] == '/';
}

// Attach one mount at its path, whose missing directories are made where the slot's own file systems allow it.
static long attach(const struct shape *shape, int mount_fd, char *path) {
    const struct plan_op *op = shape->first;
    for (uint32_t i = 0; i < shape->nops; i++, op = op_next(op))
        if (op->type == OP_SLOT_BIND && op->a && below(path, text_next(op_text(op)))) {
            long err = bind(op);
            if (err < 0) return err;
        }
    for (char *p = path + 1; *p; p++)
        if (*p == '/') *p = 0, SYS2(__NR_mkdir, path, 0755), *p = '/';
    SYS2(__NR_mkdir, path, 0755);  // what could not be made shows as ENOENT in the next line
    return SYS5(__NR_move_mount, mount_fd, "", AT_FDCWD, path, MOVE_MOUNT_F_EMPTY_PATH);
}

static void serve_attach(const struct shape *shape) {
    static char msg[sizeof(struct plan_attach) + 4096 + 1];
    const struct plan_attach *request = (const void *)msg;
    int fds[MAX_FDS];
    unsigned nfds;
    long n = recv_fds(FD_PAIR, msg, sizeof msg - 1, fds, &nfds);
    if (n > (long)sizeof *request && nfds == 1) {
        msg[n] = 0;
        long err = attach(shape, fds[0], msg + sizeof *request);
        struct plan_event answer = {err < 0 ? KIND_FAILED : KIND_READY, STEP_WORKSPACE, (int)-err, 0, 0};
        send_fds(FD_PAIR, &answer, sizeof answer, NULL, 0);
    }
    while (nfds) sys_close(fds[--nfds]);
    if (n > 0) return;
    // The runner has become the tool, or died: nothing is left to attach, and no right is needed to wait and reap.
    sys_close(FD_PAIR);
    capabilities_set(0);
}

void init_main(const struct shape *shape, int pair) {
    struct { void *handler; unsigned long flags; void *restorer; uint64_t mask; } ignore = {(void *)1, 0, 0, 0};
    struct failure why;
    char go;
    sys_dup3(pair, FD_PAIR, O_CLOEXEC);
    sys_close_range(FD_INIT, ~0u);
    sys_close_range(0, FD_CONTROL);
    if (sys_read(FD_PAIR, &go, 1) != 1) sys_exit(1);  // the id maps could not be written
    SYS4(__NR_rt_sigaction, SIGCHLD_, &ignore, NULL, 8);  // the kernel reaps for a parent that ignores SIGCHLD
    bool ok = prepare(shape, &why);
    struct plan_event event = {ok ? KIND_READY : KIND_FAILED, why.step, why.error, why.op, 0};
    if (send_fds(FD_PAIR, &event, sizeof event, NULL, 0) < 0 || !ok) sys_exit(1);
    struct pollfd poll[2] = {{FD_LIFE, POLLIN, 0}, {FD_PAIR, POLLIN, 0}};
    for (;;) {
        long n = SYS3(__NR_poll, poll, 2, -1);
        if (n < 0 && n != -EINTR) sys_exit(1);
        if (n > 0 && poll[0].revents) sys_exit(0);
        if (n > 0 && poll[1].revents) {
            serve_attach(shape);
            if (SYS2(__NR_fcntl, FD_PAIR, F_GETFD) < 0) poll[1].fd = -1;
        }
    }
}
