// SPDX-License-Identifier: Apache-2.0
// What a slot and an OCI container do in the same way: be born in a leaf, become a user, become a program.
#include "slot.h"
#include <linux/sched.h>

enum { SIGKILL_ = 9, AF_INET_ = 2, SOCK_DGRAM_ = 2, SIOCSIFFLAGS_ = 0x8914, IFF_UP_ = 1, IFF_RUNNING_ = 64 };

// fork with flags, into a leaf, as a child of the daemon. Where clone3 is refused (a container's seccomp profile
// answers ENOSYS), plain clone and a write to cgroup.procs: slower, and the child waits for its go, so it is never
// unaccounted while it runs. Returns its pid, 0 in the child, or -errno; a child that could not be put into the leaf is
// killed, and *err says why. Without a child *pidfd is -1, whatever the kernel had stored there before it failed.
long spawn(uint64_t flags, int leaf, uint32_t *how, int *pidfd, long *err) {
    struct clone_args args = {.flags = flags | CLONE_PARENT | CLONE_PIDFD, .pidfd = (uintptr_t)pidfd};
    if (leaf >= 0) args.flags |= CLONE_INTO_CGROUP, args.cgroup = (uint64_t)leaf;
    if (!(*how & SLOT_NO_CLONE3)) {
        long pid = SYS2(__NR_clone3, &args, sizeof args);
        if (pid < 0) *pidfd = -1;
        if (pid != -ENOSYS) return *err = pid;
        *how |= SLOT_NO_CLONE3;
    }
    long pid = *err = SYS5(__NR_clone, flags | CLONE_PARENT | CLONE_PIDFD, 0, pidfd, NULL, 0);
    if (pid < 0) *pidfd = -1;
    if (pid <= 0 || leaf < 0) return pid;
    char text[24];
    char *end = str_add_u64(text, text + sizeof text, (uint64_t)pid);
    long fd = sys_openat(leaf, "cgroup.procs", O_WRONLY | O_CLOEXEC, 0);
    *err = fd < 0 ? fd : sys_write((int)fd, text, (size_t)(end - text));
    if (fd >= 0) sys_close((int)fd);
    if (*err < 0) SYS4(__NR_pidfd_send_signal, *pidfd, SIGKILL_, NULL, 0);
    return pid;
}

long loopback_up(void) {
    struct { char name[16]; short flags; char pad[22]; } request = {"lo", IFF_UP_ | IFF_RUNNING_, {0}};
    long sock = SYS3(__NR_socket, AF_INET_, SOCK_DGRAM_ | SOCK_CLOEXEC_, 0);
    if (sock < 0) return sock;
    long err = sys_ioctl((int)sock, SIOCSIFFLAGS_, &request);
    sys_close((int)sock);
    return err;
}

long ids_become(const struct plan_op *op) {
    uint32_t uid = op->a, gid = op->b;
    long err;
    if ((err = SYS2(__NR_setgroups, op->c, op_text(op))) < 0) return err;
    if ((err = SYS3(__NR_setresgid, gid, gid, gid)) < 0) return err;
    return SYS3(__NR_setresuid, uid, uid, uid);
}

const char *env_get(char *const *envp, const char *name) {
    size_t n = str_len(name);
    for (; *envp; envp++)
        if (memcmp(*envp, name, n) == 0 && (*envp)[n] == '=') return *envp + n + 1;
    return NULL;
}

// execvpe(3) without the shell fallback: a name without a slash is looked up on the tool's own PATH, EACCES is
// remembered, and what could not be executed is reported with the errno that matters.
long exec_path(char *const *argv, char *const *envp) {
    const char *name = argv[0], *path = env_get(envp, "PATH");
    long err = -ENOENT, seen = -ENOENT;
    if (!*name) return -ENOENT;
    if (str_chr(name, '/')) return sys_execve(name, argv, envp);
    for (const char *p = path ? path : "/usr/bin:/bin"; ; p++) {
        char full[4096], *q = full;
        const char *end = full + sizeof full;
        for (; *p && *p != ':'; p++)
            if (q < end - 1) *q++ = *p;
        q = str_add(str_add(q, end, q == full ? "./" : "/"), end, name);
        err = q < end - 1 ? sys_execve(full, argv, envp) : -ENOENT;  // longer than any path can be
        if (err == -EACCES) seen = err;
        else if (err != -ENOENT && err != -ENOTDIR) return err;
        if (!*p) return seen;
    }
}
