// SPDX-License-Identifier: Apache-2.0
// Check a SHAPE plan before anything of it is executed: a malformed plan is an error, never half a sandbox.
#include "slot.h"
#include <linux/sched.h>

enum { NAMESPACES = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWUSER | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP };
enum { MAX_GROUPS = 32 };
// Without these three there is no sandbox: ids, mounts and processes of the host would be the tool's.
enum { REQUIRED = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWUSER };

static bool known(uint32_t type, unsigned *strings) {
    for (unsigned i = 0; i < sizeof op_strings / sizeof op_strings[0]; i++)
        if (op_strings[i].type == type) return *strings = op_strings[i].strings, true;
    return false;
}

static bool op_check(const struct plan_op *op, size_t room, unsigned nfds) {
    unsigned strings;
    if (room < sizeof *op || op->size < sizeof *op || op->size > room || op->size % 8) return false;
    if (!known(op->type, &strings)) return false;
    const char *p = op_text(op), *end = (const char *)op + op->size;
    for (; strings; strings--) {
        while (p < end && *p) p++;
        if (p++ >= end) return false;
    }
    if ((op->type == OP_ROOT || op->type == OP_MOVE) && op->a >= nfds) return false;
    if (op->type == OP_IDS && (op->c > MAX_GROUPS || op->c * 4 > op->size - sizeof *op)) return false;
    if (op->type == OP_FILTER && (op->a == 0 || op->a > PLAN_MAX_FILTER || op->a * 8 > op->size - sizeof *op)) return false;
    return true;
}

bool plan_load(const char *msg, size_t len, unsigned nfds, struct shape *shape, struct failure *why) {
    const struct plan_shape *head = (const void *)(msg + sizeof(struct plan_header));
    size_t at = sizeof(struct plan_header) + sizeof *head;
    *why = (struct failure){STEP_PLAN, 0, EINVAL};
    if (len < at || (head->namespaces & ~(uint32_t)NAMESPACES) || (head->namespaces & REQUIRED) != REQUIRED) return false;
    bool ids = false;
    for (uint32_t i = 0; i < head->nops; i++) {
        const struct plan_op *op = (const void *)(msg + at);
        why->op = i;
        if (!op_check(op, len - at, nfds)) return false;
        if ((op->type == OP_ROOT) != (i == 0)) return false;  // exactly one root, first
        if (op->type == OP_IDS) {
            // 0 would stay root; UINT32_MAX is "leave it as it is" to setresuid(2), which is root as well.
            if (op->a - 1 >= UINT32_MAX - 1 || op->b - 1 >= UINT32_MAX - 1) return false;
            ids = true;
        }
        at += op->size;
    }
    if (at != len || head->nops == 0 || !ids) return false;  // a tool that would stay root is no plan
    *shape = (struct shape){head->namespaces, head->nops, (const void *)(msg + sizeof(struct plan_header) + sizeof *head)};
    return true;
}
