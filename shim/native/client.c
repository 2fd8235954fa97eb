// SPDX-License-Identifier: Apache-2.0
// The `agentrun` command. `agentrun exec` is spoken natively (docs/protocol.md), because starting Python costs more
// than the call; everything else is the Python program agentrun-cli.
#include "client.h"
#include "client_msgpack.h"
#include <linux/signal.h>
#include <linux/signalfd.h>

static struct frame frame;  // the request; once that is sent, the answer
static int daemon_sock = -1;
static int signals;

// ---------------------------------------------------------------- ending and saying why

const char *error_text(long error) {
    static const struct { int error; const char *text; } texts[] = {
        {EPERM, "Operation not permitted"}, {ENOENT, "No such file or directory"}, {EBADF, "Bad file descriptor"},
        {ENOMEM, "Cannot allocate memory"}, {EACCES, "Permission denied"}, {ENOTDIR, "Not a directory"},
        {EISDIR, "Is a directory"}, {EMFILE, "Too many open files"}, {ENOSPC, "No space left on device"},
        {EROFS, "Read-only file system"}, {EPIPE, "Broken pipe"}, {ENAMETOOLONG, "File name too long"},
        {ELOOP, "Too many levels of symbolic links"}, {ECONNREFUSED, "Connection refused"},
    };
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        if (texts[i].error == -error) return texts[i].text;
    static char other[32];
    str_add_u64(str_add(other, other + sizeof other, "error "), other + sizeof other, (uint64_t)-error);
    return other;
}

// The one way out: the terminal is the caller's again, and a private runtime has cleaned up.
void leave(int status) {
    tty_restore();
    reap_runtime(daemon_sock);
    sys_exit(status);
}

long write_all(int fd, const void *data, size_t n) {
    for (const char *p = data; n;) {
        long done = sys_write(fd, p, n);
        if (done == -EAGAIN) {
            struct pollfd room = {fd, POLLOUT, 0};
            SYS3(__NR_poll, &room, 1, -1);
        } else if (done < 0 && done != -EINTR) return done;
        if (done > 0) p += done, n -= (size_t)done;
    }
    return 0;
}

// One line on standard error, made of the parts, and the end. One line whatever the parts contain.
void fail(int status, ...) {
    static char line[8192];
    char *p = str_add(line, line + sizeof line, "agentrun: "), *start = p;
    va_list parts;
    va_start(parts, status);
    for (const char *part; (part = va_arg(parts, const char *));) p = str_add(p, line + sizeof line - 1, part);
    va_end(parts);
    for (; *start; start++)
        if ((unsigned char)*start < ' ' || *start == 0x7f) *start = '?';
    *p++ = '\n';
    tty_restore();
    write_all(2, line, (size_t)(p - line));
    leave(status);
}

// ---------------------------------------------------------------- the request

// Hold the places of closed standard descriptors, so that none of ours lands there; say which were open.
static void hold_stdio(bool open[3]) {
    for (int fd = 0; fd < 3; fd++) {
        open[fd] = SYS2(__NR_fcntl, fd, F_GETFD) != -EBADF;
        long err = open[fd] ? 0 : sys_openat(AT_FDCWD, "/dev/null", O_RDWR, 0);
        if (err < 0) fail(125, "cannot open /dev/null: ", error_text(err), NULL);
    }
}

static int open_workspace(const char *value[OPTIONS]) {
    char *dir = (char *)(uintptr_t)value[WORKSPACE];
    size_t len = str_len(dir);
    bool ro = len > 3 && str_eq(dir + len - 3, ":ro"), cow = len > 4 && str_eq(dir + len - 4, ":cow");
    if (cow) dir[len - 4] = 0;
    else if (ro || (len > 3 && str_eq(dir + len - 3, ":rw"))) dir[len - 3] = 0;
    long fd = sys_openat(AT_FDCWD, dir, O_PATH | O_DIRECTORY | O_CLOEXEC, 0);
    if (fd < 0) fail(2, "workspace ", dir, ": ", error_text(fd), NULL);
    value[WORKSPACE] = cow ? "cow" : ro ? "ro" : "rw";
    return (int)fd;
}

static void put_request(char **argv, char **env, unsigned nenv, const char *value[OPTIONS], const char *const *names,
                        unsigned nfds) {
    unsigned nargs = 0, noptions = 0;
    while (argv[nargs]) nargs++;
    for (unsigned o = 0; o < SENT; o++) noptions += value[o] != NULL;

    frame.len = 4;  // the length goes there
    put(&frame, LITERAL("\x86\xa1v\1\xa2op\xa4""exec\xa4""argv"));
    put_head(&frame, ARRAY32, nargs);
    for (unsigned i = 0; i < nargs; i++) put_text(&frame, BIN32, argv[i]);
    put(&frame, LITERAL("\xa3""env"));
    put_head(&frame, ARRAY32, nenv);
    for (unsigned i = 0; i < nenv; i++) put_text(&frame, BIN32, env[i]);
    put(&frame, LITERAL("\xa7options"));
    put_head(&frame, MAP32, noptions);
    for (unsigned o = 0; o < SENT; o++) {
        if (!value[o]) continue;
        put_text(&frame, STR32, option_names[o]);
        put_text(&frame, STR32, value[o]);
    }
    put(&frame, LITERAL("\xa3""fds"));
    put_head(&frame, ARRAY32, nfds);
    for (unsigned i = 0; i < nfds; i++) put_text(&frame, STR32, names[i]);

    uint32_t len = (uint32_t)(frame.len - 4);
    if (len > FRAME_MAX) {
        char number[24];
        str_add_u64(number, number + sizeof number, len);
        fail(126, "Argument list too long: the command line and environment take ", number,
             " bytes; the limit is 4194304", NULL);
    }
    memcpy(frame.bytes, &len, 4);
}

static void send_request(const int *fds, unsigned nfds) {
    long n = send_fds(daemon_sock, frame.bytes, frame.len, fds, nfds);
    if (n > 0) n = write_all(daemon_sock, frame.bytes + n, frame.len - (size_t)n);
    // A daemon that hung up may have said why first: the answer is still there to be read.
    if (n < 0 && n != -EPIPE && n != -ECONNRESET) fail(125, "cannot send the request: ", error_text(n), NULL);
}

// ---------------------------------------------------------------- the call

enum { MSG_DONTWAIT_ = 0x40 };
#define BIT(sig) (1ul << ((sig) - 1))

// From here on signals are read, not taken. All of them, since any other way to die would leave the terminal raw; but
// SIGTSTP and its kin still stop us. SIGPIPE is an error from write().
static void hold_signals(void) {
    uint64_t mask = ~(BIT(SIGKILL) | BIT(SIGSTOP) | BIT(SIGTSTP) | BIT(SIGTTIN) | BIT(SIGTTOU) | BIT(SIGCHLD) |
                      BIT(SIGURG));
    SYS4(__NR_rt_sigprocmask, SIG_BLOCK, &mask, NULL, sizeof mask);
    mask &= ~BIT(SIGPIPE);
    signals = (int)SYS4(__NR_signalfd4, -1, &mask, sizeof mask, SFD_CLOEXEC | SFD_NONBLOCK);
    if (signals < 0) fail(125, "cannot watch for signals: ", error_text(signals), NULL);
}

static void take_signal(bool answered) {
    const uint64_t fatal = BIT(SIGINT) | BIT(SIGTERM) | BIT(SIGHUP) | BIT(SIGQUIT);
    const uint64_t forwarded = fatal | BIT(SIGUSR1) | BIT(SIGUSR2);
    static bool heard;
    struct signalfd_siginfo info;
    struct { void *handler; uint64_t flags; void *restorer; uint64_t mask; } action = {0};
    if (sys_read(signals, &info, sizeof info) != sizeof info) return;
    int sig = (int)info.ssi_signo;
    if (sig == SIGWINCH || sig == SIGCONT) {
        tty_refresh();
        return;
    }
    // What nohup or a shell's `&` told us to ignore, the tool shall not hear of either.
    SYS4(__NR_rt_sigaction, sig, NULL, &action, sizeof action.mask);
    if (action.handler == (void *)SIG_IGN) return;
    if (answered || !(forwarded & BIT(sig))) leave(128 + sig);
    // Until somebody has read the request there is nothing to end but us; after that what is unread may be the last signal.
    heard = heard || !is_unheard(daemon_sock);
    if (!heard && fatal & BIT(sig)) leave(128 + sig);
    char message[] = "\x16\0\0\0\x83\xa1v\1\xa2op\xa6signal\xa6signal";
    message[sizeof message - 1] = (char)sig;
    sys6(__NR_sendto, daemon_sock, (long)message, sizeof message, MSG_DONTWAIT_ | MSG_NOSIGNAL_, 0, 0);
}

// Read what there is of the answer into the frame. True when it is complete.
static bool take_answer(void) {
    long n = sys_read(daemon_sock, frame.bytes + frame.len, 4 + ANSWER_MAX - frame.len);
    if (n == -EINTR || n == -EAGAIN) return false;
    if (n <= 0) {
        tty_restore();
        if (reap_runtime(daemon_sock) == 127 << 8) leave(125);  // it could not be started, and said so itself
        fail(125, "the daemon went away during the call; the tool call was killed with it", NULL);
    }
    frame.len += (size_t)n;
    uint32_t len = 0;
    if (frame.len >= 4) memcpy(&len, frame.bytes, 4);
    if (len > ANSWER_MAX) fail(125, "malformed answer from the daemon", NULL);
    return frame.len >= 4 + (size_t)len;
}

// How long a terminal may be silent after the answer: its hang-up never comes if the tool handed it to a process
// outside the sandbox.
enum { DRAIN_MS = 500 };

// Wait for the answer, and then for what is left on the terminal.
static void converse(void) {
    bool answered = false;
    frame.len = 0;
    for (;;) {
        struct pollfd poll[5] = {{answered ? -1 : daemon_sock, POLLIN, 0}, {signals, POLLIN, 0}};
        unsigned terminal = tty_poll(poll + 2, answered);
        if (answered && !terminal) return;
        long n = SYS3(__NR_poll, poll, 2 + terminal, answered && !tty_stalled() ? DRAIN_MS : -1);
        if (n == 0) return;
        if (n < 0) continue;
        if (terminal) tty_relay(poll + 2);
        if (poll[1].revents) take_signal(answered);
        if (poll[0].revents) answered = take_answer();
    }
}

// Report the answer in the frame, where every text has a byte after it to be ended with; returns what to exit with.
static int report(bool print, int result, const char *result_path) {
    uint32_t len;
    memcpy(&len, frame.bytes, 4);
    struct reader r = {frame.bytes + 4, frame.bytes + 4 + len};
    struct item op = {0}, status = {0}, json = {0}, message = {0}, map = get(&r);
    bool good = map.kind == MAP;
    for (uint64_t i = 0; good && i < map.n; i++) {
        struct item key = get(&r), value = get(&r);
        good = key.kind == BYTES && value.kind != BROKEN && skip(&r, elements(value));
        if (is_text(key, "op")) op = value;
        if (is_text(key, "exit")) status = value;
        if (is_text(key, "json")) json = value;
        if (is_text(key, "message")) message = value;
    }
    good = good && status.kind == INT && status.n <= 255;
    if (good && is_text(op, "error") && message.kind == BYTES) {
        message.bytes[message.n] = 0;
        fail((int)status.n, message.bytes, NULL);
    }
    if (!good || !is_text(op, "result") || json.kind != BYTES) fail(125, "malformed answer from the daemon", NULL);
    json.bytes[json.n++] = '\n';
    long err = result >= 0 ? write_all(result, json.bytes, json.n) : 0;
    if (err < 0) fail(125, "result ", result_path, ": ", error_text(err), NULL);
    if (print) err = write_all(1, json.bytes, json.n);
    if (err < 0) fail(125, "cannot print the result: ", error_text(err), NULL);
    if (!print && message.kind == BYTES) {
        message.bytes[message.n] = 0;
        fail((int)status.n, message.bytes, NULL);
    }
    return (int)status.n;
}

int program(int argc, char **argv, char **envp) {
    if (argc < 2 || !str_eq(argv[1], "exec")) exec_cli(125, argv, envp);
    const char *value[OPTIONS] = {0}, *names[5];
    int fds[5], result = -1, console = -1;
    unsigned nenv = 0, nfds = 0;
    bool open[3];
    hold_stdio(open);
    char **command = argv + parse(argc, argv, envp, value, &nenv);
    const char *path = value[RESULT];
    bool capture = value[CAPTURE] != NULL;

    if (capture && !open[1]) fail(2, "option '--json' needs an open standard output", NULL);
    if (path) result = (int)sys_openat(AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
    if (path && result < 0) fail(2, "result ", path, ": ", error_text(result), NULL);
    if (!capture && !value[NO_TTY] && tty_present()) {
        names[nfds] = "console";
        fds[nfds++] = console = tty_console();
        const char *term = env_entry(envp, "TERM");
        argv[nenv] = NULL;
        if (term && !env_entry(argv, "TERM")) argv[nenv++] = (char *)(uintptr_t)term;
    } else {
        static const char *const stdio[] = {"stdin", "stdout", "stderr"};
        for (int fd = 0; fd < (capture ? 1 : 3); fd++) {
            fds[nfds] = fd;
            if (open[fd]) names[nfds++] = stdio[fd];
        }
    }
    if (value[WORKSPACE]) {
        fds[nfds] = open_workspace(value);
        names[nfds++] = "workspace";
    }
    put_request(command, argv, nenv, value, names, nfds);
    // Signals are held only now: while we still wait to be connected, Ctrl-C ends this client and nothing else.
    daemon_sock = reach_daemon(value[SOCKET], value[NO_DAEMON] != NULL, envp);
    hold_signals();
    send_request(fds, nfds);
    if (console >= 0) sys_close(console);  // or we would never see the daemon's end close
    converse();
    leave(report(capture, result, path));
}
