// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
// How long each phase of a sandbox takes, from the making of its leaf to its removal.
//
// A record is kept for each sandbox, by the id of its leaf, and added to the histograms once, when the leaf is removed. So a system call
// costs one look-up, histograms need neither per-CPU copies nor locks, and a call can be asked for its own phases while it lives.
//
// Whose is a system call? A task in a leaf that was made by the daemon, or registered by it, works for that leaf until it has become
// the tool. A zygote is no member of a leaf: what it does is kept under the pid of the init it clones, and the first system call of
// that init inside the leaf brings the two together. What it does without one is its template, made once for all its sandboxes.
//
// Tracepoints of single system calls instead of raw sys_enter and sys_exit: measured, the raw pair makes every system call of the
// machine 200 ns longer, these all but the traced ones 36 ns. So nothing that tools call all the time is traced, but write.
#include "phases.h"

enum landlock_rule_type { LANDLOCK_RULE_ANY_ }; /* the type of an argument, as tracefs describes it */

BPF_HASH(calls, u64, struct call, CALLS);
BPF_HASH(zygotes, u32, struct call, ZYGOTES);
BPF_HASH(cold, u64, u8, CALLS); /* leaves of sandboxes that a call waited for */
BPF_TABLE("lru_hash", u32, struct call, births, 1024); /* pid of an init -> what its zygote did for it */
BPF_TABLE("lru_hash", u32, u64, starts, 8192);         /* task of a container -> when its system call began */
BPF_F_TABLE("array", u32, struct histogram, histograms, HISTOGRAMS, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct daemon, daemon, 1, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct counted, counted, 1, BPF_F_MMAPABLE);

#define NEW_NAMESPACES 0x7e020080ull /* CLONE_NEWNS, CGROUP, UTS, IPC, USER, PID, NET, and TIME */
#define CLONE_PARENT_ 0x00008000ull

static __always_inline void lose(void)
{
    u32 zero = 0;
    struct counted *count = counted.lookup(&zero);
    if (count) __sync_fetch_and_add(&count->lost, 1);
}

// Eighths of a microsecond, then eight slots for each doubling: as much as 12 % apart.
static __always_inline u32 slot_of(u64 ns)
{
    u64 v = ns / 125;
    if (v < 8) return v;
    u32 exponent = bpf_log2l(v) - 1, slot;
    if (exponent > 30) return SLOTS - 1;
    slot = 8 * (exponent - 2) + ((v >> (exponent - 3)) & 7);
    return slot < SLOTS ? slot : SLOTS - 1;
}

static __always_inline void add(struct call *call, u32 phase, u64 ns)
{
    call->ns[phase] += ns;
    call->seen |= 1u << phase;
}

// Add a record to the histograms.
static __always_inline void count(struct call *call, u32 kind)
{
    u32 row = (call->shape * KINDS + kind) * PHASES;
#pragma unroll // 6.1 does not take every loop that clang makes of this
    for (u32 phase = 0; phase < PHASES; phase++) {
        if (!(call->seen & 1u << phase)) continue;
        u32 at = row + phase, slot = slot_of(call->ns[phase]);
        struct histogram *histogram = histograms.lookup(&at);
        if (!histogram || slot >= SLOTS) {
            lose();
            continue;
        }
        __sync_fetch_and_add(&histogram->slots[slot], 1);
        __sync_fetch_and_add(&histogram->sum_ns, call->ns[phase]);
    }
}

// ---------------------------------------------------------------- whose

// The pid of the current process as the daemon sees it; 0 if it is in another pid namespace, as all sandboxes are.
static __always_inline u32 daemon_pid(void)
{
    struct bpf_pidns_info info = {};
    return bpf_get_ns_current_pid_tgid(PIDNS_DEV, PIDNS_INO, &info, sizeof(info)) ? 0 : info.tgid;
}

static __always_inline struct call *current_zygote(void)
{
    u32 pid = daemon_pid();
    return pid ? zygotes.lookup(&pid) : NULL;
}

static __always_inline struct call *current_sandbox(void)
{
    u64 id = bpf_get_current_cgroup_id();
    return calls.lookup(&id);
}

// The record of whatever sets a sandbox up in this task.
static __always_inline struct call *worker(void)
{
    struct call *call = current_sandbox();
    if (call) return call->progress & DID_EXEC ? NULL : call;
    return current_zygote();
}

// Where what a worker has done is put down.
static __always_inline struct call *account(struct call *call)
{
    u32 pid;
    if (call->kind == KIND_TEMPLATE) {
        pid = call->main;
        if (pid) return births.lookup(&pid);
        return call->progress & DID_JOIN ? NULL : call; // later it makes user namespaces for workspaces
    }
    if (call->progress & DID_JOIN) return call;
    pid = bpf_get_current_pid_tgid();
    struct call *birth = births.lookup(&pid);
    if (birth) {
#pragma unroll
        for (u32 phase = 0; phase < PHASES; phase++) call->ns[phase] += birth->ns[phase];
        call->seen |= birth->seen;
        call->shape = birth->shape;
        call->progress |= DID_JOIN;
        births.delete(&pid);
    }
    return call;
}

// ---------------------------------------------------------------- spans: system calls from entry to return

// A sandbox of ours is set up by one task after the other: when a system call began is in its record. What sets a container up may
// be many threads, of which two can find the record free at the same moment: each has a place of its own.
static __always_inline void begin(struct call *call)
{
    u32 task = bpf_get_current_pid_tgid();
    u64 now = bpf_ktime_get_ns();
    if (call->kind != KIND_COLD && (!call->busy || call->busy == task)) {
        if (call->busy) lose(); // the last one's end
        call->busy = task;
        call->busy_ns = now;
    } else if (starts.insert(&task, &now)) {
        lose();
        starts.update(&task, &now);
    }
}

// Nanoseconds since the current task's `begin`, or 0.
static __always_inline u64 end(struct call *call)
{
    u32 task = bpf_get_current_pid_tgid();
    if (call->busy == task) {
        call->busy = 0;
        return bpf_ktime_get_ns() - call->busy_ns;
    }
    u64 *start = starts.lookup(&task), ns;
    if (!start) {
        lose();
        return 0;
    }
    ns = bpf_ktime_get_ns() - *start;
    starts.delete(&task);
    return ns;
}

static __always_inline int enter(void)
{
    struct call *call = worker();
    if (call) begin(call);
    return 0;
}

static __always_inline int leave(u32 phase)
{
    struct call *call = worker();
    if (!call) return 0;
    u64 ns = end(call);
    struct call *to = account(call);
    if (to && ns) add(to, phase, ns);
    return 0;
}

#define SPAN(name, phase)                                                        \
    TRACEPOINT_PROBE(syscalls, sys_enter_##name) { return enter(); }             \
    TRACEPOINT_PROBE(syscalls, sys_exit_##name) { return leave(phase); }

SPAN(unshare, PHASE_NAMESPACES)
SPAN(mount, PHASE_MOUNTS)
SPAN(umount, PHASE_MOUNTS)
SPAN(move_mount, PHASE_MOUNTS)
SPAN(open_tree, PHASE_MOUNTS)
SPAN(mount_setattr, PHASE_MOUNTS)
SPAN(fsopen, PHASE_MOUNTS)
SPAN(fsconfig, PHASE_MOUNTS)
SPAN(fsmount, PHASE_MOUNTS)
SPAN(pivot_root, PHASE_PIVOT_ROOT)
#ifndef NO_LANDLOCK
SPAN(landlock_create_ruleset, PHASE_LANDLOCK)
SPAN(landlock_add_rule, PHASE_LANDLOCK)
SPAN(landlock_restrict_self, PHASE_LANDLOCK)
#endif

TRACEPOINT_PROBE(syscalls, sys_enter_seccomp) { return enter(); }

TRACEPOINT_PROBE(syscalls, sys_exit_seccomp)
{
    struct call *call = worker();
    leave(PHASE_SECCOMP);
    if (!call || call->kind == KIND_TEMPLATE || !call->began_ns) return 0;
    call->ns[PHASE_SETUP] = bpf_ktime_get_ns() - call->began_ns;
    call->seen |= 1u << PHASE_SETUP;
    return 0;
}

// ---------------------------------------------------------------- the leaf

TRACEPOINT_PROBE(syscalls, sys_enter_mkdirat)
{
    u32 zero = 0, pid;
    struct daemon *own = daemon.lookup(&zero);
    if (!own || !own->pid || daemon_pid() != own->pid) return 0;
    pid = bpf_get_current_pid_tgid();
    if (pid != bpf_get_current_pid_tgid() >> 32) return 0; // leaves are made by its main thread
    own->made = 0;
    own->made_ns = bpf_ktime_get_ns();
    return 0;
}

TRACEPOINT_PROBE(cgroup, cgroup_mkdir)
{
    u32 zero = 0;
    struct daemon *own = daemon.lookup(&zero);
    if (!own || !own->made_ns || args->root || args->level != own->level || daemon_pid() != own->pid) return 0;
    own->made = args->id;
    return 0;
}

TRACEPOINT_PROBE(syscalls, sys_exit_mkdirat)
{
    u32 zero = 0;
    struct daemon *own = daemon.lookup(&zero);
    if (!own || !own->made || daemon_pid() != own->pid) return 0;
    u64 id = own->made;
    struct call call = {.began_ns = own->made_ns, .kind = KIND_WARM};
    add(&call, PHASE_CGROUP_MKDIR, bpf_ktime_get_ns() - own->made_ns);
    own->made = own->made_ns = 0;
    if (calls.update(&id, &call)) lose();
    return 0;
}

TRACEPOINT_PROBE(cgroup, cgroup_rmdir)
{
    u64 id = args->id;
    u32 zero = 0, kind;
    if (args->root) return 0;
    struct call *call = calls.lookup(&id);
    if (!call) {
        cold.delete(&id);
        return 0;
    }
    if (call->progress & DID_EXIT) add(call, PHASE_TEARDOWN, bpf_ktime_get_ns() - call->exit_ns);
    kind = call->kind;
    if (cold.lookup(&id)) {
        kind = KIND_COLD;
        cold.delete(&id);
    }
    count(call, kind);
    calls.delete(&id);
    struct counted *all = counted.lookup(&zero);
    if (all) __sync_fetch_and_add(&all->calls, 1);
    return 0;
}

// ---------------------------------------------------------------- clones

static __always_inline int enter_clone(u64 flags)
{
    struct call *call = worker();
    if (!call) return 0;
    call->flags = flags;
    begin(call);
    return 0;
}

static __always_inline int leave_clone(long child)
{
    if (!child) return 0; // the child: it began nothing
    struct call *call = worker();
    if (!call) return 0;
    u64 ns = end(call);
    struct call *to = account(call);
    if (to && ns) add(to, call->flags & NEW_NAMESPACES ? PHASE_NAMESPACES : PHASE_CLONE, ns);
    if (call->step == STEP_INIT_FORKED) call->step = STEP_MAPPING;
    else if (call->step == STEP_ENTERED) call->step = STEP_RUNNER_CLONED;
    call->since_ns = bpf_ktime_get_ns();
    return 0;
}

TRACEPOINT_PROBE(syscalls, sys_enter_clone) { return enter_clone(args->clone_flags); }
TRACEPOINT_PROBE(syscalls, sys_exit_clone) { return leave_clone(args->ret); }

TRACEPOINT_PROBE(syscalls, sys_enter_clone3)
{
    u64 flags = 0; // the first member of struct clone_args
    bpf_probe_read_user(&flags, sizeof(flags), (void *)args->uargs);
    return enter_clone(flags);
}

TRACEPOINT_PROBE(syscalls, sys_exit_clone3) { return leave_clone(args->ret); }

// A zygote's child exists and does not run yet. Its sandboxes' processes are the daemon's children, its helpers its own.
TRACEPOINT_PROBE(sched, sched_process_fork)
{
    struct call *zygote = current_zygote();
    if (!zygote || !(zygote->flags & CLONE_PARENT_) || !(zygote->flags & NEW_NAMESPACES)) return 0;
    if (!(zygote->progress & DID_JOIN)) {
        zygote->progress |= DID_JOIN;
        count(zygote, KIND_TEMPLATE);
    }
    u32 child = args->child_pid;
    struct call birth = {.shape = zygote->shape};
    if (births.update(&child, &birth)) lose();
    zygote->main = child;
    zygote->step = STEP_INIT_FORKED;
    return 0;
}

// Something is moved into a cgroup: what a zygote does where clone3 is refused.
TRACEPOINT_PROBE(cgroup, cgroup_attach_task)
{
    struct call *zygote = current_zygote();
    if (!zygote || (zygote->step != STEP_MAPPING && zygote->step != STEP_RUNNER_CLONED)) return 0;
    u64 now = bpf_ktime_get_ns();
    struct call *to = account(zygote);
    if (to) add(to, PHASE_ATTACH, now - zygote->since_ns);
    zygote->since_ns = now;
    return 0;
}

TRACEPOINT_PROBE(syscalls, sys_enter_setns)
{
    struct call *call = worker();
    if (!call) return 0;
    if (call->step == STEP_MAPPING) { // between the two it writes the maps, and nothing else
        struct call *to = account(call);
        if (to) add(to, PHASE_ID_MAPS, bpf_ktime_get_ns() - call->since_ns);
        call->step = STEP_ENTERED;
    }
    begin(call);
    return 0;
}

TRACEPOINT_PROBE(syscalls, sys_exit_setns)
{
    struct call *call = worker();
    leave(PHASE_NAMESPACES);
    if (call && call->step == STEP_RUNNER_CLONED) {
        call->step = STEP_NONE;
        call->main = 0;
    }
    return 0;
}

// ---------------------------------------------------------------- the tool

// A thread that executes a program becomes its process's first on the way, and has that one's id when it returns.
TRACEPOINT_PROBE(sched, sched_process_exec)
{
    u32 task = args->pid, old = args->old_pid;
    if (task == old) return 0;
    u64 *start = starts.lookup(&old);
    if (!start) return 0;
    u64 began = *start;
    starts.update(&task, &began);
    starts.delete(&old);
    return 0;
}

TRACEPOINT_PROBE(syscalls, sys_enter_execve) { return enter(); }
TRACEPOINT_PROBE(syscalls, sys_enter_execveat) { return enter(); }

static __always_inline int leave_exec(long error)
{
    struct call *call = current_sandbox();
    if (!call || call->progress & DID_EXEC) return 0;
    u64 ns = end(call);
    if (error || !ns) return 0;
    add(call, PHASE_EXEC, ns);
    call->exec_ns = bpf_ktime_get_ns();
    call->main = bpf_get_current_pid_tgid() >> 32;
    call->progress |= DID_EXEC;
    return 0;
}

TRACEPOINT_PROBE(syscalls, sys_exit_execve) { return leave_exec(args->ret); }
TRACEPOINT_PROBE(syscalls, sys_exit_execveat) { return leave_exec(args->ret); }

static __always_inline void first(struct call *call, u32 did, u32 phase)
{
    if ((call->progress & (DID_EXEC | did)) != DID_EXEC) return;
    call->progress |= did;
    call->ns[phase] = bpf_ktime_get_ns() - call->exec_ns; // not added: two tasks may be here at once
    call->seen |= 1u << phase;
}

static __always_inline int first_syscall(void)
{
    struct call *call = current_sandbox();
    if (call) first(call, DID_SYSCALL, PHASE_FIRST_SYSCALL);
    return 0;
}

// One of these is what the C libraries and Go's runtime start with.
TRACEPOINT_PROBE(syscalls, sys_enter_brk) { return first_syscall(); }
TRACEPOINT_PROBE(syscalls, sys_enter_arch_prctl) { return first_syscall(); }
TRACEPOINT_PROBE(syscalls, sys_enter_sched_getaffinity) { return first_syscall(); }

static __always_inline int first_write(void)
{
    struct call *call = current_sandbox();
    if (!call) return 0;
    first(call, DID_SYSCALL, PHASE_FIRST_SYSCALL);
    first(call, DID_WRITE, PHASE_FIRST_WRITE);
    return 0;
}

TRACEPOINT_PROBE(syscalls, sys_enter_write) { return first_write(); }
TRACEPOINT_PROBE(syscalls, sys_enter_writev) { return first_write(); }

TRACEPOINT_PROBE(sched, sched_process_exit)
{
    u32 task = bpf_get_current_pid_tgid(), pid;
    struct call *call = current_sandbox();
    if (!call) {
        pid = daemon_pid();
        if (pid && zygotes.lookup(&pid)) {
            zygotes.delete(&pid);
            starts.delete(&task);
        }
        return 0;
    }
    if (!(call->progress & DID_EXEC)) { // killed in the middle of something
        if (call->busy == task) call->busy = 0;
        else starts.delete(&task);
    }
    if (call->main != task || (call->progress & (DID_EXEC | DID_EXIT)) != DID_EXEC) return 0;
    call->exit_ns = bpf_ktime_get_ns();
    call->progress |= DID_EXIT;
    add(call, PHASE_RUN, call->exit_ns - call->exec_ns);
    return 0;
}
