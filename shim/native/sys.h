// SPDX-License-Identifier: Apache-2.0
// The kernel, directly: raw x86-64 system calls and the few helpers a program without a C library needs.
//
// Freestanding on purpose. A static program of this size execs in 140 us on the machine the design was measured on,
// a static glibc one in 480 us, and every idle sandbox keeps only what its two processes touch: about 4 kB.
// A wrapper returns what the kernel returns: a value >= 0, or -errno. Nothing here has state, so nothing has errno.
#pragma once

#if !defined(__x86_64__) || !defined(__linux__)
#error "agentrun's native slot is written for x86-64 Linux"
#endif

#include <asm/unistd.h>
#include <linux/errno.h>
#include <linux/fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

static inline long sys6(long nr, long a, long b, long c, long d, long e, long f) {
    long ret;
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    __asm__ volatile("syscall"
                     : "=a"(ret)
                     : "a"(nr), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return ret;
}

#define SYS1(nr, a) sys6(nr, (long)(a), 0, 0, 0, 0, 0)
#define SYS2(nr, a, b) sys6(nr, (long)(a), (long)(b), 0, 0, 0, 0)
#define SYS3(nr, a, b, c) sys6(nr, (long)(a), (long)(b), (long)(c), 0, 0, 0)
#define SYS4(nr, a, b, c, d) sys6(nr, (long)(a), (long)(b), (long)(c), (long)(d), 0, 0)
#define SYS5(nr, a, b, c, d, e) sys6(nr, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), 0)

// ---------------------------------------------------------------- memory and strings
// The compiler may emit calls to these for struct copies, so they exist under their standard names.

void *memset(void *dst, int byte, size_t n);
void *memcpy(void *dst, const void *src, size_t n);
int memcmp(const void *a, const void *b, size_t n);

static inline size_t str_len(const char *s) {
    size_t n = 0;
    while (s[n]) n++;
    return n;
}

static inline bool str_eq(const char *a, const char *b) {
    while (*a && *a == *b) a++, b++;
    return *a == *b;
}

static inline const char *str_chr(const char *s, char c) {
    for (; *s; s++)
        if (*s == c) return s;
    return NULL;
}

// Append `s` at `p`, stay below `end`, keep the result terminated; returns the new end of the text.
static inline char *str_add(char *p, const char *end, const char *s) {
    while (*s && p < end - 1) *p++ = *s++;
    *p = 0;
    return p;
}

static inline char *str_add_u64(char *p, const char *end, uint64_t value) {
    char digits[24];
    int n = 0;
    do digits[n++] = (char)('0' + value % 10);
    while (value /= 10);
    while (n && p < end - 1) *p++ = digits[--n];
    *p = 0;
    return p;
}

// ---------------------------------------------------------------- files and processes

static inline long sys_close(int fd) { return SYS1(__NR_close, fd); }
static inline long sys_read(int fd, void *buf, size_t n) { return SYS3(__NR_read, fd, buf, n); }
static inline long sys_write(int fd, const void *buf, size_t n) { return SYS3(__NR_write, fd, buf, n); }
static inline long sys_openat(int dirfd, const char *path, int flags, int mode) {
    return SYS4(__NR_openat, dirfd, path, flags, mode);
}
static inline long sys_close_range(unsigned first, unsigned last) { return SYS3(__NR_close_range, first, last, 0); }
static inline long sys_dup3(int from, int to, int flags) { return SYS3(__NR_dup3, from, to, flags); }
static inline long sys_ioctl(int fd, unsigned long request, void *arg) { return SYS3(__NR_ioctl, fd, request, arg); }
static inline long sys_prctl(int option, unsigned long a, unsigned long b, unsigned long c, unsigned long d) {
    return SYS5(__NR_prctl, option, a, b, c, d);
}
static inline long sys_execve(const char *path, char *const *argv, char *const *envp) {
    return SYS3(__NR_execve, path, argv, envp);
}

__attribute__((noreturn)) static inline void sys_exit(int status) {
    for (;;) SYS1(__NR_exit_group, status);
}

static inline uint64_t sys_monotonic_ns(void) {
    struct { int64_t sec, nsec; } now = {0, 0};
    SYS2(__NR_clock_gettime, 1 /* CLOCK_MONOTONIC */, &now);
    return (uint64_t)now.sec * 1000000000u + (uint64_t)now.nsec;
}

// ---------------------------------------------------------------- sockets with file descriptors (SCM_RIGHTS)

enum { AF_UNIX_ = 1, SOCK_STREAM_ = 1, SOCK_SEQPACKET_ = 5, SOCK_CLOEXEC_ = 02000000 };
enum { MSG_TRUNC_ = 0x20, MSG_CTRUNC_ = 0x8, MSG_NOSIGNAL_ = 0x4000, MSG_CMSG_CLOEXEC_ = 0x40000000 };
enum { SOL_SOCKET_ = 1, SCM_RIGHTS_ = 1, MAX_FDS = 64 };

struct iovec_ { void *base; size_t len; };
struct msghdr_ { void *name; uint32_t namelen; struct iovec_ *iov; size_t iovlen; void *control; size_t controllen; uint32_t flags; };
struct cmsg_fds { size_t len; int level, type; int fds[MAX_FDS]; };

// Send one message with `nfds` descriptors; returns the bytes sent or -errno. Never raises SIGPIPE.
static inline long send_fds(int sock, const void *buf, size_t len, const int *fds, unsigned nfds) {
    struct cmsg_fds control = {.len = 16 + nfds * sizeof(int), .level = SOL_SOCKET_, .type = SCM_RIGHTS_};
    for (unsigned i = 0; i < nfds; i++) control.fds[i] = fds[i];
    struct iovec_ iov = {(void *)(uintptr_t)buf, len};
    struct msghdr_ msg = {.iov = &iov, .iovlen = 1};
    if (nfds) {
        msg.control = &control;
        msg.controllen = (16 + nfds * sizeof(int) + 7) & ~7ul;
    }
    long n;
    do n = SYS3(__NR_sendmsg, sock, &msg, MSG_NOSIGNAL_);
    while (n == -EINTR);
    return n;
}

// Receive one message; the descriptors it carried go to `fds` (room for MAX_FDS, all close-on-exec), their number to
// *nfds. A message or descriptor list that did not fit is -EMSGSIZE, with every descriptor that did arrive closed.
static inline long recv_fds(int sock, void *buf, size_t len, int *fds, unsigned *nfds) {
    struct cmsg_fds control;
    struct iovec_ iov = {buf, len};
    struct msghdr_ msg = {.iov = &iov, .iovlen = 1, .control = &control, .controllen = sizeof control};
    long n;
    do n = SYS3(__NR_recvmsg, sock, &msg, MSG_CMSG_CLOEXEC_);
    while (n == -EINTR);
    *nfds = 0;
    if (n < 0) return n;
    if (msg.controllen >= 16 && control.level == SOL_SOCKET_ && control.type == SCM_RIGHTS_ && control.len >= 16)
        for (size_t i = 0; i < (control.len - 16) / sizeof(int) && i < MAX_FDS; i++) fds[(*nfds)++] = control.fds[i];
    if (msg.flags & (MSG_TRUNC_ | MSG_CTRUNC_)) {
        while (*nfds) sys_close(fds[--*nfds]);
        return -EMSGSIZE;
    }
    return n;
}

// ---------------------------------------------------------------- entry
// Each program defines program(); start.c calls it with the argument vector the kernel put on the stack.

int program(int argc, char **argv, char **envp);
