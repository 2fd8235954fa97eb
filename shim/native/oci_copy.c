// SPDX-License-Identifier: Apache-2.0
// tmpcopyup: what a directory holds, copied into the tmpfs that is going to cover it. Owners, modes and times of files,
// directories and symbolic links; device nodes and sockets are left out.
#include "oci.h"
#include <linux/stat.h>

enum { DEPTH = 64 };

struct entry { uint64_t ino; int64_t off; uint16_t len; uint8_t type; char name[]; };

static long copy_file(int from, int to, const char *name, const struct statx *st) {
    long in = sys_openat(from, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC, 0), err = 0;
    if (in < 0) return in;
    long out = sys_openat(to, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (out < 0) return sys_close((int)in), out;
    do err = SYS4(__NR_sendfile, out, in, NULL, 1 << 30);
    while (err > 0);
    if (err >= 0) err = SYS3(__NR_fchown, out, st->stx_uid, st->stx_gid);
    if (err >= 0) err = SYS2(__NR_fchmod, out, st->stx_mode & 07777);
    sys_close((int)in);
    sys_close((int)out);
    return err;
}

static long copy_link(int from, int to, const char *name, const struct statx *st) {
    char text[PATH_ROOM];
    long n = SYS4(__NR_readlinkat, from, name, text, sizeof text - 1);
    if (n < 0) return n;
    text[n] = 0;
    if ((n = SYS3(__NR_symlinkat, text, to, name)) < 0) return n;
    return SYS5(__NR_fchownat, to, name, st->stx_uid, st->stx_gid, AT_SYMLINK_NOFOLLOW_);
}

static long copy_directory(int from, int to, const char *name, const struct statx *st, unsigned depth) {
    long err = SYS3(__NR_mkdirat, to, name, 0700);
    if (err < 0) return err;
    long in = sys_openat(from, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC, 0);
    long out = sys_openat(to, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC, 0);
    err = in < 0 ? in : out < 0 ? out : tree_copy((int)in, (int)out, depth + 1);
    if (err >= 0) err = SYS3(__NR_fchown, out, st->stx_uid, st->stx_gid);
    if (err >= 0) err = SYS2(__NR_fchmod, out, st->stx_mode & 07777);
    if (in >= 0) sys_close((int)in);
    if (out >= 0) sys_close((int)out);
    return err;
}

static long copy_entry(int from, int to, const char *name, unsigned depth) {
    struct statx st;
    long err = SYS5(__NR_statx, from, name, AT_SYMLINK_NOFOLLOW_, STATX_BASIC_STATS, &st);
    if (err < 0) return err;
    switch (st.stx_mode & 0170000) {
    case 0100000: return copy_file(from, to, name, &st);
    case 0120000: return copy_link(from, to, name, &st);
    case 0040000: return copy_directory(from, to, name, &st, depth);
    default: return 0;
    }
}

long tree_copy(int from, int to, unsigned depth) {
    char list[2048] __attribute__((aligned(8)));
    if (depth > DEPTH) return -ELOOP;
    for (;;) {
        long n = SYS3(__NR_getdents64, from, list, sizeof list);
        if (n <= 0) return n;
        for (long at = 0; at < n;) {
            const struct entry *e = (const void *)(list + at);
            if (!str_eq(e->name, ".") && !str_eq(e->name, "..")) {
                long err = copy_entry(from, to, e->name, depth);
                if (err < 0) return err;
            }
            at += e->len;
        }
    }
}
