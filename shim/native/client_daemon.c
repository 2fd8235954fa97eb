// SPDX-License-Identifier: Apache-2.0
// The other side of the call: the daemon's socket, a private runtime for one call, or the Python command line.
#include "client.h"
#include <asm/ioctls.h>
#include <linux/un.h>

static int runtime_pid;  // the private runtime, until it is reaped

// The first agentrun-cli that is there and could not be executed, and the kernel's answer. That is ENOENT as well if its
// interpreter is missing, and EACCES if that is in a directory of somebody else's.
static char refused[4096];
static long refusal;

static void try_cli(const char *dir, size_t len, char **argv, char **envp) {
    char path[4096];
    if (len > sizeof path - sizeof "/agentrun-cli") return;
    memcpy(path, dir, len);
    memcpy(path + len, "/agentrun-cli", sizeof "/agentrun-cli");
    long err = sys_execve(path, argv, envp);
    if (refusal || SYS3(__NR_faccessat, AT_FDCWD, path, 0 /* F_OK */) < 0) return;
    refusal = err;
    memcpy(refused, path, sizeof refused);
}

// Become the Python command line. Beside this program first: two installations must not mix.
void exec_cli(int status, char **argv, char **envp) {
    char self[4096] = "agentrun";
    SYS3(__NR_readlink, "/proc/self/exe", self, sizeof self - 1);
    size_t dir = str_len(self);
    while (dir && self[dir] != '/') dir--;

    argv[0] = (char[]){"agentrun"};
    try_cli(self, dir, argv, envp);
    const char *path = env_entry(envp, "PATH");
    for (const char *end = path ? path + 4 : ""; *end;) {
        const char *start = ++end;
        while (*end && *end != ':') end++;
        if (end > start) try_cli(start, (size_t)(end - start), argv, envp);
    }
    if (refusal)
        fail(status, "cannot run ", refused, ": ", error_text(refusal),
             " (the file is there; so must be the interpreter in its first line, for this user)", NULL);
    fail(status, "cannot find agentrun-cli beside ", self, " or on PATH: is the package installed?", NULL);
}

static long connect_unix(const char *path) {
    struct sockaddr_un address = {.sun_family = AF_UNIX_};
    size_t len = str_len(path);
    if (!len) return -ENOENT;
    if (len >= sizeof address.sun_path) return -ENAMETOOLONG;
    memcpy(address.sun_path, path, len);
    long sock = SYS3(__NR_socket, AF_UNIX_, SOCK_STREAM_ | SOCK_CLOEXEC_, 0);
    if (sock < 0) return sock;
    long err = SYS3(__NR_connect, sock, &address, sizeof address);
    if (err < 0) sys_close((int)sock);
    return err < 0 ? err : sock;
}

// Start a runtime that serves this one call on its descriptor 3. In a session of its own: a Ctrl-C reaches it only as
// our `signal` message, so that it lives on to clean up.
static int start_runtime(char **envp) {
    int pair[2], null = (int)sys_openat(AT_FDCWD, "/dev/null", O_RDWR | O_CLOEXEC, 0);
    long err = null < 0 ? null : SYS4(__NR_socketpair, AF_UNIX_, SOCK_STREAM_ | SOCK_CLOEXEC_, 0, pair);
    if (err >= 0) err = SYS1(__NR_fork, 0);
    if (err < 0) fail(125, "cannot start a private runtime: ", error_text(err), NULL);
    if (err > 0) {
        runtime_pid = (int)err;
        sys_close(null);
        sys_close(pair[1]);
        return pair[0];
    }
    SYS1(__NR_setsid, 0);
    sys_dup3(null, 0, 0);
    sys_dup3(null, 1, 0);
    if (pair[1] == 3) SYS3(__NR_fcntl, 3, F_SETFD, 0);
    else sys_dup3(pair[1], 3, 0);
    sys_close_range(4, ~0u);
    exec_cli(127, (char *[]){NULL, (char[]){"serve-one"}, (char[]){"3"}, NULL}, envp);
}

// Hang up and wait until the private runtime has cleaned up. Returns its wait status, 0 if there is none.
int reap_runtime(int sock) {
    int status = 0;
    if (runtime_pid) {
        sys_close(sock);
        while (SYS4(__NR_wait4, runtime_pid, &status, 0, 0) == -EINTR) {}
    }
    runtime_pid = 0;
    return status;
}

// Whether nobody has read what we sent: the socket of a daemon that does not accept, or that stands still. A private runtime is
// still starting then.
bool is_unheard(int sock) {
    int bytes = 0;
    return !runtime_pid && sys_ioctl(sock, TIOCOUTQ, &bytes) == 0 && bytes > 0;  // unix(7): SIOCOUTQ
}

int reach_daemon(const char *path, bool own_runtime, char **envp) {
    if (own_runtime) return start_runtime(envp);
    const char *entry = env_entry(envp, "AGENTRUN_SOCKET");
    if (!path && entry && entry[sizeof "AGENTRUN_SOCKET"]) path = entry + sizeof "AGENTRUN_SOCKET";
    bool chosen = path != NULL;
    if (!chosen) path = "/run/agentrun/agentrun.sock";
    long sock = connect_unix(path);
    if (sock >= 0) return (int)sock;
    // A socket that somebody named is never silently replaced by another runtime with other policies and budgets.
    if (!chosen && (sock == -ENOENT || sock == -ECONNREFUSED)) return start_runtime(envp);
    fail(125, "cannot connect to ", path, ": ", error_text(sock),
         !chosen && sock == -EACCES ? " (it is open to root and to the group the daemon was given)" : "", NULL);
}
