// SPDX-License-Identifier: Apache-2.0
// What the parts of the native `agentrun` command share.
#pragma once
#include "sys.h"
#include <linux/poll.h>

// client_args.c
enum option {
    POLICY, CWD, TIMEOUT, MEMORY, CPUS, PIDS, NET, HINT, IMAGE, SESSION, TENANT, WORKSPACE, BEST_EFFORT, CAPTURE, TIMINGS, SENT,  // go to the daemon
    ENV = SENT, RESULT, SOCKET, NO_DAEMON, NO_TTY, HELP, OPTIONS
};
extern const char *const option_names[OPTIONS];
const char *env_entry(char *const *env, const char *name);
int parse(int argc, char **argv, char **envp, const char *value[OPTIONS], unsigned *nenv);

// client.c
__attribute__((noreturn)) void leave(int status);
__attribute__((noreturn, sentinel)) void fail(int status, ...);
const char *error_text(long error);
long write_all(int fd, const void *data, size_t n);

// client_daemon.c
__attribute__((noreturn)) void exec_cli(int status, char **argv, char **envp);
int reach_daemon(const char *path, bool own_runtime, char **envp);
int reap_runtime(int sock);
bool is_unheard(int sock);

// client_tty.c
bool tty_present(void);
int tty_console(void);
unsigned tty_poll(struct pollfd poll[3], bool answered);
bool tty_stalled(void);
void tty_relay(const struct pollfd poll[3]);
void tty_refresh(void);
void tty_restore(void);
