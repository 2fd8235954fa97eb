// SPDX-License-Identifier: Apache-2.0
// Mounts and paths of a container. Every path is resolved by the kernel within the root (openat2, RESOLVE_IN_ROOT) and used as
// a descriptor from then on, so that no symbolic link of an image leads anywhere else, whoever changes it meanwhile.
#include "oci.h"
#include <linux/mount.h>
#include <linux/openat2.h>
#include <linux/stat.h>

enum { MNT_DETACH_ = 2, LINKS = 16, EMPTY = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH };

static long type_of(int fd) {
    struct statx st;
    long err = SYS5(__NR_statx, fd, "", AT_EMPTY_PATH_, STATX_TYPE | STATX_MODE, &st);
    return err < 0 ? err : st.stx_mode;
}

long root_open(const struct container *c, const char *path, int flags) {
    struct open_how how = {.flags = (uint64_t)(flags | O_CLOEXEC), .resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS};
    long fd;
    int tries = 0;
    do fd = SYS4(__NR_openat2, c->root, *path ? path : "/", &how, sizeof how);
    while ((fd == -EAGAIN || fd == -EINTR) && ++tries < 128);  // something was renamed meanwhile
    return fd;
}

// Where a symbolic link whose target is not there would lead: the path with the link's text put in.
static long follow(int parent, char *path, size_t at, const char *name, const char *rest) {
    char text[PATH_ROOM], out[PATH_ROOM], *p = out, *end = out + sizeof out;
    long n = SYS4(__NR_readlinkat, parent, name, text, sizeof text - 1);
    if (n < 0) return n;
    text[n] = 0;
    if (text[0] != '/') {
        path[at] = 0;
        p = str_add(str_add(p, end, path), end, "/");
    }
    p = str_add(p, end, text);
    if (*rest) p = str_add(str_add(p, end, "/"), end, rest);
    if (p >= end - 1) return -ENAMETOOLONG;
    memcpy(path, out, (size_t)(p - out) + 1);
    return 0;
}

// An O_PATH descriptor of a path in the root, made if it is not there: directories on the way, and a directory or a file.
static long root_make(const struct container *c, const char *wanted, bool directory) {
    char path[PATH_ROOM];
    long fd = root_open(c, wanted, O_PATH);
    if (fd != -ENOENT || c->root < 0) return fd;
    if (str_len(wanted) >= sizeof path) return -ENAMETOOLONG;
    str_add(path, path + sizeof path, wanted);
    for (int links = 0; links < LINKS;) {
        long parent = root_open(c, "/", O_PATH | O_DIRECTORY), err = 0;
        bool again = false;
        for (char *name = path; parent >= 0;) {
            while (*name == '/') name++;
            if (!*name) return parent;
            char *end = name;
            while (*end && *end != '/') end++;
            char *rest = end;
            while (*rest == '/') rest++;
            bool last = !*rest;
            char was = *end;
            *end = 0;
            long next = root_open(c, path, O_PATH | (last ? 0 : O_DIRECTORY));
            if (next == -ENOENT) {
                if (last && !directory) {
                    err = sys_openat((int)parent, name, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0755);
                    if (err >= 0) sys_close((int)err);
                } else err = SYS3(__NR_mkdirat, parent, name, 0755);
                if (err == -EEXIST) {  // a link to nowhere: make what it names
                    size_t start = (size_t)(name - path);
                    err = follow((int)parent, path, start ? start - 1 : 0, name, rest);
                    sys_close((int)parent);
                    if (err < 0) return err;
                    again = true, links++;
                    break;
                }
                next = err < 0 ? err : root_open(c, path, O_PATH);
            }
            sys_close((int)parent);
            parent = next;
            *end = was;
            name = end;
        }
        if (!again) return parent;
    }
    return -ELOOP;
}

// ---------------------------------------------------------------- trees: mounts that the helper clones, and the container attaches

long tree_open(struct container *c, const char *source) {
    const struct plan_op *op = c->op;
    long fd = SYS3(__NR_open_tree, AT_FDCWD, source, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | (op->b ? AT_RECURSIVE_ : 0));
    if (fd < 0) return fd;
    c->slots[op->a] = (int)fd;
    if (!op->c) return 0;
    struct mount_attr attr = {.attr_set = MOUNT_ATTR_IDMAP, .userns_fd = (uint64_t)c->slots[op->c - 1]};
    return SYS5(__NR_mount_setattr, fd, "", AT_EMPTY_PATH_ | (op->d ? AT_RECURSIVE_ : 0), &attr, sizeof attr);
}

static long set_attributes(int fd, uint64_t set, uint64_t clear, uint64_t propagation, bool recursive) {
    if (set & MOUNT_ATTR__ATIME) clear |= MOUNT_ATTR__ATIME;
    struct mount_attr attr = {.attr_set = set, .attr_clr = clear, .propagation = propagation};
    return SYS5(__NR_mount_setattr, fd, "", AT_EMPTY_PATH_ | (recursive ? AT_RECURSIVE_ : 0), &attr, sizeof attr);
}

long tree_attr(const struct container *c) {
    const struct plan_op *op = c->op;
    return set_attributes(c->slots[op->a], op->b, op->c, op->d & ~1u, op->d & 1);
}

// The host's mounts stay as they are: what happens there may show here (slave), never the other way round.
long root_enter(struct container *c, const char *path) {
    long err = SYS5(__NR_mount, NULL, "/", NULL, c->op->b, NULL);
    if (err < 0) return err;
    if ((err = SYS5(__NR_move_mount, c->slots[c->op->a], "", AT_FDCWD, path, MOVE_MOUNT_F_EMPTY_PATH)) < 0) return err;
    err = sys_openat(AT_FDCWD, path, O_PATH | O_DIRECTORY | O_CLOEXEC, 0);
    if (err < 0) return err;
    c->root = (int)err;
    return SYS1(__NR_fchdir, c->root);
}

static long attach(int mount, int target) {
    return SYS5(__NR_move_mount, mount, "", target, "", EMPTY);
}

long tree_attach(const struct container *c, const char *dest) {
    int tree = c->slots[c->op->a];
    long mode = type_of(tree);
    if (mode < 0) return mode;
    long target = root_make(c, dest, (mode & 0170000) == 0040000);
    if (target < 0) return target;
    long err = attach(tree, (int)target);
    sys_close((int)target);
    sys_close(tree);
    return err;
}

// ---------------------------------------------------------------- new file systems

// Options are lines: `key=value` or `flag`.
static long configure(int fs, const char *source, const char *lines) {
    char line[PATH_ROOM];
    long err = *source ? SYS5(__NR_fsconfig, fs, FSCONFIG_SET_STRING, "source", source, 0) : 0;
    while (err >= 0 && *lines) {
        char *p = line;
        for (; *lines && *lines != '\n'; lines++)
            if (p < line + sizeof line - 1) *p++ = *lines;
        *p = 0;
        if (*lines) lines++;
        char *value = (char *)(uintptr_t)str_chr(line, '=');
        if (value) *value++ = 0;
        err = SYS5(__NR_fsconfig, fs, value ? FSCONFIG_SET_STRING : FSCONFIG_SET_FLAG, line, value, 0);
    }
    return err < 0 ? err : SYS5(__NR_fsconfig, fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0);
}

static long make(const char *type, const char *source, const char *lines, uint32_t attributes) {
    long fs = SYS2(__NR_fsopen, type, FSOPEN_CLOEXEC);
    if (fs < 0) return fs;
    long err = configure((int)fs, source, lines);
    if (err >= 0) err = SYS3(__NR_fsmount, fs, FSMOUNT_CLOEXEC, attributes);
    sys_close((int)fs);
    return err;
}

static bool has_mode(const char *lines) {
    for (const char *p = lines; *p; p++)
        if ((p == lines || p[-1] == '\n') && memcmp(p, "mode=", 5 < str_len(p) ? 5 : str_len(p)) == 0) return true;
    return false;
}

static long private_to_root(int fd) {  // what is copied up is opened anew: an O_PATH descriptor cannot be read
    return sys_openat(fd, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
}

static long copy_up(int target, int mount) {
    long from = private_to_root(target), to = private_to_root(mount);
    long err = from < 0 ? from : to < 0 ? to : tree_copy((int)from, (int)to, 0);
    if (from >= 0) sys_close((int)from);
    if (to >= 0) sys_close((int)to);
    return err;
}

long filesystem_mount(const struct container *c, const char *type) {
    const struct plan_op *op = c->op;
    const char *source = text_next(type), *dest = text_next(source), *lines = text_next(dest);
    char with_mode[PATH_ROOM];
    long target = root_make(c, dest, true);
    if (target < 0) return target;
    if (str_eq(type, "tmpfs") && !has_mode(lines)) {  // a tmpfs looks like what it covers
        long mode = type_of((int)target);
        char *p = str_add(with_mode, with_mode + sizeof with_mode, "mode=");
        for (int shift = 9; shift >= 0; shift -= 3) *p++ = (char)('0' + (mode >> shift & 7));
        *p = 0;
        if (*lines) str_add(str_add(p, with_mode + sizeof with_mode, "\n"), with_mode + sizeof with_mode, lines);
        lines = with_mode;
    }
    long mount = make(type, source, lines, op->a);
    if ((mount == -EPERM || mount == -EBUSY || mount == -EINVAL) && op->d & FSMOUNT_BIND_INSTEAD) {
        mount = SYS3(__NR_open_tree, AT_FDCWD, source, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE_);
        if (mount >= 0) set_attributes((int)mount, op->a, 0, 0, true);
    }
    long err = mount < 0 ? mount : 0;
    if (err >= 0 && op->d & FSMOUNT_COPY_UP) err = copy_up((int)target, (int)mount);
    if (err >= 0) err = attach((int)mount, (int)target);
    if (err >= 0 && op->c) err = set_attributes((int)mount, 0, 0, op->c & ~(uint32_t)MS_REC, op->c & MS_REC);
    if (mount >= 0) sys_close((int)mount);
    sys_close((int)target);
    return err;
}

// ---------------------------------------------------------------- single paths

// The directory a path is to be made in, and the name in it.
static long parent_make(const struct container *c, const char *path, const char **name) {
    char up[PATH_ROOM];
    size_t n = str_len(path), cut = n;
    if (n >= sizeof up) return -ENAMETOOLONG;
    while (cut && path[cut - 1] != '/') cut--;
    memcpy(up, path, cut);
    up[cut] = 0;
    *name = path + cut;
    return root_make(c, cut ? up : "/", true);
}

static long bind_host(const struct container *c, const char *host, const char *path) {
    long target = root_make(c, path, false);
    if (target < 0) return target;
    long tree = SYS3(__NR_open_tree, AT_FDCWD, host, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
    long err = tree < 0 ? tree : attach((int)tree, (int)target);
    if (tree >= 0) sys_close((int)tree);
    sys_close((int)target);
    return err;
}

long node_make(const struct container *c, const char *path) {
    const struct plan_op *op = c->op;
    const char *name;
    long parent = parent_make(c, path, &name);
    if (parent < 0) return parent;
    long err = SYS4(__NR_mknodat, parent, name, op->a, op->b);
    if (err == -EPERM && (op->a & 0170000) != 0010000) {  // not the initial user namespace
        sys_close((int)parent);
        return bind_host(c, path, path);
    }
    if (err >= 0) err = SYS5(__NR_fchownat, parent, name, op->c, op->d, AT_SYMLINK_NOFOLLOW_);
    if (err >= 0) err = SYS3(__NR_fchmodat, parent, name, op->a & 07777);
    sys_close((int)parent);
    return err == -EEXIST ? 0 : err;  // the image's own
}

long link_make(const struct container *c, const char *target) {
    const char *path = text_next(target), *name;
    long parent = parent_make(c, path, &name);
    if (parent < 0) return parent;
    long err = SYS3(__NR_symlinkat, target, parent, name);
    sys_close((int)parent);
    return err == -EEXIST ? 0 : err;
}

long path_mask(const struct container *c, const char *path) {
    long target = root_open(c, path, O_PATH);
    if (target < 0) return target == -ENOENT || target == -ENOTDIR ? 0 : target;
    long mode = type_of((int)target), cover;
    if ((mode & 0170000) == 0040000) cover = make("tmpfs", "tmpfs", "size=0\nmode=555", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC);
    else cover = SYS3(__NR_open_tree, AT_FDCWD, "/dev/null", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);  // the host's, never the image's
    long err = cover < 0 ? cover : attach((int)cover, (int)target);
    if (cover >= 0) sys_close((int)cover);
    sys_close((int)target);
    return err;
}

long path_freeze(const struct container *c, const char *path) {
    long target = root_open(c, path, O_PATH);
    if (target < 0) return target == -ENOENT || target == -ENOTDIR ? 0 : target;
    long tree = SYS3(__NR_open_tree, target, "", OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_RECURSIVE_ | AT_EMPTY_PATH_);
    long err = tree < 0 ? tree : set_attributes((int)tree, MOUNT_ATTR_RDONLY, 0, 0, true);
    if (err >= 0) err = attach((int)tree, (int)target);
    if (tree >= 0) sys_close((int)tree);
    sys_close((int)target);
    return err;
}

// ---------------------------------------------------------------- into the root

long root_pivot(const struct container *c) {
    long err = SYS1(__NR_fchdir, c->root);
    if (err < 0) return err;
    if (c->op->a) {  // the host's root is no mount that can be pivoted away from (initramfs): it stays, covered
        if ((err = SYS5(__NR_mount, ".", "/", NULL, MS_MOVE, NULL)) < 0) return err;
        if ((err = SYS1(__NR_chroot, ".")) < 0) return err;
    } else {
        long host = sys_openat(AT_FDCWD, "/", O_PATH | O_DIRECTORY | O_CLOEXEC, 0);
        if (host < 0) return host;
        if ((err = SYS2(__NR_pivot_root, ".", ".")) < 0) return err;
        if ((err = SYS1(__NR_fchdir, host)) < 0) return err;
        if ((err = SYS5(__NR_mount, NULL, ".", NULL, MS_SLAVE | MS_REC, NULL)) < 0) return err;  // the host's, whose unmounts stay here
        if ((err = SYS2(__NR_umount2, ".", MNT_DETACH_)) < 0) return err;
        sys_close((int)host);
    }
    if ((err = SYS1(__NR_chdir, "/")) < 0) return err;
    return c->op->b ? SYS5(__NR_mount, NULL, "/", NULL, c->op->b, NULL) : 0;
}

// A working directory that is not there may be made; one that is outside (a descriptor someone left open) is refused.
long work_directory(const char *path, bool make) {
    char text[PATH_ROOM];
    long err = SYS1(__NR_chdir, path);
    if (err == -ENOENT && make && str_len(path) < sizeof text) {
        str_add(text, text + sizeof text, path);
        for (char *p = text + 1; *p; p++)
            if (*p == '/') *p = 0, SYS2(__NR_mkdir, text, 0755), *p = '/';
        SYS2(__NR_mkdir, text, 0755);
        err = SYS1(__NR_chdir, path);
    }
    if (err < 0) return err;
    if ((err = SYS2(__NR_getcwd, text, sizeof text)) < 0) return err;
    return text[0] == '/' ? 0 : -EXDEV;
}
