/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * What the program that records phases shares with the daemon. runtime/agentrun/burst/layout.py reads this very file: keep to plain
 * `type name;` members, and count padding yourself.
 *
 * Durations are nanoseconds where they are kept, and eighths of a microsecond where they are counted: see `slot_of` in phases.c.
 */
#pragma once
#include <linux/types.h>

/* Sandboxes that can be watched at once, and zygotes. */
#define CALLS 8192
#define ZYGOTES 64
/* Numbers of shapes; the last is everything beyond. */
#define SHAPES 32
/* Slots of a histogram: eight in each octave of microseconds, up to 2^28 of them. */
#define SLOTS 232
/* shape * KINDS * PHASES + kind * PHASES + phase. */
#define HISTOGRAMS 1440
#define KINDS 3
#define PHASES 15

/* In the order they are shown in, which is about that in which they happen. */
enum phase {
    PHASE_SETUP = 0,        /* from making the leaf to the loaded filter, all in all */
    PHASE_CGROUP_MKDIR = 1, /* making the leaf */
    PHASE_NAMESPACES = 2,   /* clone with namespaces, unshare, setns */
    PHASE_CLONE = 3,        /* clone without, into the leaf where clone3 can do that */
    PHASE_ATTACH = 4,       /* moving what was cloned into its leaf, where it cannot */
    PHASE_ID_MAPS = 5,      /* writing uid_map and gid_map */
    PHASE_MOUNTS = 6,       /* every call of either mount interface */
    PHASE_PIVOT_ROOT = 7,
    PHASE_LANDLOCK = 8,     /* ruleset, rules, restrict_self: the last two are on the way of the call */
    PHASE_SECCOMP = 9,      /* loading the filter */
    PHASE_EXEC = 10,        /* execve, until it returns in the new program */
    PHASE_FIRST_SYSCALL = 11, /* from there to the first thing the program asks of the kernel */
    PHASE_FIRST_WRITE = 12, /* from there to the first write of anything in the sandbox */
    PHASE_RUN = 13,         /* from there to the exit of the program */
    PHASE_TEARDOWN = 14     /* from there to the removal of the leaf */
};

enum kind {
    KIND_WARM = 0,
    KIND_COLD = 1,     /* a call waited for it; in a record, it is a container of another runtime */
    KIND_TEMPLATE = 2  /* what a zygote does once, for all its sandboxes */
};

enum progress {
    DID_JOIN = 1, /* what the zygote did for it has been added; of a zygote: its template is done */
    DID_EXEC = 2,
    DID_SYSCALL = 4,
    DID_WRITE = 8,
    DID_EXIT = 16
};

/* What a zygote is at: steps of making one sandbox. */
enum step { STEP_NONE = 0, STEP_INIT_FORKED = 1, STEP_MAPPING = 2, STEP_ENTERED = 3, STEP_RUNNER_CLONED = 4 };

/* One sandbox; or what a zygote does for all of its, or for one that has not been seen in its leaf yet. */
struct call {
    u64 began_ns; /* its leaf was begun, or it was registered */
    u64 exec_ns;
    u64 exit_ns;
    u64 since_ns; /* of a zygote: when its step began */
    u64 flags;    /* of the clone under way */
    u32 shape;
    u32 kind;
    u32 progress;
    u32 seen;     /* bits of the phases that have a value */
    u32 main;     /* the process that became the tool; of a zygote, the init being made */
    u32 step;     /* of a zygote */
    u32 busy;     /* the task that is in a system call, if it is a sandbox of ours; else see `starts` */
    u32 padding;
    u64 busy_ns;  /* since when */
    u64 ns[15];   /* PHASES */
};

struct histogram {
    u64 sum_ns;
    u64 slots[232]; /* SLOTS */
};

/* Element 0 of `daemon`: the first part is the daemon's to write. */
struct daemon {
    u32 pid;
    u32 level;     /* of leaves in the cgroup tree; the root's children are 1 */
    u64 made;      /* the leaf its mkdirat has just made */
    u64 made_ns;   /* when that began */
};

/* Element 0 of `counted`. */
struct counted {
    u64 calls; /* sandboxes that have been added to the histograms */
    u64 lost;  /* beginnings without an end, ends without a beginning, and whatever did not fit into a map */
};
