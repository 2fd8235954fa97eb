// SPDX-License-Identifier: Apache-2.0
// What the container's process does to become its program: terminal, hooks, limits, rights, filter, execve.
#include "oci.h"
#include <linux/bpf.h>
#include <linux/capability.h>
#include <linux/filter.h>
#include <linux/poll.h>
#include <linux/prctl.h>
#include <linux/sched.h>
#include <linux/seccomp.h>
#include <linux/stat.h>

enum { TIOCSCTTY_ = 0x540E, TIOCSPTLCK_ = 0x40045431, TIOCGPTPEER_ = 0x5441, TIOCGPTN_ = 0x80045430, TIOCSWINSZ_ = 0x5414 };
enum { SIGKILL_ = 9, SIGPIPE_ = 13, SIGCHLD_ = 17, HOOK_STATUS = 0x10000, CLOEXEC_RANGE = 4 };

long unix_connect(const char *path) {
    struct { uint16_t family; char path[108]; } address = {AF_UNIX_, {0}};
    size_t n = str_len(path);
    if (n >= sizeof address.path) {  // by way of its directory
        char up[PATH_ROOM], *p = address.path, *end = address.path + sizeof address.path;
        if (n >= sizeof up) return -ENAMETOOLONG;
        size_t cut = n;
        while (cut && path[cut - 1] != '/') cut--;
        memcpy(up, path, cut);
        up[cut] = 0;
        long dir = sys_openat(AT_FDCWD, up, O_PATH | O_DIRECTORY | O_CLOEXEC, 0);
        if (dir < 0) return dir;
        p = str_add(str_add_u64(str_add(p, end, "/proc/self/fd/"), end, (uint64_t)dir), end, "/");
        str_add(p, end, path + cut);
    } else memcpy(address.path, path, n);
    long fd = SYS3(__NR_socket, AF_UNIX_, SOCK_STREAM_ | SOCK_CLOEXEC_, 0);
    if (fd < 0) return fd;
    long err = SYS3(__NR_connect, fd, &address, sizeof address);
    if (err < 0) sys_close((int)fd);
    return err < 0 ? err : fd;
}

// ---------------------------------------------------------------- terminal

// The container's own pty, from its own devpts; the master goes to whoever listens at the console socket, by name.
long terminal_make(struct container *c) {
    const struct plan_op *op = c->op;
    int unlock = 0, number = 0;
    long err;
    if (c->root < 0) {
        if ((err = sys_openat(AT_FDCWD, "/", O_PATH | O_DIRECTORY | O_CLOEXEC, 0)) < 0) return err;
        c->root = (int)err;
    }
    long master = root_open(c, "/dev/pts/ptmx", O_RDWR | O_NOCTTY);
    if (master < 0) master = root_open(c, "/dev/ptmx", O_RDWR | O_NOCTTY);
    if (master < 0) return master;
    if ((err = sys_ioctl((int)master, TIOCSPTLCK_, &unlock)) < 0) return err;
    if ((err = sys_ioctl((int)master, TIOCGPTN_, &number)) < 0) return err;
    long slave = sys_ioctl((int)master, TIOCGPTPEER_, (void *)(long)(O_RDWR | O_NOCTTY));
    if (slave < 0) return slave;
    struct { uint16_t rows, columns, x, y; } size = {(uint16_t)op->b, (uint16_t)op->c, 0, 0};
    if (op->b && (err = sys_ioctl((int)slave, TIOCSWINSZ_, &size)) < 0) return err;
    if ((err = SYS3(__NR_fchown, slave, op->a, -1)) < 0 && err != -EPERM && err != -EINVAL) return err;
    char name[32] = "/dev/pts/";
    str_add_u64(name + 9, name + sizeof name, (uint64_t)number);
    if (op->d) {
        long console = root_open(c, "/dev/console", O_PATH), tree;
        if (console == -ENOENT) {
            long dev = root_open(c, "/dev", O_RDONLY | O_DIRECTORY);
            long fd = dev < 0 ? dev : sys_openat((int)dev, "console", O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0600);
            if (dev >= 0) sys_close((int)dev);
            if (fd < 0) return fd;
            sys_close((int)fd);
            console = root_open(c, "/dev/console", O_PATH);
        }
        if (console < 0) return console;
        long node = root_open(c, name, O_PATH);
        if (node < 0) return node;
        tree = SYS3(__NR_open_tree, node, "", 1 /* OPEN_TREE_CLONE */ | O_CLOEXEC | AT_EMPTY_PATH_);
        if (tree < 0) return tree;
        err = SYS5(__NR_move_mount, tree, "", console, "", 0x4 | 0x40 /* both empty paths */);
        if (err < 0) return err;
        sys_close((int)console), sys_close((int)node), sys_close((int)tree);
    }
    if ((err = sys_ioctl((int)slave, TIOCSCTTY_, NULL)) < 0) return err;
    int fd = (int)master;
    if ((err = send_fds(c->console, name, str_len(name), &fd, 1)) < 0) return err;
    for (int i = 0; i < 3; i++)
        if ((err = sys_dup3((int)slave, i, 0)) < 0) return err;
    sys_close((int)slave), sys_close((int)master), sys_close(c->console);
    return 0;
}

// ---------------------------------------------------------------- lists of strings in the plan

static char **split(const char *p, uint32_t count) {
    long room = sys6(__NR_mmap, 0, (long)((count + 1ul) * sizeof(char *)), 3, 0x22 /* private, anonymous */, -1, 0);
    if (room < 0 && room > -4096) return NULL;
    char **list = (char **)room;
    for (uint32_t i = 0; i < count; i++, p = text_next(p)) list[i] = (char *)(uintptr_t)p;
    return list;
}

static const char *skip(const char *p, uint32_t count) {
    for (; count; count--) p = text_next(p);
    return p;
}

// ---------------------------------------------------------------- hooks

static void signal_set(int signal, void *handler) {
    struct { void *handler; unsigned long flags; void *restorer; uint64_t mask; } action = {handler, 0, 0, 0};
    SYS4(__NR_rt_sigaction, signal, &action, NULL, 8);
}

static long write_all(int fd, const char *text, size_t len) {
    while (len) {
        long n = sys_write(fd, text, len);
        if (n == -EINTR) continue;
        if (n < 0) return n;
        text += n, len -= (size_t)n;
    }
    return 0;
}

// A program of the configuration with the container's state on its stdin. What it does with that is its business; that it
// ends in time, and with 0, is ours. A status other than 0 is reported as HOOK_STATUS and the wait status.
long hook_run(const struct container *c, const char *path) {
    const struct plan_op *op = c->op;
    const char *list = op_blob(op, text_next(path));
    int ends[2], pidfd = -1, status = 0;
    long err = SYS2(__NR_pipe2, ends, O_CLOEXEC);
    if (err < 0) return err;
    char **argv = split(list, op->a), **envp = split(skip(list, op->a), op->b);
    if (!argv || !envp) return -ENOMEM;
    long pid = SYS5(__NR_clone, CLONE_PIDFD | SIGCHLD_, 0, &pidfd, NULL, 0);
    if (pid == 0) {
        signals_default();
        sys_dup3(ends[0], 0, 0);
        SYS3(__NR_close_range, 3, ~0u, CLOEXEC_RANGE);
        sys_exit(sys_execve(path, argv, envp) == -ENOENT ? 127 : 126);
    }
    sys_close(ends[0]);
    if (pid < 0) return sys_close(ends[1]), pid;
    signal_set(SIGPIPE_, (void *)1);
    write_all(ends[1], c->state, c->state_len);  // one that does not read it may not care
    signal_set(SIGPIPE_, NULL);
    sys_close(ends[1]);
    struct pollfd poll = {pidfd, POLLIN, 0};
    uint64_t limit = op->c ? sys_monotonic_ns() + op->c * 1000000000ull : 0;
    for (;;) {
        uint64_t now = sys_monotonic_ns();
        long left = !limit ? -1 : now >= limit ? 0 : (long)((limit - now) / 1000000 + 1);
        err = SYS3(__NR_poll, &poll, 1, left);
        if (err != -EINTR) break;
    }
    if (err == 0) SYS4(__NR_pidfd_send_signal, pidfd, SIGKILL_, NULL, 0);
    long got;
    do got = SYS4(__NR_wait4, pid, &status, 0, NULL);
    while (got == -EINTR);
    sys_close(pidfd);
    if (err == 0) return -ETIMEDOUT;
    return status ? -(HOOK_STATUS | (status & 0xffff)) : 0;
}

// ---------------------------------------------------------------- limits and rights

// The home of a user by the container's own /etc/passwd, looked up while no filter can be in the way; / if it is not there.
static void home_find(struct container *c, uint32_t uid) {
    static char text[1 << 16];
    char *end = c->home + sizeof c->home;
    str_add(c->home, end, "HOME=/");
    long fd = sys_openat(AT_FDCWD, "/etc/passwd", O_RDONLY | O_CLOEXEC | O_NOCTTY | O_NONBLOCK, 0), n = 0, got = 0;
    if (fd < 0) return;
    while (got < (long)sizeof text - 1 && (n = sys_read((int)fd, text + got, sizeof text - 1 - (size_t)got)) > 0) got += n;
    sys_close((int)fd);
    text[got] = 0;
    for (char *line = text; *line;) {
        char *fields[7] = {line}, *p = line;
        int count = 1;
        for (; *p && *p != '\n'; p++)
            if (*p == ':' && count < 7) *p = 0, fields[count++] = p + 1;
        if (*p) *p++ = 0;
        uint64_t id = 0;
        const char *digit = count == 7 ? fields[2] : "x";
        for (; *digit >= '0' && *digit <= '9' && id < 1ull << 40; digit++) id = id * 10 + (uint64_t)(*digit - '0');
        if (!*digit && id == uid && *fields[5] == '/') {
            str_add(str_add(c->home, end, "HOME="), end, fields[5]);
            return;
        }
        line = p;
    }
}

// A directory may be "executed" as well, but is no program: execve(2) says EACCES.
static long executable(const char *path) {
    struct statx st;
    long err = SYS4(__NR_faccessat2, AT_FDCWD, path, 1 /* X_OK */, 0x200 /* AT_EACCESS */);
    if (err == 0 && SYS5(__NR_statx, AT_FDCWD, path, 0, STATX_TYPE, &st) == 0 && (st.stx_mode & 0170000) == 0040000) return -EACCES;
    return err;
}

// Whether there is a program of that name, before `create` says that all is well; `start` may still find it gone.
long program_find(struct container *c, const char *name) {
    const char *path = text_next(name);
    long seen = -ENOENT;
    if (c->op->b) home_find(c, c->op->a);
    if (!*name) return -ENOENT;
    if (str_chr(name, '/')) return executable(name);
    for (const char *p = path;;) {
        char full[PATH_ROOM], *q = full;
        const char *end = full + sizeof full;
        for (; *p && *p != ':'; p++)
            if (q < end - 1) *q++ = *p;
        q = str_add(str_add(q, end, q == full ? "./" : "/"), end, name);
        long err = executable(full);
        if (err == 0) return 0;
        if (err == -EACCES) seen = err;
        if (!*p++) return seen;
    }
}

// A user who may not change groups (user_namespaces(7), setgroups "deny") keeps those there are, if none were asked for.
long ids_set(const struct plan_op *op) {
    long err = ids_become(op);
    if (err != -EPERM || op->c) return err;
    if ((err = SYS3(__NR_setresgid, op->b, op->b, op->b)) < 0) return err;
    return SYS3(__NR_setresuid, op->a, op->a, op->a);
}

long limit_set(const struct plan_op *op) {
    return SYS4(__NR_prlimit64, 0, op->a, op_text(op), NULL);
}

long bounding_set(uint64_t keep) {
    for (unsigned cap = 0; cap < 64; cap++) {
        if (keep >> cap & 1) continue;
        long has = sys_prctl(PR_CAPBSET_READ, cap, 0, 0, 0);
        if (has == -EINVAL) break;  // the kernel's last one
        long err = has > 0 ? sys_prctl(PR_CAPBSET_DROP, cap, 0, 0, 0) : 0;
        if (err < 0) return err;
    }
    return 0;
}

static long caps_get(struct __user_cap_data_struct *data) {
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    return SYS2(__NR_capget, &header, data);
}

static long caps_put(struct __user_cap_data_struct *data) {
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    return SYS2(__NR_capset, &header, data);
}

long capabilities_raise(void) {
    struct __user_cap_data_struct data[2];
    long err = caps_get(data);
    for (int i = 0; i < 2; i++) data[i].effective = data[i].permitted;
    return err < 0 ? err : caps_put(data);
}

// effective, permitted, inheritable, ambient. What we do not have ourselves (rootless) cannot be given: it is left out.
long capabilities_become(const uint64_t *sets) {
    struct __user_cap_data_struct own[2], data[2];
    long err = caps_get(own);
    if (err < 0) return err;
    for (int i = 0; i < 2; i++) {
        data[i].permitted = (uint32_t)(sets[1] >> (32 * i)) & own[i].permitted;
        data[i].effective = (uint32_t)(sets[0] >> (32 * i)) & data[i].permitted;
        data[i].inheritable = (uint32_t)(sets[2] >> (32 * i)) & (own[i].permitted | own[i].inheritable);
    }
    if ((err = caps_put(data)) < 0) return err;
    sys_prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
    for (unsigned cap = 0; cap < 64; cap++)
        if (sets[3] >> cap & 1 && (data[cap / 32].permitted & data[cap / 32].inheritable) >> (cap % 32) & 1)
            if ((err = sys_prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, cap, 0, 0)) < 0) return err;
    return 0;
}

// With op->c the filter has a listener, which is the agent's; it is sent with the state, before anything can be refused.
long seccomp_load(const struct container *c) {
    const struct plan_op *op = c->op;
    struct sock_fprog program = {(unsigned short)op->a, (struct sock_filter *)(uintptr_t)op_text(op)};
    long fd = SYS3(__NR_seccomp, SECCOMP_SET_MODE_FILTER, op->b, &program);
    if (fd < 0 || !op->c) return fd;
    int listener = (int)fd;
    long err = send_fds(c->agent, c->state, c->state_len, &listener, 1);
    sys_close(listener);
    sys_close(c->agent);
    return err;
}

// The devices of a cgroup (cgroup v2 has no files for them): BPF_PROG_TYPE_CGROUP_DEVICE.
long device_program(const struct container *c, const char *cgroup) {
    const struct plan_op *op = c->op;
    union bpf_attr load = {0}, attach = {0};
    load.prog_type = BPF_PROG_TYPE_CGROUP_DEVICE;
    load.insn_cnt = op->a;
    load.insns = (uint64_t)(uintptr_t)op_blob(op, text_next(cgroup));
    load.license = (uint64_t)(uintptr_t) "Apache-2.0";
    memcpy(load.prog_name, "agentrun_dev", sizeof "agentrun_dev");  // by which `update` finds it
    long dir = sys_openat(AT_FDCWD, cgroup, O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
    if (dir < 0) return dir;
    long prog = SYS3(__NR_bpf, BPF_PROG_LOAD, &load, sizeof load), err = prog;
    if (prog >= 0) {
        attach.target_fd = (uint32_t)dir, attach.attach_bpf_fd = (uint32_t)prog;
        attach.attach_type = BPF_CGROUP_DEVICE, attach.attach_flags = BPF_F_ALLOW_MULTI;
        err = SYS3(__NR_bpf, BPF_PROG_ATTACH, &attach, sizeof attach);
        sys_close((int)prog);
    }
    sys_close((int)dir);
    return err;
}

// ---------------------------------------------------------------- the end

void program_exec(struct container *c) {
    const struct plan_op *op = c->op;
    char **argv = split(op_text(op), op->a), **envp = split(skip(op_text(op), op->a), op->b);
    long err = -ENOMEM;
    if (argv && envp) {
        if (op->c) envp[op->b - 1] = c->home;
        signals_default();
        SYS3(__NR_close_range, 3 + c->keep, ~0u, CLOEXEC_RANGE);
        event_send(c, KIND_STARTED, 0, 0, c->at);
        err = exec_path(argv, envp);
    }
    event_send(c, KIND_FAILED, STEP_EXEC, err, c->at);
    sys_exit(err == -ENOENT ? 127 : 126);
}
