// SPDX-License-Identifier: Apache-2.0
// The second wall: landlock(7). The rules are prepared while the sandbox is warmed; entering them is one call of RUN.
#include "slot.h"
#include <linux/landlock.h>

static uint32_t workspace_access, restrict_flags;

static long allow(int rules, const char *path, uint32_t access) {
    long fd = sys_openat(AT_FDCWD, path, O_PATH | O_CLOEXEC, 0);
    if (fd < 0) return fd;
    struct landlock_path_beneath_attr rule = {.allowed_access = access, .parent_fd = (int)fd};
    long err = SYS4(__NR_landlock_add_rule, rules, LANDLOCK_RULE_PATH_BENEATH, &rule, 0);
    sys_close((int)fd);
    return err;
}

// One LANDLOCK or WRITABLE operation; the ruleset stays open as FD_RULES until RUN.
long landlock_prepare(const struct plan_op *op) {
    if (op->type == OP_WRITABLE) {
        long err = allow(FD_RULES, op_text(op), op->a);
        return err == -ENOENT ? 0 : err;  // what is not there cannot be written either
    }
    struct { uint64_t fs, net, scoped; } attr = {op->a, 0, op->b};
    long fd = SYS3(__NR_landlock_create_ruleset, &attr, sizeof attr, 0);
    if (fd < 0) return fd;
    workspace_access = op->c, restrict_flags = op->d;
    long err = sys_dup3((int)fd, FD_RULES, O_CLOEXEC);
    sys_close((int)fd);
    return err;
}

// Enter the rules, with the workspace as one more writable place; nothing to do where the plan has none.
long landlock_enter(const char *workspace) {
    if (!workspace_access) return 0;
    long err = *workspace ? allow(FD_RULES, workspace, workspace_access) : 0;
    return err < 0 ? err : SYS2(__NR_landlock_restrict_self, FD_RULES, restrict_flags);
}
