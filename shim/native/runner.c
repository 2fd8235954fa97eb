// SPDX-License-Identifier: Apache-2.0
// The runner: enters the sandbox ahead of time, gives up every right, waits, and becomes the tool.
// After READY nothing is left on the way of a call but reading one message, dup3 and execve.
#include "slot.h"
#include <linux/mman.h>
#include <linux/prctl.h>
#include <linux/filter.h>
#include <linux/sched.h>
#include <linux/seccomp.h>

enum { RLIMIT_NPROC_ = 6, PRIO_PROCESS_ = 0, TIOCSCTTY_ = 0x540E, TIOCSPTLCK_ = 0x40045431, TIOCGPTPEER_ = 0x5441 };

static void report_fd(uint32_t kind, uint32_t step, long err, uint32_t op, int fd) {
    struct plan_event event = {kind, step, (int)-err, op, sys_monotonic_ns()};
    send_fds(FD_CONTROL, &event, sizeof event, &fd, fd >= 0);
}

static void report(uint32_t kind, uint32_t step, long err, uint32_t op) { report_fd(kind, step, err, op, -1); }

__attribute__((noreturn)) static void fail(uint32_t step, long err, uint32_t op) {
    report(KIND_FAILED, step, err, op);
    sys_exit(127);
}

// A hard limit below ours cannot be raised without CAP_SYS_RESOURCE, and is the stricter one anyway.
static long set_rlimit(uint32_t resource, uint64_t soft, uint64_t hard) {
    uint64_t limit[2] = {soft, hard}, old[2];
    long err = SYS4(__NR_prlimit64, 0, resource, NULL, old);
    if (err < 0) return err;
    if (limit[1] > old[1]) limit[1] = old[1];
    if (limit[0] > limit[1]) limit[0] = limit[1];
    return SYS4(__NR_prlimit64, 0, resource, limit, NULL);
}

static uint64_t limit_value(uint32_t number, uint32_t unit) {
    return number == UINT32_MAX ? UINT64_MAX : (uint64_t)number * (unit ? unit : 1);
}

// With op->b, refused calls go to a listener, whose descriptor this returns; else 0.
static long load_filter(const struct plan_op *op) {
    struct sock_fprog program = {(unsigned short)op->a, (struct sock_filter *)(uintptr_t)op_text(op)};
    if (!op->b) return SYS3(__NR_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program);
    // Linux 5.19: a held call waits through signals; before, it is interrupted, made again and counted twice.
    long err = SYS3(__NR_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER | 1u << 5 /* WAIT_KILLABLE_RECV */, &program);
    return err == -EINVAL ? SYS3(__NR_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &program) : err;
}

// Everything between clone and READY, in the one order that works: limits and ids while there are capabilities,
// then none, then no_new_privs, then the filter. Returns the filter's listener, or -1.
static int enter(const struct shape *shape) {
    const struct plan_op *op = shape->first;
    uint32_t filter = 0;
    long err = SYS2(__NR_setns, FD_INIT, shape->namespaces & ~(uint32_t)CLONE_NEWPID);
    if (err < 0) fail(STEP_ENTER, err, 0);
    if ((err = SYS1(__NR_setsid, 0)) < 0) fail(STEP_ENTER, err, 0);
    SYS3(__NR_setpriority, PRIO_PROCESS_, 0, 0);  // the daemon's and the zygote's better nice level is not the tool's
    if ((err = bounding_drop_all()) < 0 || (err = securebits_lock()) < 0) fail(STEP_CAPABILITIES, err, 0);
    const struct plan_op *filter_op = NULL;
    for (uint32_t i = 0; i < shape->nops; i++, op = op_next(op)) {
        if (op->type == OP_RLIMIT && (err = set_rlimit(op->a, limit_value(op->b, op->d), limit_value(op->c, op->d))) < 0) fail(STEP_RLIMITS, err, i);
        if (op->type == OP_IDS && (err = ids_become(op)) < 0) fail(STEP_IDENTITY, err, i);
        if ((op->type == OP_LANDLOCK || op->type == OP_WRITABLE) && (err = landlock_prepare(op)) < 0) fail(STEP_LANDLOCK, err, i);
        if (op->type == OP_FILTER) filter_op = op, filter = i;
    }
    if ((err = capabilities_set(0)) < 0) fail(STEP_CAPABILITIES, err, 0);
    if ((err = sys_prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) < 0) fail(STEP_CAPABILITIES, err, 0);
    if (filter_op && (err = load_filter(filter_op)) < 0) fail(STEP_FILTER, err, filter);
    return filter_op && filter_op->b ? (int)err : -1;
}

// ---------------------------------------------------------------- RUN

struct run {
    struct plan_run head;
    char *cwd, *attach, **argv, **envp;
    int fds[MAX_FDS];
    unsigned nfds;
};

static void *pages(size_t len) {
    long p = sys6(__NR_mmap, 0, (long)len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p < 0 && p > -4096) fail(STEP_MESSAGE, p, 0);
    return (void *)p;
}

// Split `count` NUL-terminated strings at `p` into `list`; returns what follows them, or fails at `end`.
static char *split(char *p, const char *end, char **list, uint32_t count) {
    for (uint32_t i = 0; i < count; i++) {
        list[i] = p;
        while (p < end && *p) p++;
        if (p++ >= end) fail(STEP_MESSAGE, -EINVAL, 0);
    }
    return p;
}

static void receive(struct run *run) {
    struct plan_header head;
    long n = recv_fds(FD_CONTROL, &head, sizeof head, run->fds, &run->nfds);
    if (n == 0) sys_exit(0);  // never used: the daemon let go of this slot
    if (n != sizeof head || head.magic != PLAN_MAGIC || head.version != PLAN_VERSION || head.kind != KIND_RUN ||
        head.nfds != run->nfds || head.length < sizeof head + sizeof run->head || head.length > PLAN_MAX_RUN + sizeof head)
        fail(STEP_MESSAGE, n < 0 ? n : -EPROTO, 0);
    size_t len = head.length - sizeof head;
    char *body = pages(len), *p = body + sizeof run->head, *end = body + len;
    for (size_t got = 0; got < len; got += (size_t)n) {
        n = sys_read(FD_CONTROL, body + got, len - got);
        if (n <= 0) fail(STEP_MESSAGE, n ? n : -EPROTO, 0);
    }
    run->head = *(const struct plan_run *)body;
    if (run->head.flags & ~(uint32_t)(RUN_TERMINAL | RUN_ATTACH) || run->head.argc == 0 || run->head.argc > len || run->head.envc > len) fail(STEP_MESSAGE, -EINVAL, 0);
    run->argv = pages((run->head.argc + run->head.envc + 2ul) * sizeof(char *));
    run->envp = run->argv + run->head.argc + 1;
    p = split(p, end, &run->cwd, 1);
    p = split(p, end, &run->attach, 1);
    p = split(p, end, run->argv, run->head.argc);
    p = split(p, end, run->envp, run->head.envc);
    unsigned want = (run->head.flags & RUN_TERMINAL ? 1 : 3) + (run->head.flags & RUN_ATTACH ? 1 : 0);
    if (p != end || run->nfds != want) fail(STEP_MESSAGE, -EINVAL, 0);
}

static void attach(struct run *run) {
    struct { struct plan_attach head; char path[4096]; } request = {{0, 0}, {0}};
    struct plan_event answer = {0};
    size_t n = str_len(run->attach);
    if (n >= sizeof request.path) fail(STEP_WORKSPACE, -ENAMETOOLONG, 0);
    memcpy(request.path, run->attach, n + 1);
    long err = send_fds(FD_PAIR, &request, sizeof request.head + n + 1, &run->fds[run->nfds - 1], 1);
    if (err >= 0 && (err = sys_read(FD_PAIR, &answer, sizeof answer)) != sizeof answer && err >= 0) err = -EPROTO;
    if (err < 0 || answer.kind != KIND_READY) fail(STEP_WORKSPACE, err < 0 ? err : -answer.error, 0);
}

// A new terminal of the sandbox's own devpts as 0, 1, 2 and controlling terminal; its master goes to the client.
static void terminal(int console) {
    int unlock = 0;
    char byte = 0;
    long master = sys_openat(AT_FDCWD, "/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC, 0), slave, err;
    if (master < 0) fail(STEP_TERMINAL, master, 0);
    if ((err = sys_ioctl((int)master, TIOCSPTLCK_, &unlock)) < 0) fail(STEP_TERMINAL, err, 0);
    slave = sys_ioctl((int)master, TIOCGPTPEER_, (void *)(long)(O_RDWR | O_NOCTTY));
    if (slave < 0) fail(STEP_TERMINAL, slave, 0);
    if ((err = sys_ioctl((int)slave, TIOCSCTTY_, NULL)) < 0) fail(STEP_TERMINAL, err, 0);
    int fd = (int)master;
    if ((err = send_fds(console, &byte, 1, &fd, 1)) < 0) fail(STEP_TERMINAL, err, 0);
    for (int i = 0; i < 3; i++)
        if ((err = sys_dup3((int)slave, i, 0)) < 0) fail(STEP_TERMINAL, err, 0);
    sys_close((int)slave);
}

void runner_main(const struct shape *shape, int pair, int control, int init_pidfd) {
    struct plan_event made = {0};
    struct run run = {0};
    long err;
    // The three may sit on each other's target numbers: move them out of the way first.
    pair = (int)SYS3(__NR_fcntl, pair, F_DUPFD_CLOEXEC, 64);
    control = (int)SYS3(__NR_fcntl, control, F_DUPFD_CLOEXEC, 64);
    init_pidfd = (int)SYS3(__NR_fcntl, init_pidfd, F_DUPFD_CLOEXEC, 64);
    sys_dup3(pair, FD_PAIR, O_CLOEXEC);
    sys_dup3(control, FD_CONTROL, O_CLOEXEC);
    sys_dup3(init_pidfd, FD_INIT, O_CLOEXEC);
    sys_close(FD_LIFE);
    sys_close_range(FD_FREE, ~0u);
    if (sys_read(FD_PAIR, &made, sizeof made) != sizeof made) fail(STEP_MOUNTS, -EPIPE, 0);
    if (made.kind != KIND_READY) fail(made.step, -made.error, made.op);
    int listener = enter(shape);
    sys_close(FD_INIT);
    report_fd(KIND_READY, STEP_NONE, 0, 0, listener);
    if (listener >= 0) sys_close(listener);  // the daemon's alone: whoever holds it answers for the tool

    receive(&run);
    if (run.head.flags & RUN_ATTACH) attach(&run);
    if ((err = landlock_enter(run.attach)) < 0) fail(STEP_LANDLOCK, err, 0);
    if ((err = SYS1(__NR_chdir, run.cwd)) < 0) fail(STEP_WORKING_DIRECTORY, err, 0);
    SYS1(__NR_umask, run.head.umask);
    if (run.head.nproc && (err = set_rlimit(RLIMIT_NPROC_, run.head.nproc, run.head.nproc)) < 0) fail(STEP_RLIMITS, err, 0);
    if (run.head.flags & RUN_TERMINAL) terminal(run.fds[0]);
    else
        for (int i = 0; i < 3; i++)
            if ((err = sys_dup3(run.fds[i], i, 0)) < 0) fail(STEP_STDIO, err, 0);
    sys_close_range(FD_RULES, ~0u);
    report(KIND_STARTED, STEP_NONE, 0, 0);
    fail(STEP_EXEC, exec_path(run.argv, run.envp), 0);
}
