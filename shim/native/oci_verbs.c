// SPDX-License-Identifier: Apache-2.0
// state, start, kill, delete. What is known of a container is in its directory below the root:
//
//   record   lines `key value`, written by `create`, renamed into place: pid, started, cgroup, made, exec, poststart, ...
//   head     the part of the state's JSON that does not change
//   start    the socket at which its process waits for `start`; nobody listens there once it has been told
//
// The kernel is the truth about the rest: a process is the container's if its start time is the recorded one.
#include "oci.h"
#include <linux/poll.h>

enum { SIGKILL_ = 9, LOCK_EX_ = 2, GONE_MS = 10000 };

struct known {
    int dir;                 // the container's directory
    long pid;                // 0: not yet
    uint64_t started;
    char *cgroup, *made, *exec;  // NULL where there is none
    bool poststart, poststop, notify, scope;
    char text[16384];
};

static struct known it;

static uint64_t decimal(const char *p) {
    uint64_t value = 0;
    for (; *p >= '0' && *p <= '9'; p++) value = value * 10 + (uint64_t)(*p - '0');
    return value;
}

// Open the container's directory and read its record. False: there is no such container.
static bool look_up(const struct front *f, struct known *k) {
    char path[PATH_ROOM], *end = path + sizeof path;
    str_add(str_add(str_add(path, end, f->root), end, "/"), end, f->id);
    long dir = sys_openat(AT_FDCWD, path, O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
    if (dir < 0) return false;
    k->dir = (int)dir;
    SYS1(__NR_fchdir, dir);  // the socket's path may be longer than an address: it is used by its name
    if (file_read(k->dir, "record", k->text, sizeof k->text) < 0) return true;  // its maker died at once
    for (char *p = k->text; *p;) {
        char *line = p, *value = line;
        while (*p && *p != '\n') p++;
        if (*p) *p++ = 0;
        while (*value && *value != ' ') value++;
        if (*value) *value++ = 0;
        if (str_eq(line, "pid")) k->pid = (long)decimal(value);
        else if (str_eq(line, "started")) k->started = decimal(value);
        else if (str_eq(line, "cgroup")) k->cgroup = value;
        else if (str_eq(line, "made")) k->made = value;
        else if (str_eq(line, "exec")) k->exec = value;
        else if (str_eq(line, "poststart")) k->poststart = true;
        else if (str_eq(line, "poststop")) k->poststop = true;
        else if (str_eq(line, "notify")) k->notify = true;
        else if (str_eq(line, "scope")) k->scope = true;
    }
    return true;
}

static void must_exist(const struct front *f, struct known *k) {
    if (!look_up(f, k)) die(f, "container ", f->id, " does not exist", NULL);
}

// Whether the container's first process lives: field 3 of proc_pid_stat(5) is the state, field 22 the start time.
static bool alive(const struct known *k) {
    char path[64], text[1024];
    if (!k->pid) return false;
    str_add(str_add_u64(str_add(path, path + sizeof path, "/proc/"), path + sizeof path, (uint64_t)k->pid), path + sizeof path, "/stat");
    if (file_read(AT_FDCWD, path, text, sizeof text) <= 0) return false;
    const char *p = text;
    for (const char *q = text; *q; q++)
        if (*q == ')') p = q;
    p += 2;
    if (*p == 'Z' || *p == 'X') return false;
    for (int field = 3; field < 22 && *p; p++)
        if (*p == ' ') field++;
    return decimal(p) == k->started;
}

static long start_connect(void) {
    struct { uint16_t family; char path[108]; } address = {AF_UNIX_, "start"};
    long fd = SYS3(__NR_socket, AF_UNIX_, SOCK_SEQPACKET_ | SOCK_CLOEXEC_, 0);
    if (fd < 0) return fd;
    long err = SYS3(__NR_connect, fd, &address, sizeof address);
    if (err < 0) sys_close((int)fd);
    return err < 0 ? err : fd;
}

static bool frozen(const struct known *k) {
    char path[PATH_ROOM], text[256];
    if (!k->cgroup) return false;
    str_add(str_add(path, path + sizeof path, k->cgroup), path + sizeof path, "/cgroup.freeze");
    return file_read(AT_FDCWD, path, text, sizeof text) > 0 && text[0] == '1';
}

static const char *status(const struct known *k) {
    if (!k->pid) return "creating";
    if (!alive(k)) return "stopped";
    long waits = start_connect();
    if (waits >= 0) return sys_close((int)waits), "created";
    if (waits == -EAGAIN) return "created";
    return frozen(k) ? "paused" : "running";
}

int verb_state(const struct front *f) {
    static char text[1 << 20];
    must_exist(f, &it);
    const char *now = status(&it);
    long n = file_read(it.dir, "head", text, sizeof text - 128);
    if (n < 0) die(f, "container ", f->id, " does not exist", NULL);  // `create` died before it had written anything
    char *end = text + sizeof text, *p = str_add(text + n, end, ",\"pid\":");
    p = str_add_u64(p, end, str_eq(now, "stopped") ? 0 : (uint64_t)it.pid);
    p = str_add(str_add(str_add(p, end, ",\"status\":\""), end, now), end, "\"}\n");
    return sys_write(1, text, (size_t)(p - text)) < 0;
}

// ---------------------------------------------------------------- start

// What an operation of its plan does, in the words that `create` has left: line by line.
static const char *about_of(const struct known *k, uint32_t op) {
    static char text[65536];
    if (file_read(k->dir, "about", text, sizeof text) < 0) return "?";
    char *line = text;
    for (; op && *line; op--) {
        while (*line && *line != '\n') line++;
        if (*line) line++;
    }
    for (char *p = line; *p; p++)
        if (*p == '\n') *p = 0;
    return line;
}

// An errno, or what became of a hook: its wait status, marked as one.
static const char *failure_text(uint32_t error) {
    static char text[40];
    char *p = text, *end = text + sizeof text;
    if (error <= 0xffff) return error_text(-(long)error);
    bool killed = error & 0x7f;
    str_add_u64(str_add(p, end, killed ? "killed by signal " : "exit status "), end, killed ? error & 0x7f : error >> 8 & 0xff);
    return text;
}

int verb_start(const struct front *f) {
    struct plan_event event = {0};
    must_exist(f, &it);
    if (!it.pid) die(f, "container ", f->id, " is being created", NULL);
    SYS2(__NR_flock, it.dir, LOCK_EX_);
    long conn = start_connect();
    if (conn < 0) {
        const char *now = status(&it);
        die(f, "cannot start container ", f->id, ": it is ", now, str_eq(now, "stopped") ? ": container not running" : "", NULL);
    }
    if (frozen(&it)) die(f, "cannot start container ", f->id, ": it is paused", NULL);
    if (it.notify) python(f, "start");
    bool started = false;
    long n = sys_write((int)conn, "g", 1);
    if (n == 1)
        for (;;) {
            n = sys_read((int)conn, &event, sizeof event);
            if (n == -EINTR) continue;
            if (n != sizeof event) break;  // the end: the program is being executed, or the process is gone
            started = event.kind == KIND_STARTED;
            if (!started) break;
        }
    if (event.kind == KIND_FAILED && event.step == STEP_EXEC) {
        const char *why = event.error == ENOENT && it.exec && !str_chr(it.exec, '/') ? "executable file not found in $PATH" : error_text(-event.error);
        die(f, "exec: \"", it.exec ? it.exec : "?", "\": ", why, NULL);
    }
    if (!started && event.kind == KIND_FAILED) die(f, "start: ", about_of(&it, event.op), ": ", failure_text(event.error), NULL);
    if (!started) die(f, "start: the container's process died", NULL);
    SYS3(__NR_unlinkat, it.dir, "start", 0);
    if (it.poststart) python(f, "poststart");
    return 0;
}

// ---------------------------------------------------------------- kill

static int signal_number(const char *name) {
    static const char names[] =
        "HUP\0INT\0QUIT\0ILL\0TRAP\0ABRT\0BUS\0FPE\0KILL\0USR1\0SEGV\0USR2\0PIPE\0ALRM\0TERM\0STKFLT\0CHLD\0CONT\0STOP\0TSTP\0TTIN\0"
        "TTOU\0URG\0XCPU\0XFSZ\0VTALRM\0PROF\0WINCH\0IO\0PWR\0SYS\0";
    char upper[16];
    if (*name >= '0' && *name <= '9') {
        for (const char *p = name; *p; p++)
            if (*p < '0' || *p > '9') return -1;
        uint64_t value = decimal(name);
        return value <= 64 ? (int)value : -1;
    }
    size_t n = str_len(name);
    if (n >= sizeof upper) return -1;
    for (size_t i = 0; i <= n; i++) upper[i] = (char)(name[i] >= 'a' && name[i] <= 'z' ? name[i] - 32 : name[i]);
    const char *wanted = upper[0] == 'S' && upper[1] == 'I' && upper[2] == 'G' ? upper + 3 : upper;
    int number = 1;
    for (const char *p = names; *p; p = text_next(p), number++)
        if (str_eq(p, wanted)) return number;
    if (memcmp(wanted, "RTMIN", 5) == 0) {
        uint64_t more = wanted[5] == '+' ? decimal(wanted + 6) : 0;
        return wanted[5] && wanted[5] != '+' ? -1 : more <= 30 ? (int)(34 + more) : -1;
    }
    return -1;
}

int verb_kill(const struct front *f, const char *name) {
    int signal = signal_number(name);
    if (signal < 0) die(f, "unknown signal \"", name, "\"", NULL);
    must_exist(f, &it);
    if (f->all && it.cgroup) {
        long dir = sys_openat(AT_FDCWD, it.cgroup, O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
        if (dir >= 0) {
            if (signal == SIGKILL_) cgroup_kill(it.cgroup);
            else cgroup_signal((int)dir, signal);
            return 0;
        }
    }
    long pidfd = it.pid ? SYS2(__NR_pidfd_open, it.pid, 0) : -ESRCH;
    if (pidfd < 0 || !alive(&it)) {  // looked at after the descriptor was had: it is nobody else's
        if (f->all) return 0;
        die(f, "container not running", NULL);
    }
    long err = SYS4(__NR_pidfd_send_signal, pidfd, signal, NULL, 0);
    if (err == -ESRCH) die(f, "container not running", NULL);
    if (err < 0) die(f, "kill ", f->id, ": ", error_text(err), NULL);
    return 0;
}

// ---------------------------------------------------------------- delete

static void kill_first(const struct known *k) {
    long pidfd = k->pid ? SYS2(__NR_pidfd_open, k->pid, 0) : -ESRCH;
    if (pidfd < 0) return;
    if (alive(k)) {
        struct pollfd poll = {(int)pidfd, POLLIN, 0};
        SYS4(__NR_pidfd_send_signal, pidfd, SIGKILL_, NULL, 0);
        SYS3(__NR_poll, &poll, 1, GONE_MS);
    }
    sys_close((int)pidfd);
}

// The directories above the cgroup that `create` made for it, while they are empty: others may have come to use them.
static void remove_parents(const struct known *k) {
    size_t top = k->made ? str_len(k->made) : 0;
    for (size_t n = str_len(k->cgroup); n > top && top;) {
        while (n && k->cgroup[n - 1] != '/') n--;
        if (!n || n - 1 < top) return;
        k->cgroup[--n] = 0;
        if (SYS3(__NR_unlinkat, AT_FDCWD, k->cgroup, 0x200) < 0) return;
    }
}

int verb_delete(const struct front *f) {
    struct known *k = &it;
    struct entry { uint64_t ino; int64_t off; uint16_t len; uint8_t type; char name[]; };
    char list[4096] __attribute__((aligned(8))), path[PATH_ROOM], *end = path + sizeof path;
    if (!look_up(f, k)) {
        if (f->force) return 0;
        die(f, "container ", f->id, " does not exist", NULL);
    }
    if (f->force) {  // whoever makes or starts it may wait for what will never come: not if there is nothing left to wait for
        kill_first(k);
        if (k->cgroup) cgroup_kill(k->cgroup);
    }
    SYS2(__NR_flock, k->dir, LOCK_EX_);  // whoever makes or starts it is done, or dead
    sys_close(k->dir);
    *k = (struct known){0};
    if (!look_up(f, k)) return 0;  // somebody else removed it meanwhile
    SYS2(__NR_flock, k->dir, LOCK_EX_);
    const char *now = status(k);
    if (!f->force && !str_eq(now, "stopped") && !str_eq(now, "creating"))
        die(f, "cannot delete container ", f->id, " that is not stopped: ", now, NULL);
    kill_first(k);
    if (k->cgroup) {
        long err = cgroup_remove(k->cgroup, GONE_MS);
        if (err < 0) die(f, "cannot remove the cgroup ", k->cgroup, ": ", error_text(err), NULL);
        remove_parents(k);
    }
    if (k->poststop || k->scope) python(f, "poststop");
    for (long n; (n = SYS3(__NR_getdents64, k->dir, list, sizeof list)) > 0;)
        for (long at = 0; at < n;) {
            const struct entry *e = (const void *)(list + at);
            at += e->len;
            if (str_eq(e->name, "record") || e->name[0] == '.') continue;
            if (SYS3(__NR_unlinkat, k->dir, e->name, 0) == -EISDIR) python(f, "poststop");
        }
    SYS3(__NR_unlinkat, k->dir, "record", 0);  // last: while it is there, another delete knows what to remove
    str_add(str_add(str_add(path, end, f->root), end, "/"), end, f->id);
    long err = SYS3(__NR_unlinkat, AT_FDCWD, path, 0x200);
    if (err < 0 && err != -ENOENT) python(f, "poststop");
    return 0;
}
