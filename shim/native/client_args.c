// SPDX-License-Identifier: Apache-2.0
// The command line of `agentrun exec`. Only its shape is checked here: the daemon checks the values, so that there is
// one set of rules.
#include "client.h"

static const char help[] =
    "usage: agentrun exec [OPTION...] [--] COMMAND [ARG...]\n"
    "\n"
    "Run one command in a fresh sandbox.\n"
    "\n"
    "  --policy NAME|FILE      the rules to run under (see agentrun policy list)\n"
    "  --workspace DIR[:ro]    the directory the command works in; :rw is the default,\n"
    "                          :cow keeps its changes apart (agentrun diff, apply, discard)\n"
    "  --cwd PATH              where in the sandbox the command starts\n"
    "  --env NAME[=VALUE]      set a variable, or copy it from here if it is set; repeatable\n"
    "  --timeout SECONDS       end the call after this long\n"
    "  --memory SIZE           memory budget, such as 512M\n"
    "  --cpus N                processors' worth of time\n"
    "  --pids N                processes and threads at once\n"
    "  --net none|host         no network, or the host's\n"
    "  --hint memory=WHAT      memory it needs: low, medium, high or a size\n"
    "  --image NAME            the root file system: an image of the store (see agentrun image ls)\n"
    "  --session ID            the root and workspace of a session (see agentrun session --help)\n"
    "  --tenant NAME           whose budget pays\n"
    "  --best-effort           run even where a limit of the policy cannot be enforced\n"
    "  --json                  capture the output and print the whole result as JSON\n"
    "  --result FILE           write the result as JSON to FILE\n"
    "  --timings               have in the result how long each phase of the sandbox took\n"
    "  --no-tty                no terminal for the command, even if this is one\n"
    "  --no-daemon             run without the daemon, in a private runtime (slower)\n"
    "  --socket PATH           the daemon's socket; default $AGENTRUN_SOCKET, /run/agentrun/agentrun.sock\n"
    "  -h, --help              this text\n"
    "\n"
    "Exit codes: the command's own, or\n"
    "  128+N  ended by signal N          124  out of time\n"
    "  127    command not found          126  command cannot be executed\n"
    "  125    the host or agentrun failed; nothing the command did\n"
    "  75     queue full: try again      2    wrong usage or refused request\n";

const char *const option_names[OPTIONS] = {
    "policy", "cwd", "timeout", "memory", "cpus", "pids", "net", "hint", "image", "session", "tenant", "workspace", "best-effort", "capture", "timings",
    "env", "result", "socket", "no-daemon", "no-tty", "help",
};

const char *env_entry(char *const *env, const char *name) {
    for (; *env; env++) {
        size_t n = 0;
        while (name[n] && (*env)[n] == name[n]) n++;
        if (!name[n] && (*env)[n] == '=') return *env;
    }
    return NULL;
}

static enum option option_named(const char *arg) {
    if (str_eq(arg, "-h")) return HELP;
    if (arg[0] != '-' || arg[1] != '-') return OPTIONS;
    if (str_eq(arg, "--json")) return CAPTURE;
    unsigned o = 0;
    while (o < OPTIONS && (o == CAPTURE || !str_eq(arg + 2, option_names[o]))) o++;
    return (enum option)o;
}

// Returns where the command starts. The environment entries to send replace the front of argv, which has been read.
int parse(int argc, char **argv, char **envp, const char *value[OPTIONS], unsigned *nenv) {
    static const char see[] = " (see agentrun exec --help)";
    int i = 2;
    for (; i < argc && argv[i][0] == '-' && argv[i][1]; i++) {
        char *arg = argv[i], *given = (char *)(uintptr_t)str_chr(arg, '=');
        if (str_eq(arg, "--")) {
            i++;
            break;
        }
        if (given) *given++ = 0;
        enum option o = option_named(arg);
        bool flag = (o >= BEST_EFFORT && o < SENT) || o >= NO_DAEMON;
        if (o == OPTIONS) fail(2, "unknown option '", arg, "'", see, NULL);
        if (flag && given) fail(2, "option '", arg, "' takes no value", see, NULL);
        if (!flag && !given) {
            // "--" is nobody's value: a value was forgotten there.
            if (i + 1 >= argc || str_eq(argv[i + 1], "--")) fail(2, "option '", arg, "' needs a value", see, NULL);
            given = argv[++i];
        }
        if (o == HELP) leave(write_all(1, help, sizeof help - 1) ? 125 : 0);
        if (o != ENV) value[o] = flag ? "1" : given;
        else {
            if (!*given || *given == '=') fail(2, "option '--env' needs NAME or NAME=VALUE", see, NULL);
            const char *entry = str_chr(given, '=') ? given : env_entry(envp, given);
            if (entry) argv[(*nenv)++] = (char *)(uintptr_t)entry;
        }
    }
    if (i >= argc) fail(2, "no command given", see, NULL);
    const char *hint = env_entry(envp, "AGENT_RESOURCE_HINT");
    if (hint && hint[sizeof "AGENT_RESOURCE_HINT"] && !value[HINT]) value[HINT] = hint + sizeof "AGENT_RESOURCE_HINT";
    return i;
}
