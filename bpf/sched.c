// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
// A sched_ext scheduler that lets calls which have used little processor time go before those which have used much.
//
// It is partial (SCX_OPS_SWITCH_PARTIAL): it has the tasks whose policy is SCHED_EXT and nobody else, which the daemon gives to the
// processes of a sandbox before the call begins and fork(2) hands on. So whatever else the machine runs keeps its scheduler, its
// cpu.weight and its cpu.max; and it goes before all calls, because the kernel puts the class of normal tasks above this one. The
// kernel's own ext_server keeps a twentieth of each processor for this class, so that calls cannot be starved from there.
// Without the scheduler SCHED_EXT means SCHED_NORMAL: when this is unloaded or ejected, the same tasks go on under cpu.weight.
//
// Two queues. YOUNG holds the tasks of calls below young_ns, least used first, and interrupts what is in OLD. OLD shares what is left
// between calls, not tasks, by weight. A processor that has not served OLD for max_wait_ns gives it a slice that YOUNG cannot interrupt:
// with 5 ms in 50 the long calls keep a tenth of it between them, and none of them waits for ever.
//
// Kernel functions are called by the ids that BTF has for them, KF_ defines; probes/sched.py marks the calls before it loads this.
#include "sched.h"

BPF_HASH(turns, u64, struct turn, TURNS); /* cgroup id of the leaf -> its call */
BPF_F_TABLE("array", u32, struct terms, terms, 1, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct tally, tally, 1, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct parting, parting, 1, BPF_F_MMAPABLE);
BPF_RINGBUF_OUTPUT(notices, SCHED_RING_SIZE / 4096);

enum runs { RUNS_NOTHING = 0, RUNS_YOUNG = 1, RUNS_OLD = 2, RUNS_INTERRUPTED = 3 };

struct cpu {
    u64 since;    // its task runs, or was last charged
    u64 served;   // when OLD last had its due here, or nobody was waiting in it
    u64 due;      // what OLD has had since then
    u64 promised; // select_cpu found it idle
    u32 runs;     // enum runs
    u32 guarded;  // its task is from OLD, and is not to be interrupted
    u32 ahead;    // its task's call has been charged for a slice when it was queued
    u32 padding;
};
BPF_ARRAY(cpus, struct cpu, CPUS);

struct global {
    u64 vtime; // the furthest place in OLD that has been served
};
BPF_ARRAY(globals, struct global, 1);

// On the stack of an `enqueue`.
struct insert_vtime {
    u64 dsq;
    u64 slice;
    u64 vtime;
    u64 flags;
};

#define YOUNG 1
#define OLD 2
#define PF_EXITING 0x4
#define PROMISE_NS 1000000ull

#define create_dsq(id) ((u64(*)(u64, s32))KF_create_dsq)(id, -1)
#define insert_into(p, args) ((u64(*)(u64, void *))KF_insert_vtime)(p, args)
#define move_from(id) (((u64(*)(u64, u64))KF_move_to_local)(id, 0) & 1)
#define queued(id) ((s32)((u64(*)(u64))KF_nr_queued)(id))
#define kick(cpu, how) ((u64(*)(s32, u64))KF_kick_cpu)(cpu, how)
#define cpu_of(p) ((s32)((u64(*)(u64))KF_task_cpu)(p))
#define pick_idle(mask) ((s32)((u64(*)(u64, u64))KF_pick_idle_cpu)(mask, 0))
#define default_cpu(p, prev, flags, idle) ((s32)((u64(*)(u64, s32, u64, void *))KF_select_cpu_dfl)(p, prev, flags, idle))
#define set_slice(p, ns) ((u64(*)(u64, u64))KF_set_slice)(p, ns)
#define allows(mask, cpu) (((u64(*)(u32, u64))KF_cpumask_test_cpu)(cpu, mask) & 1)

// What a kernel function takes must be a pointer the verifier has followed; bpf_probe_read_kernel would make a number of it.
#define FOLLOW(pointer, offset)                                                                     \
    ({                                                                                              \
        u64 followed_;                                                                              \
        asm volatile("%0 = *(u64 *)(%1 + %2)" : "=r"(followed_) : "r"(pointer), "i"(offset));       \
        followed_;                                                                                  \
    })

struct args {
    u64 at[4];
};

static __always_inline u64 word_at(u64 address)
{
    u64 value = 0;
    bpf_probe_read_kernel(&value, sizeof(value), (void *)address);
    return value;
}

// The call a task works for; also if the tool has made cgroups below its leaf.
static __always_inline struct turn *turn_of(u64 p, u64 *identity)
{
    u64 cgroup = word_at(word_at(p + OFF_CGROUPS) + OFF_DFL_CGRP);
    for (u32 level = 0; level < 4; level++) {
        u64 id = word_at(word_at(cgroup + OFF_KN) + OFF_ID);
        struct turn *turn = turns.lookup(&id);
        if (turn) {
            *identity = id;
            return turn;
        }
        u64 parent = word_at(cgroup + OFF_SELF + OFF_PARENT);
        if (!parent) break;
        cgroup = word_at(parent + OFF_CGROUP);
    }
    return NULL;
}

static __always_inline struct terms *terms_now(void)
{
    u32 zero = 0;
    return terms.lookup(&zero);
}

static __always_inline struct tally *tally_now(void)
{
    u32 zero = 0;
    return tally.lookup(&zero);
}

static __always_inline struct cpu *this_cpu(void)
{
    u32 number = bpf_get_smp_processor_id();
    return cpus.lookup(&number);
}

static __always_inline u64 weighed(u64 ns, struct turn *turn)
{
    return turn && turn->weight ? ns * WEIGHT_DEFAULT / turn->weight : ns;
}

static __always_inline bool before(u64 a, u64 b)
{
    return (s64)(a - b) < 0;
}

// What a task has used since it was last looked at counts for its call. True if that is a long one now.
static __always_inline bool charge(struct cpu *cpu, struct turn *turn, struct terms *is, u64 now)
{
    u64 ns = before(cpu->since, now) ? now - cpu->since : 0;
    cpu->since = now;
    if (cpu->runs >= RUNS_OLD) cpu->due += ns;
    if (!turn) return true;
    __sync_fetch_and_add(&turn->used_ns, ns);
    if (turn->used_ns < is->young_ns) return false;
    __sync_fetch_and_add(&turn->vtime, weighed(ns, turn));
    return true;
}

// A young task waits: take a processor from a long one, the one it would run on if that is such a one.
static __always_inline void interrupt(u64 p, u64 now)
{
    u64 mask = FOLLOW(p, OFF_CPUS_PTR);
    u32 first = cpu_of(p);
    if (first >= CPUS) return;
    struct cpu *cpu = cpus.lookup(&first);
    if (!cpu || now - cpu->promised < PROMISE_NS) return; // it was idle, and comes for it
    for (u32 i = 0; i < CPUS; i++) {
        u32 number = first + i < CPUS ? first + i : first + i - CPUS;
        cpu = cpus.lookup(&number);
        if (!cpu || cpu->runs != RUNS_OLD || cpu->guarded || !allows(mask, number)) continue;
        cpu->runs = RUNS_INTERRUPTED;
        kick(number, SCX_KICK_PREEMPT);
        struct tally *count = tally_now();
        if (count) __sync_fetch_and_add(&count->kicks, 1);
        return;
    }
}

// s32 select_cpu(p, prev_cpu, wake_flags): the kernel's choice. Nothing is dispatched from here, so that all goes through the queues.
int agentrun_select_cpu(struct args *ctx)
{
    bool idle = false;
    u64 p = ctx->at[0];
    s32 number = default_cpu(p, ctx->at[1], ctx->at[2], &idle);
    u32 key = number;
    struct cpu *cpu = cpus.lookup(&key);
    if (cpu && idle) cpu->promised = bpf_ktime_get_ns();
    return number;
}

// void enqueue(p, enq_flags)
int agentrun_enqueue(struct args *ctx)
{
    u32 zero = 0;
    u64 p = ctx->at[0], flags = ctx->at[1], id = 0, now = bpf_ktime_get_ns();
    struct terms *is = terms_now();
    struct tally *count = tally_now();
    struct global *all = globals.lookup(&zero);
    struct turn *turn = turn_of(p, &id);
    struct insert_vtime into = {.dsq = OLD, .slice = SCX_SLICE_DFL, .flags = flags};
    if (!is || !all || !count) return 0; // arrays have their elements; the verifier does not know
    if (turn && turn->used_ns < is->young_ns) {
        into.dsq = YOUNG;
        into.slice = is->slice_ns;
        into.vtime = weighed(turn->used_ns, turn);
        insert_into(p, &into);
        __sync_fetch_and_add(&count->young, 1);
        interrupt(p, now);
    } else {
        into.vtime = all->vtime;
        into.slice = is->slice_ns;
        if (turn) {
            // What it did not use while it slept is not saved up, but for one slice.
            u64 least = all->vtime - is->slice_ns;
            if (before(turn->vtime, least)) turn->vtime = least;
            into.vtime = turn->vtime;
            // Between two tasks the queue takes turns whatever their places, so weight is in the slice as well.
            into.slice = is->slice_ns * turn->weight / WEIGHT_DEFAULT;
            if (into.slice < is->slice_ns / 5) into.slice = is->slice_ns / 5;
            if (into.slice > is->slice_ns * 4) into.slice = is->slice_ns * 4;
            // Charged ahead, or a call with a hundred tasks would get a hundred slices for its one place; `stopping` corrects it.
            __sync_fetch_and_add(&turn->vtime, is->slice_ns);
        } else {
            __sync_fetch_and_add(&count->foreign, 1);
        }
        insert_into(p, &into);
        __sync_fetch_and_add(&count->old, 1);
    }
    if (!(flags & SCX_ENQ_WAKEUP)) {
        // It was not woken, so nobody looked whether a processor is idle.
        s32 number = pick_idle(FOLLOW(p, OFF_CPUS_PTR));
        if (number >= 0) kick(number, SCX_KICK_IDLE);
    }
    return 0;
}

// void dispatch(cpu, prev): the processor has nothing to run.
int agentrun_dispatch(struct args *ctx)
{
    u32 number = ctx->at[0];
    u64 prev = ctx->at[1], id = 0, now = bpf_ktime_get_ns();
    struct cpu *cpu = cpus.lookup(&number);
    struct terms *is = terms_now();
    struct tally *count = tally_now();
    if (!cpu || !is || !count) return 0;
    if (!queued(OLD)) cpu->served = now;
    if (before(cpu->served + is->max_wait_ns, now) && move_from(OLD)) {
        cpu->guarded = 1;
        cpu->due = 0;
        cpu->served = now;
        __sync_fetch_and_add(&count->guarded, 1);
        return 0;
    }
    if (move_from(YOUNG)) return 0;
    if (prev && (u32)word_at(prev + OFF_SCX + OFF_FLAGS) & SCX_TASK_QUEUED) {
        struct turn *turn = turn_of(prev, &id);
        if (turn && turn->used_ns < is->young_ns) {
            set_slice(prev, is->slice_ns); // the long ones wait for it still
            return 0;
        }
    }
    move_from(OLD);
    return 0;
}

// void running(p)
int agentrun_running(struct args *ctx)
{
    u32 zero = 0;
    u64 p = ctx->at[0], id = 0;
    struct cpu *cpu = this_cpu();
    struct terms *is = terms_now();
    struct global *all = globals.lookup(&zero);
    struct turn *turn = turn_of(p, &id);
    if (!cpu || !is || !all) return 0;
    cpu->since = bpf_ktime_get_ns();
    cpu->promised = 0;
    cpu->ahead = 0;
    if (turn && turn->used_ns < is->young_ns) {
        cpu->runs = RUNS_YOUNG;
        cpu->guarded = 0;
        return 0;
    }
    cpu->runs = RUNS_OLD;
    if (!turn) return 0;
    cpu->ahead = 1;
    u64 place = word_at(p + OFF_SCX + OFF_DSQ_VTIME);
    if (before(all->vtime, place)) all->vtime = place;
    return 0;
}

// void tick(p): a task that is alone is never put back into a queue, so its account is kept here as well.
int agentrun_tick(struct args *ctx)
{
    u64 p = ctx->at[0], id = 0, now = bpf_ktime_get_ns();
    struct cpu *cpu = this_cpu();
    struct terms *is = terms_now();
    struct turn *turn = turn_of(p, &id);
    if (!cpu || !is) return 0;
    if (!charge(cpu, turn, is, now)) return 0;
    if (cpu->runs == RUNS_YOUNG) cpu->runs = RUNS_OLD;
    if (cpu->guarded && cpu->due >= is->slice_ns) cpu->guarded = 0;
    if (!cpu->guarded && queued(YOUNG)) set_slice(p, 0);
    return 0;
}

// void stopping(p, runnable)
int agentrun_stopping(struct args *ctx)
{
    u64 p = ctx->at[0], id = 0, now = bpf_ktime_get_ns();
    bool runnable = ctx->at[1];
    struct cpu *cpu = this_cpu();
    struct terms *is = terms_now();
    struct turn *turn = turn_of(p, &id);
    if (!cpu || !is) return 0;
    charge(cpu, turn, is, now);
    if (turn && cpu->ahead) __sync_fetch_and_add(&turn->vtime, -is->slice_ns);
    if (cpu->due >= is->slice_ns) {
        cpu->due = 0;
        cpu->served = now;
    }
    cpu->runs = RUNS_NOTHING;
    cpu->guarded = cpu->ahead = 0;
    // Interrupted by a normal task: back into the queue, where any processor finds it, not to the head of this one's own.
    if (runnable) set_slice(p, 0);
    return 0;
}

// void disable(p): it is no longer ours. A tool can do that to itself, and the daemon may take it back. It is so as well when the task
// ends, and when the scheduler does; in the latter case the daemon finds that its policy is still the same.
int agentrun_disable(struct args *ctx)
{
    u64 p = ctx->at[0], id = 0;
    if ((u32)word_at(p + OFF_TASK_FLAGS) & PF_EXITING) return 0;
    struct turn *turn = turn_of(p, &id);
    if (!turn || turn->left >= LEFT_MOST) return 0; // there must be room in the ring for how it ends
    turn->left++;
    struct notice notice = {.id = id, .why = NOTICE_LEFT, .pid = (u32)word_at(p + OFF_PID)};
    notices.ringbuf_output(&notice, sizeof(notice), 0);
    return 0;
}

// Processors come and go; there is nothing to do about it, and without these the kernel would unload us.
int agentrun_cpu_online(struct args *ctx) { return 0; }
int agentrun_cpu_offline(struct args *ctx) { return 0; }

// s32 init(void), which may sleep
int agentrun_init(struct args *ctx)
{
    struct terms *is = terms_now();
    if (is) {
        is->young_ns = YOUNG_NS;
        is->max_wait_ns = MAX_WAIT_NS;
        is->slice_ns = SLICE_NS;
    }
    s32 error = create_dsq(YOUNG);
    return error ? error : (s32)create_dsq(OLD);
}

// void exit(scx_exit_info)
int agentrun_exit(struct args *ctx)
{
    u32 zero = 0;
    u64 info = ctx->at[0];
    struct parting *said = parting.lookup(&zero);
    struct notice notice = {.why = NOTICE_EXIT};
    if (!said) return 0;
    said->code = word_at(info + OFF_EXIT_CODE);
    bpf_probe_read_kernel_str(said->reason, sizeof(said->reason), (void *)word_at(info + OFF_REASON));
    bpf_probe_read_kernel_str(said->message, sizeof(said->message), (void *)word_at(info + OFF_MSG));
    said->kind = word_at(info + OFF_KIND);
    notices.ringbuf_output(&notice, sizeof(notice), 0);
    return 0;
}
