// SPDX-License-Identifier: Apache-2.0
// Small files and cgroups by path, without Python: kill what is in one, wait until it is empty, remove it.
#include "oci.h"
#include <linux/poll.h>

enum { DEPTH = 32, UNLINK_DIRECTORY = 0x200, SIGKILL_ = 9 };

struct entry { uint64_t ino; int64_t off; uint16_t len; uint8_t type; char name[]; };

void sleep_ms(unsigned ms) {
    struct { int64_t sec, nsec; } time = {ms / 1000, (int64_t)(ms % 1000) * 1000000};
    SYS2(__NR_nanosleep, &time, NULL);
}

long file_read(int dirfd, const char *path, char *buf, size_t room) {
    long fd = sys_openat(dirfd, path, O_RDONLY | O_CLOEXEC, 0), n;
    if (fd < 0) return fd;
    size_t got = 0;
    while (got < room - 1 && ((n = sys_read((int)fd, buf + got, room - 1 - got)) > 0 || n == -EINTR))
        if (n > 0) got += (size_t)n;
    sys_close((int)fd);
    buf[got] = 0;
    return (long)got;
}

long file_write(int dirfd, const char *path, const char *text) {
    long fd = sys_openat(dirfd, path, O_WRONLY | O_CLOEXEC, 0);
    if (fd < 0) return fd;
    long n = sys_write((int)fd, text, str_len(text));
    sys_close((int)fd);
    return n;
}

static long cgroup_open(const char *path) {
    return sys_openat(AT_FDCWD, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
}

// The value of a `key N` line; -1 where there is none.
static int events_value(int cgroup, const char *key) {
    char text[256];
    size_t n = str_len(key);
    if (file_read(cgroup, "cgroup.events", text, sizeof text) < 0) return -1;
    for (const char *p = text; p; p = str_chr(p, '\n'), p = p ? p + 1 : NULL)
        if (memcmp(p, key, n) == 0 && p[n] == ' ') return p[n + 1] - '0';
    return -1;
}

// A signal to every process of a cgroup and of those below it.
long cgroup_signal(int cgroup, int signal) {
    char list[4096] __attribute__((aligned(8))), pids[8192];
    long n = file_read(cgroup, "cgroup.procs", pids, sizeof pids), sent = 0;
    for (const char *p = pids; n > 0 && *p;) {
        long pid = 0;
        for (; *p >= '0' && *p <= '9'; p++) pid = pid * 10 + (*p - '0');
        if (*p) p++;
        if (pid > 0 && SYS2(__NR_kill, pid, signal) >= 0) sent++;
    }
    while ((n = SYS3(__NR_getdents64, cgroup, list, sizeof list)) > 0)
        for (long at = 0; at < n;) {
            const struct entry *e = (const void *)(list + at);
            at += e->len;
            if (e->type != 4 || e->name[0] == '.') continue;
            long below = sys_openat(cgroup, e->name, O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
            if (below >= 0) sent += cgroup_signal((int)below, signal), sys_close((int)below);
        }
    return sent;
}

// Everything in it, at once and for good. A frozen cgroup is thawed by it; before Linux 5.14 there is no cgroup.kill. Nor has
// the root of a hierarchy one, which all processes are in: that has no freezer either, and nothing is done to it.
long cgroup_kill(const char *path) {
    long dir = cgroup_open(path);
    if (dir < 0) return dir;
    long err = file_write((int)dir, "cgroup.kill", "1");
    if (err == -ENOENT && (err = file_write((int)dir, "cgroup.freeze", "0")) >= 0) err = cgroup_signal((int)dir, SIGKILL_);
    sys_close((int)dir);
    return err;
}

static bool wait_empty(int dir, int patience_ms) {
    long events = sys_openat(dir, "cgroup.events", O_RDONLY | O_CLOEXEC, 0);
    if (events < 0) return true;
    uint64_t limit = sys_monotonic_ns() + (uint64_t)patience_ms * 1000000u;
    int populated;
    while ((populated = events_value(dir, "populated")) > 0 && sys_monotonic_ns() < limit) {
        char text[256];
        struct pollfd poll = {(int)events, POLLPRI, 0};
        SYS4(__NR_pread64, events, text, sizeof text, 0);
        if (events_value(dir, "populated") > 0) SYS3(__NR_poll, &poll, 1, 50);
    }
    sys_close((int)events);
    return populated <= 0;
}

static long remove_below(int parent, const char *name, unsigned depth) {
    char list[4096] __attribute__((aligned(8)));
    long dir = sys_openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC, 0), n;
    if (dir < 0) return dir;
    while (depth < DEPTH && (n = SYS3(__NR_getdents64, dir, list, sizeof list)) > 0)
        for (long at = 0; at < n;) {
            const struct entry *e = (const void *)(list + at);
            at += e->len;
            if (e->type == 4 && e->name[0] != '.') remove_below((int)dir, e->name, depth + 1);
        }
    sys_close((int)dir);
    return SYS3(__NR_unlinkat, parent, name, UNLINK_DIRECTORY);
}

// Kill what is left and remove the cgroup with those below. 0, or why it could not be; one that is gone is removed.
long cgroup_remove(const char *path, int patience_ms) {
    uint64_t limit = sys_monotonic_ns() + (uint64_t)patience_ms * 1000000u;
    for (unsigned pause = 1;; pause = pause < 32 ? pause * 2 : 32) {
        long dir = cgroup_open(path);
        if (dir == -ENOENT) return 0;
        if (dir < 0) return dir;
        if (events_value((int)dir, "populated") > 0) {
            cgroup_kill(path);
            wait_empty((int)dir, patience_ms);
        }
        sys_close((int)dir);
        long err = remove_below(AT_FDCWD, path, 0);
        if (err >= 0 || err == -ENOENT) return 0;
        if (err != -EBUSY || sys_monotonic_ns() > limit) return err;
        sleep_ms(pause);
    }
}
