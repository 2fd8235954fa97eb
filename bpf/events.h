/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * What the burst programs and the daemon share. runtime/agentrun/burst/layout.py reads the structs and enums of this very
 * file, so there is one definition: keep to plain `type name;` members, and count padding yourself.
 *
 * Sizes are bytes, times CLOCK_MONOTONIC. Credit is KiB x microseconds: 4 GiB for a minute are 2^48 of them.
 */
#pragma once
#include <linux/types.h>

/* Leaves that can be watched at once; number 0 is nobody. */
#define LEAVES 16384
/* Bytes of the ring buffer. */
#define RING_SIZE 65536
/* A task that goes on charging after SIGSTOP, when its leaf has so many bytes more, sits in one system call that only death ends. */
#define STOP_GRACE 524288
#define NO_LIMIT 0xffffffffffffffff

enum act { ACT_NOTIFY = 0, ACT_STOP = 1, ACT_KILL = 2 };

/* Why there is an event. Each is sent once for each time it comes true. */
enum why { WHY_CROSSED = 1, WHY_BELOW = 2, WHY_EXHAUSTED = 3, WHY_CEILING = 4, WHY_UNSTOPPABLE = 5 };

/* Bits of leaf.state. */
enum state { STATE_OVER = 1, STATE_EXHAUSTED = 2, STATE_CEILING = 4, STATE_UNSTOPPABLE = 8 };

/* One leaf. The daemon writes the first part before the tool exists, and grants more in it later; the rest is the programs'. */
struct leaf {
    u64 id;           /* cgroup id: the inode number of its directory */
    u64 steady;       /* bytes; above it credit is spent */
    u64 ceiling;      /* bytes; above it on_ceiling */
    u64 burst;        /* bytes x microseconds that come back in a microsecond below steady, KiB */
    u64 capacity;     /* most credit */
    u64 discount;     /* bytes of page cache the kernel can drop: not judged */
    u64 slack;        /* bytes above steady without a signal until the daemon has looked: all of it may be cache */
    u32 level;        /* of its cgroup: the root's children are 1 */
    u32 armed;        /* 0: pages are counted, nothing is judged */
    u32 on_exhausted; /* enum act */
    u32 on_ceiling;   /* enum act */
    u32 episode;      /* changes when stopped tasks are let go */
    u32 looked;       /* the daemon knows that it is above steady, and what of it is cache */
    s64 pages;        /* its own pages, where the programs count them */
    u64 usage;        /* bytes at the last look */
    u64 peak;         /* most bytes since it was armed */
    s64 credit;       /* what is left */
    u64 looked_us;    /* when credit was last worked out */
    u64 crossed_ns;   /* last time above steady */
    u64 struck_ns;    /* first signal */
    u64 struck_usage; /* bytes then */
    u32 state;        /* enum state */
    u32 stops;        /* SIGSTOPs sent to its tasks */
    u32 kills;        /* SIGKILLs */
    u32 padding2;
};

struct event {
    u64 ns;
    u64 id;
    u64 usage;
    u64 limit; /* what was passed */
    s64 credit;
    u32 slot; /* number of the leaf */
    u32 pid;  /* who charged: not necessarily who used most */
    u32 why;
    u32 act;
    char comm[16];
};

/* Element 0 of `settings`, written by the daemon. */
struct settings {
    u32 generation; /* changes whenever a leaf comes or goes: what a CPU remembers of its task is then out of date */
    u32 levels;     /* how many of the following are used */
    u32 level[4];   /* levels of the cgroup tree at which leaves are, besides */
};

/* Element 0 of `counters`. */
struct counters {
    u64 lost; /* events that found the ring buffer full */
    u64 sent;
};
