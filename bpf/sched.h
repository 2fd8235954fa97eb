/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * What the scheduler shares with the daemon. runtime/agentrun/burst/layout.py reads this very file: keep to plain `type name;` members,
 * and count padding yourself. Times are nanoseconds.
 */
#pragma once
#include <linux/types.h>

/* Calls that can be scheduled at once. */
#define TURNS 16384
/* Bytes of the ring buffer. */
#define SCHED_RING_SIZE 65536
/* Notices of one call: a tool may take itself out and be taken back so often, then it has its will. */
#define LEFT_MOST 8
/* Of a leaf that was given none: the kernel's own for cpu.weight. */
#define WEIGHT_DEFAULT 100

/* What `terms` begin with. */
#define YOUNG_NS 50000000
#define MAX_WAIT_NS 50000000
#define SLICE_NS 5000000

/* Why there is a notice. */
enum notice_why {
    NOTICE_LEFT = 1, /* a task of a call is not scheduled here any more, although it lives */
    NOTICE_EXIT = 2  /* the scheduler has been unloaded or ejected: see struct parting */
};

/* One call, by the id of its leaf: the daemon makes it when the call begins, and removes it when it ends. */
struct turn {
    u64 used_ns; /* processor time since; what is below young_ns goes first */
    u64 vtime;   /* its place among the long ones */
    u32 weight;  /* 1 to 10000, as cpu.weight */
    u32 left;    /* notices that were sent of it */
};

struct notice {
    u64 id;  /* of the leaf */
    u32 why; /* enum notice_why */
    u32 pid;
};

/* Element 0 of `terms`, which the daemon may write at any time. */
struct terms {
    u64 young_ns;    /* processor time after which a call is a long one */
    u64 max_wait_ns; /* a processor that has not served a long one for that long, with one waiting, does so for a slice */
    u64 slice_ns;    /* of a call with the default weight */
};

/* Element 0 of `tally`. */
struct tally {
    u64 young;   /* dispatched ahead of the long ones */
    u64 old;     /* the long ones */
    u64 guarded; /* of these, because they had waited long enough */
    u64 kicks;   /* long ones interrupted for a young one */
    u64 foreign; /* tasks with the policy that belong to no call */
};

/* Element 0 of `parting`: how it ended, in the kernel's words. */
struct parting {
    s64 code;
    u32 kind; /* enum scx_exit_kind; 0 while it runs */
    u32 padding;
    char reason[64];
    char message[128];
};
