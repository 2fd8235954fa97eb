/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * A leaf's token bucket, and what is done when it is empty. Included by the programs that see charges.
 *
 * Above its steady budget a leaf spends credit: bytes above, times the time they were above. Below, credit comes back so that a
 * full allowance takes burst_seconds. A fixed window would let twice the allowance through at its seam.
 */
#pragma once
#include "events.h"

BPF_F_TABLE("array", u32, struct leaf, leaves, LEAVES, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct settings, settings, 1, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct counters, counters, 1, BPF_F_MMAPABLE);
BPF_HASH(slots, u64, u32, LEAVES); /* cgroup id -> number of the leaf */
BPF_RINGBUF_OUTPUT(events, RING_SIZE / 4096);
BPF_TABLE("lru_hash", u32, u32, stopped, 1024); /* task that was sent SIGSTOP -> episode of its leaf */

#define SIGKILL_ 9
#define SIGSTOP_ 19

static __always_inline void report(struct leaf *leaf, u32 slot, u64 now, u64 usage, u64 limit, u32 why, u32 act)
{
    u32 zero = 0;
    struct counters *count = counters.lookup(&zero);
    struct event *event = events.ringbuf_reserve(sizeof(struct event));
    if (!event) {
        if (count) __sync_fetch_and_add(&count->lost, 1);
        return;
    }
    if (count) __sync_fetch_and_add(&count->sent, 1);
    event->ns = now;
    event->id = leaf->id;
    event->usage = usage;
    event->limit = limit;
    event->credit = leaf->credit;
    event->slot = slot;
    event->pid = bpf_get_current_pid_tgid() >> 32;
    event->why = why;
    event->act = act;
    bpf_get_current_comm(event->comm, sizeof(event->comm));
    events.ringbuf_submit(event, 0);
}

/* Signal the task that charges. Every other task of the leaf is hit at its own next charge; the daemon sees to the idle ones. */
static __always_inline void strike(struct leaf *leaf, u32 slot, u64 now, u64 usage, u32 act)
{
    u32 task = bpf_get_current_pid_tgid(), episode = leaf->episode;
    int number = SIGKILL_;
    if (act == ACT_STOP) {
        u32 *before = stopped.lookup(&task);
        if (before && *before == episode) {
            /* SIGSTOP waits for the return to user space, which populating memory or a long read is far from: signal(7). */
            if (usage < leaf->struck_usage + STOP_GRACE) return;
            if (!(leaf->state & STATE_UNSTOPPABLE)) {
                leaf->state |= STATE_UNSTOPPABLE;
                report(leaf, slot, now, usage, leaf->steady, WHY_UNSTOPPABLE, ACT_KILL);
            }
        } else {
            stopped.update(&task, &episode);
            number = SIGSTOP_;
        }
    }
    if (bpf_send_signal(number)) return;
    if (number == SIGKILL_) leaf->kills++;
    else leaf->stops++;
    if (!leaf->struck_ns) {
        leaf->struck_ns = now;
        leaf->struck_usage = usage;
    }
}

/* A leaf's memory is `usage` bytes now. `ours`: the task that runs is one of the leaf's. */
static __always_inline void judge(struct leaf *leaf, u32 slot, u64 usage, bool ours)
{
    u64 steady = leaf->steady, before = leaf->usage, state = leaf->state;
    leaf->usage = usage;
    if (usage > leaf->peak) leaf->peak = usage;
    if (leaf->kills) {
        /* It dies as a whole, by the daemon's hand; until that moves, the rest must not go on with what the dead gave back. */
        if (ours && !bpf_send_signal(SIGKILL_)) leaf->kills++;
        return;
    }
    if (usage <= steady && usage <= leaf->ceiling && !state) return;

    u64 now = bpf_ktime_get_ns(), now_us = now / 1000, looked_us = leaf->looked_us;
    u64 elapsed = now_us > looked_us ? now_us - looked_us : 0; /* another CPU, or the daemon, may just have looked */
    if (state & STATE_OVER) {
        if (before > steady) leaf->credit -= ((before - steady) >> 10) * elapsed;
        if (leaf->credit < 0) leaf->credit = 0;
    } else {
        leaf->credit += leaf->burst * elapsed;
        if (leaf->credit > (s64)leaf->capacity || leaf->credit < 0) leaf->credit = leaf->capacity;
    }
    leaf->looked_us = now_us;

    if (usage > steady) {
        if (!(state & STATE_OVER)) {
            leaf->crossed_ns = now;
            leaf->looked = 0;
            leaf->state |= STATE_OVER;
            report(leaf, slot, now, usage, steady, WHY_CROSSED, ACT_NOTIFY);
        }
    } else if (state & STATE_OVER) {
        leaf->state = 0;
        report(leaf, slot, now, usage, steady, WHY_BELOW, ACT_NOTIFY);
    }
    if (usage > leaf->ceiling) {
        if (ours && leaf->on_ceiling != ACT_NOTIFY) strike(leaf, slot, now, usage, leaf->on_ceiling);
        if (!(leaf->state & STATE_CEILING)) {
            leaf->state |= STATE_CEILING;
            report(leaf, slot, now, usage, leaf->ceiling, WHY_CEILING, leaf->on_ceiling);
        }
    } else if (usage > steady && usage - steady > (leaf->looked ? 0 : leaf->slack) && !leaf->credit) {
        if (ours && leaf->on_exhausted != ACT_NOTIFY) strike(leaf, slot, now, usage, leaf->on_exhausted);
        if (!(leaf->state & STATE_EXHAUSTED)) {
            leaf->state |= STATE_EXHAUSTED;
            report(leaf, slot, now, usage, steady, WHY_EXHAUSTED, leaf->on_exhausted);
        }
    }
}
