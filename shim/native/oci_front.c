// SPDX-License-Identifier: Apache-2.0
// `agentrun-oci`: the verbs that engines call for every container and that need no configuration are done here, in a
// millisecond; all others, and every command line that is not plain, are passed on to Python (agentrun_shim/oci), which has
// the one set of rules. Nothing here looks at PATH or HOME: engines call runtimes without them.
#include "oci.h"

enum { TEXT_ROOM = 16384 };

static char default_root[PATH_ROOM] = "/run/agentrun-oci";

// ---------------------------------------------------------------- errors: stderr, and one JSON line in the log

static char *two(char *p, const char *end, uint64_t value) {
    if (value < 10) p = str_add(p, end, "0");
    return str_add_u64(p, end, value);
}

// RFC 3339, UTC. Days to a date: years of 365.2425 days that begin in March, so that the leap day is the last.
static char *time_add(char *p, const char *end) {
    struct { int64_t sec, nsec; } now = {0, 0};
    SYS2(__NR_clock_gettime, 0 /* CLOCK_REALTIME */, &now);
    int64_t days = now.sec / 86400 + 719468, rest = now.sec % 86400;
    int64_t era = days / 146097, day = days % 146097;
    int64_t year = (day - day / 1460 + day / 36524 - day / 146096) / 365;
    int64_t of_year = day - (365 * year + year / 4 - year / 100), month = (5 * of_year + 2) / 153;
    int64_t date = of_year - (153 * month + 2) / 5 + 1;
    month = month < 10 ? month + 3 : month - 9;
    p = str_add_u64(p, end, (uint64_t)(year + era * 400 + (month <= 2)));
    p = two(str_add(p, end, "-"), end, (uint64_t)month);
    p = two(str_add(p, end, "-"), end, (uint64_t)date);
    p = two(str_add(p, end, "T"), end, (uint64_t)(rest / 3600));
    p = two(str_add(p, end, ":"), end, (uint64_t)(rest / 60 % 60));
    p = two(str_add(p, end, ":"), end, (uint64_t)(rest % 60));
    return str_add(p, end, "Z");
}

static char *json_add(char *p, const char *end, const char *s) {
    static const char hex[] = "0123456789abcdef";
    for (; *s && p < end - 8; s++) {
        unsigned char ch = (unsigned char)*s;
        if (ch == '"' || ch == '\\') *p++ = '\\', *p++ = (char)ch;
        else if (ch < 32) *p++ = '\\', *p++ = 'u', *p++ = '0', *p++ = '0', *p++ = hex[ch >> 4], *p++ = hex[ch & 15];
        else *p++ = (char)ch;
    }
    *p = 0;
    return p;
}

void die(const struct front *f, ...) {
    static char message[TEXT_ROOM], line[2 * TEXT_ROOM];
    char *p = message, *end = message + sizeof message;
    va_list parts;
    va_start(parts, f);
    for (const char *part; (part = va_arg(parts, const char *));) p = str_add(p, end, part);
    va_end(parts);
    if (f->log) {
        end = line + sizeof line;
        p = str_add(line, end, f->json_log ? "{\"level\":\"error\",\"msg\":\"" : "time=\"");
        p = f->json_log ? json_add(p, end, message) : time_add(p, end);
        p = str_add(p, end, f->json_log ? "\",\"time\":\"" : "\" level=error msg=\"");
        p = f->json_log ? time_add(p, end) : json_add(p, end, message);
        p = str_add(p, end, f->json_log ? "\"}\n" : "\"\n");
        long fd = sys_openat(AT_FDCWD, f->log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
        if (fd >= 0) sys_write((int)fd, line, (size_t)(p - line)), sys_close((int)fd);
    }
    p = str_add(str_add(line, line + sizeof line, message), line + sizeof line, "\n");
    sys_write(2, line, (size_t)(p - line));
    sys_exit(1);
}

const char *error_text(long err) {
    static char text[32];
    switch (-err) {
    case EPERM: return "operation not permitted";
    case ENOENT: return "no such file or directory";
    case ESRCH: return "no such process";
    case EIO: return "input/output error";
    case ENOEXEC: return "exec format error";
    case EAGAIN: return "resource temporarily unavailable";
    case ENOMEM: return "cannot allocate memory";
    case EACCES: return "permission denied";
    case EBUSY: return "device or resource busy";
    case ENOTDIR: return "not a directory";
    case EINVAL: return "invalid argument";
    case ETIMEDOUT: return "timed out";
    case ENOSPC: return "no space left on device";
    default: str_add_u64(str_add(text, text + sizeof text, "errno "), text + sizeof text, (uint64_t)-err); return text;
    }
}

// ---------------------------------------------------------------- Python

// The interpreter: what the installation's own script names, or the one a checkout was built with, or the system's.
static const char *interpreter(const char *dir) {
    static char text[PATH_ROOM];
    char path[PATH_ROOM], *end = path + sizeof path;
    static const char *const names[] = {"/interpreter", "/agentrun-cli"};
    for (unsigned i = 0; i < 2; i++) {
        str_add(str_add(path, end, dir), end, names[i]);
        if (file_read(AT_FDCWD, path, text, sizeof text) <= 2) continue;
        char *p = text;
        if (p[0] == '#' && p[1] == '!') p += 2;
        if (memcmp(p, "/bin/sh\n\'\'\'exec\' ", 17) == 0) p += 17;  // a path too long for the kernel: pip writes a shell script
        bool quoted = *p == '"';
        char *stop = p += quoted;
        while (*stop && *stop != '\n' && *stop != (quoted ? '"' : ' ')) stop++;
        *stop = 0;
        if (*p == '/') return p;
    }
    return "/usr/bin/python3";
}

static bool is_package(const char *base, char *into, const char *end) {
    char *p = str_add(into, end, base);
    char *tail = str_add(p, end, "/agentrun_shim/oci/main.py");
    bool there = tail < end - 1 && SYS3(__NR_faccessat, AT_FDCWD, into, 4) == 0;
    *p = 0;
    return there;
}

// The directory that agentrun_shim is in: ours, or below the prefix we are installed in.
static bool package(const char *dir, char *into, const char *end) {
    static const char *const prefixes[] = {"/../lib", "/../local/lib"};
    static const char *const kinds[] = {"/site-packages", "/dist-packages"};
    char base[PATH_ROOM], *stop = base + sizeof base, list[4096] __attribute__((aligned(8)));
    struct entry { uint64_t ino; int64_t off; uint16_t len; uint8_t type; char name[]; };
    static const char *const near[] = {"/../..", "/.."};  // a checkout or the package itself; `pip install --target`
    for (unsigned i = 0; i < 2; i++) {
        str_add(str_add(base, stop, dir), stop, near[i]);
        if (is_package(base, into, end)) return true;
    }
    for (unsigned i = 0; i < 2; i++) {
        char *lib = str_add(str_add(base, stop, dir), stop, prefixes[i]);
        long fd = sys_openat(AT_FDCWD, base, O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0), n;
        if (fd < 0) continue;
        while ((n = SYS3(__NR_getdents64, fd, list, sizeof list)) > 0)
            for (long at = 0; at < n;) {
                const struct entry *e = (const void *)(list + at);
                at += e->len;
                if (memcmp(e->name, "python3", 7) != 0) continue;
                for (unsigned k = 0; k < 2; k++) {
                    str_add(str_add(str_add(lib, stop, "/"), stop, e->name), stop, kinds[k]);
                    if (is_package(base, into, end)) return sys_close((int)fd), true;
                }
            }
        sys_close((int)fd);
    }
    return false;
}

static const char bootstrap[] = "import sys; sys.path.append(sys.argv.pop(1)); from agentrun_shim.oci.main import main; main()";

// Isolated, and without site where the package is found without it: no PYTHON* variable, no user's or caller's directory.
void python(const struct front *f, const char *internal) {
    char self[PATH_ROOM], where[PATH_ROOM], *argv[512], **p = argv;
    long n = SYS4(__NR_readlinkat, AT_FDCWD, "/proc/self/exe", self, sizeof self - 1);
    if (n <= 0) die(f, "cannot find myself: /proc is not mounted", NULL);
    while (n > 1 && self[n - 1] != '/') n--;
    self[n - 1] = 0;
    *p++ = (char *)(uintptr_t)interpreter(self);
    *p++ = "-I";
    if (package(self, where, where + sizeof where)) {
        *p++ = "-S", *p++ = "-c", *p++ = (char *)(uintptr_t)bootstrap, *p++ = where;
    } else *p++ = "-m", *p++ = "agentrun_shim.oci.main";
    *p++ = default_root;
    *p++ = internal ? (char *)(uintptr_t)internal : "";
    for (char **arg = f->argv + 1; *arg; arg++) {
        if (p == argv + 511) die(f, "too many arguments", NULL);
        *p++ = *arg;
    }
    *p = NULL;
    long err = sys_execve(argv[0], argv, f->envp);
    die(f, "cannot execute ", argv[0], ": ", error_text(err), NULL);
}

// ---------------------------------------------------------------- the command line

// The value of `--name VALUE` or `--name=VALUE` (one dash will do, as in Go); NULL if *arg is another option.
static const char *value_of(char ***arg, const char *name) {
    const char *p = **arg;
    size_t n = str_len(name);
    if (*p++ != '-') return NULL;
    if (*p == '-') p++;
    if (str_len(p) < n || memcmp(p, name, n) != 0) return NULL;
    if (p[n] == '=') return p + n + 1;
    return p[n] || !(*arg)[1] ? NULL : *++*arg;
}

static bool is_flag(const char *arg, const char *shortly, const char *name) {
    return str_eq(arg, shortly) || (arg[0] == '-' && arg[1] == '-' && str_eq(arg + 2, name));
}

// Not the host's root: another user, or a user namespace that does not have all of the host's ids.
static void find_root(char **envp) {
    char map[128];
    static const char full[] = "         0          0 4294967295\n";
    bool root = SYS1(__NR_geteuid, 0) == 0;
    if (root && (file_read(AT_FDCWD, "/proc/self/uid_map", map, sizeof map) <= 0 || str_eq(map, full))) return;
    const char *runtime = env_get(envp, "XDG_RUNTIME_DIR");
    char *end = default_root + sizeof default_root, *p = default_root;
    if (runtime && *runtime == '/') p = str_add(p, end, runtime);
    else if (!root) p = str_add_u64(str_add(p, end, "/tmp/agentrun-"), end, (uint64_t)SYS1(__NR_geteuid, 0));
    else p = str_add(p, end, "/run");
    str_add(p, end, "/agentrun-oci");
}

// A name that is one directory's: letters, digits, _ + . - and none of the last two to begin with.
static bool sound_id(const char *id) {
    size_t n = 0;
    for (const char *p = id; *p; p++, n++) {
        bool word = (*p >= 'a' && *p <= 'z') || (*p >= 'A' && *p <= 'Z') || (*p >= '0' && *p <= '9');
        if (!word && !str_chr("_+.-", *p)) return false;
    }
    return n > 0 && n < 256 && *id != '.' && *id != '-';
}

// Who calls us with a stream closed would have the next thing that is opened in its place, and the container would inherit that:
// something of the host's.
static void streams_open(void) {
    long fd;
    do fd = sys_openat(AT_FDCWD, "/dev/null", O_RDWR, 0);
    while (fd >= 0 && fd <= 2);
    if (fd > 2) sys_close((int)fd);
}

int program(int argc, char **argv, char **envp) {
    struct front f = {.root = default_root, .argv = argv, .envp = envp};
    if (argc == 5 && str_eq(argv[0], "agentrun-oci: container")) return container_main(argc, argv);
    streams_open();
    find_root(envp);
    char **arg = argv + 1;
    const char *value, *operands[3] = {NULL};
    bool odd = false;
    for (; *arg && **arg == '-'; arg++) {
        if ((value = value_of(&arg, "root"))) f.root = value;
        else if ((value = value_of(&arg, "log"))) f.log = value;
        else if ((value = value_of(&arg, "log-format"))) f.json_log = str_eq(value, "json"), odd |= !f.json_log && !str_eq(value, "text");
        else if (!value_of(&arg, "log-level") && !value_of(&arg, "cgroup-manager") && !value_of(&arg, "rootless") &&
                 !value_of(&arg, "criu") && !str_eq(*arg, "--systemd-cgroup") && !str_eq(*arg, "--debug"))
            python(&f, NULL);
    }
    if (f.log && memcmp(f.log, "file:", 5) == 0) f.log += 5;
    // Directories are changed on the way, so a relative path is made absolute first: there.
    if (!*arg || *f.root != '/' || (f.log && *f.log != '/') || odd) python(&f, NULL);
    const char *verb = *arg++;
    bool state = str_eq(verb, "state"), start = str_eq(verb, "start"), kill = str_eq(verb, "kill"), del = str_eq(verb, "delete");
    if (!state && !start && !kill && !del) python(&f, NULL);
    unsigned count = 0;
    for (; *arg; arg++) {
        if (del && is_flag(*arg, "-f", "force")) f.force = true;
        else if (kill && is_flag(*arg, "-a", "all")) f.all = true;
        else if (**arg == '-' || count == 2) python(&f, NULL);
        else operands[count++] = *arg;
    }
    if (count < 1 || (count == 2 && !kill) || !sound_id(operands[0])) python(&f, NULL);
    f.id = operands[0];
    if (state) return verb_state(&f);
    if (start) return verb_start(&f);
    if (kill) return verb_kill(&f, operands[1] && *operands[1] ? operands[1] : "TERM");
    return verb_delete(&f);
}
