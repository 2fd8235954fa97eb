// SPDX-License-Identifier: Apache-2.0
// The caller's terminal and the tool's: two byte streams between them, raw mode, the window's size.
//
// A stream has one buffer and is read only while that is empty, so a slow side slows the other and nothing is lost.
// The caller's terminal keeps its file flags (the shell shares them): it is opened anew to be written without waiting.
#include "client.h"
#include <asm/ioctls.h>
#include <asm/termbits.h>
#include <linux/termios.h>

struct stream { size_t from, to; char bytes[16384]; };

static int console = -1;  // where the terminal's master side will arrive
static int master = -1;
static int screen = 1;
static bool keys_open, raw;
static struct termios cooked;
static struct stream keys, output;

bool tty_present(void) {
    struct termios other;
    return sys_ioctl(0, TCGETS, &cooked) == 0 && sys_ioctl(1, TCGETS, &other) == 0 && sys_ioctl(2, TCGETS, &other) == 0;
}

// The end of the console socket that goes to the daemon.
int tty_console(void) {
    int pair[2];
    long err = SYS4(__NR_socketpair, AF_UNIX_, SOCK_STREAM_ | SOCK_CLOEXEC_, 0, pair);
    if (err < 0) fail(125, "cannot make a console socket: ", error_text(err), NULL);
    console = pair[0];
    return pair[1];
}

static void drop(int *fd) {
    sys_close(*fd);
    *fd = -1;
}

// Raw mode and the window's size; again after the size changed, or after we were stopped and continued.
void tty_refresh(void) {
    struct winsize size;
    if (master < 0) return;
    if (sys_ioctl(1, TIOCGWINSZ, &size) == 0) sys_ioctl(master, TIOCSWINSZ, &size);
    struct termios mode = cooked;
    mode.c_iflag &= ~(tcflag_t)(IGNBRK | BRKINT | PARMRK | ISTRIP | INLCR | IGNCR | ICRNL | IXON);
    mode.c_oflag &= ~(tcflag_t)OPOST;
    mode.c_lflag &= ~(tcflag_t)(ECHO | ECHONL | ICANON | ISIG | IEXTEN);
    mode.c_cflag = (mode.c_cflag & ~(tcflag_t)(CSIZE | PARENB)) | CS8;
    mode.c_cc[VMIN] = 1;
    mode.c_cc[VTIME] = 0;
    raw = true;
    sys_ioctl(0, TCSETS, &mode);
}

void tty_restore(void) {
    if (raw) sys_ioctl(0, TCSETS, &cooked);
    raw = false;
}

static void receive_master(void) {
    int fds[MAX_FDS];
    unsigned nfds;
    char byte;
    if (recv_fds(console, &byte, 1, fds, &nfds) > 0 && nfds) {
        master = fds[0];
        while (nfds > 1) sys_close(fds[--nfds]);
        SYS3(__NR_fcntl, master, F_SETFL, O_RDWR | O_NONBLOCK);
        long fd = sys_openat(AT_FDCWD, "/proc/self/fd/1", O_WRONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC, 0);
        if (fd >= 0) screen = (int)fd;
        keys_open = true;
        tty_refresh();
    }
    drop(&console);
}

// What to wait for, or 0 if there is no terminal, or no longer one. A descriptor that nothing is wanted from is left
// out (-1): poll would report its hang-up at once, again and again. After the answer no key is read: it is the shell's.
unsigned tty_poll(struct pollfd poll[3], bool answered) {
    bool shows = output.to > 0, types = keys.to > 0;
    if (console < 0 && master < 0 && !shows) return 0;
    poll[0] = (struct pollfd){console >= 0 ? console : shows && !types ? -1 : master,
                              (short)((shows ? 0 : POLLIN) | (types ? POLLOUT : 0)), 0};
    poll[1] = (struct pollfd){master >= 0 && keys_open && !types && !answered ? 0 : -1, POLLIN, 0};
    poll[2] = (struct pollfd){shows ? screen : -1, POLLOUT, 0};
    return 3;
}

// Output waits for the caller's terminal: it may be stopped, and time does not count.
bool tty_stalled(void) { return output.to > 0; }

// One read into, or one write out of, a stream. False: the other end has gone, and with it what was meant for it.
static bool fill(struct stream *s, int fd) {
    long n = sys_read(fd, s->bytes, sizeof s->bytes);
    s->to = n > 0 ? (size_t)n : 0;
    return n > 0 || n == -EAGAIN || n == -EINTR;
}

static bool flush(struct stream *s, int fd) {
    long n = sys_write(fd, s->bytes + s->from, s->to - s->from);
    bool open = n >= 0 || n == -EAGAIN || n == -EINTR;
    if (n > 0) s->from += (size_t)n;
    if (!open || s->from == s->to) s->from = s->to = 0;
    return open;
}

void tty_relay(const struct pollfd poll[3]) {
    if (poll[0].revents && console >= 0) receive_master();
    else if (poll[0].revents) {
        if (poll[0].revents & POLLOUT) flush(&keys, master);
        if (poll[0].revents & POLLHUP) keys.from = keys.to = 0;
        if (!output.to && poll[0].revents & ~POLLOUT && !fill(&output, master)) drop(&master);
    }
    if (poll[1].revents) keys_open = fill(&keys, 0);
    // A terminal that is gone takes everything, so that the tool's writes do not block for ever.
    if (poll[2].revents) flush(&output, screen);
}
