// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
// A memory controller for hosts that have none: every page of memory remembers which leaf asked for it.
//
// Two bytes for each page of the machine say whose it is. A page counts for the leaf whose task allocated it until it is freed, by
// whomever: so a page shared after fork(2) counts once, and what is written to tmpfs counts although no process maps it. Page cache of
// files on disk is let go when it becomes that: the kernel can drop or write it back. Pages that the kernel moves (compaction,
// khugepaged) leave the account.
//
// What makes it cheap enough for every page: each CPU remembers which leaf the task it runs belongs to, and judges once in BATCH pages;
// of a leaf that has used up its memory already, at every page, or each process of a fork tree would have a batch before it is hit.
// Raw tracepoints pass pointers to struct page, 64 bytes apart; modulo a power of two that spans all of memory they number the
// pages without knowing where the kernel put its memory map.
#include <asm/page.h>
#include "judge.h"

struct cpu {
    u32 task;       // that this CPU ran last
    u32 generation; // of the settings when it was looked up
    u32 slot;       // its leaf, or 0
    s32 pending;    // pages that are in no account yet
    u64 page;       // the last allocation
    u32 order;
    s32 batch;      // pages between two looks at the leaf
};
BPF_PERCPU_ARRAY(cpus, struct cpu, 1);
BPF_ARRAY(owners, u64, PAGES / 4); // 16 bits a page

#define ONE 0x0001000100010001ull
#define MOST_QUADS 128 // a huge page of 2 MiB

static __always_inline u32 page_number(u64 page)
{
    return (page >> 6) & (PAGES - 1);
}

// Give `1 << order` pages to a leaf.
static __always_inline void give(u32 number, u32 order, u32 slot)
{
    u32 quad = number >> 2;
    if (order < 2) {
        u64 *four = owners.lookup(&quad);
        if (!four) return;
        u16 *owner = (u16 *)four + (number & 3);
        *owner = slot;
        if (order) { // two pages, at an even number
            owner = (u16 *)four + ((number | 1) & 3);
            *owner = slot;
        }
        return;
    }
    u32 quads = 1u << ((order - 2) & 7);
    for (u32 i = 0; i < MOST_QUADS; i++) {
        if (i >= quads) break;
        u32 at = quad + i;
        u64 *four = owners.lookup(&at);
        if (four) *four = slot * ONE;
    }
}

static __always_inline u64 same(u64 a, u64 b)
{
    return ((a ^ b) - 1) >> 63; // 1 or 0, without a branch for the verifier to follow
}

// Take `1 << order` pages from whoever has them: the leaf, and in `taken` how many.
static __always_inline u32 take(u32 number, u32 order, u32 *taken)
{
    u32 quad = number >> 2, slot;
    u64 *four = owners.lookup(&quad);
    if (!four) return 0;
    u16 *owner = (u16 *)four + (number & 3);
    slot = *owner;
    *taken = 1;
    if (order < 2) {
        *owner = 0;
        if (order) {
            owner = (u16 *)four + ((number | 1) & 3);
            *taken += same(*owner, slot);
            *owner = 0;
        }
        return slot;
    }
    u32 quads = 1u << ((order - 2) & 7);
    u64 count = 0;
    for (u32 i = 0; i < MOST_QUADS; i++) {
        if (i >= quads) break;
        u32 at = quad + i;
        four = owners.lookup(&at);
        if (!four) break;
        u64 v = *four;
        if (!v) continue;
        count += same(v & 0xffff, slot) + same(v >> 16 & 0xffff, slot) + same(v >> 32 & 0xffff, slot) + same(v >> 48, slot);
        *four = 0;
    }
    *taken = count;
    return slot;
}

static __always_inline void settle(u32 slot, s32 pages, bool ours)
{
    struct leaf *leaf = leaves.lookup(&slot);
    if (!leaf) return;
    __sync_fetch_and_add(&leaf->pages, (s64)pages);
    s64 sum = leaf->pages;
    if (leaf->armed && sum > 0) judge(leaf, slot, (u64)sum << PAGE_SHIFT, ours);
}

static __always_inline void look_up(struct cpu *cpu, u32 task, struct settings *now)
{
    cpu->task = task;
    cpu->generation = now->generation;
    cpu->slot = 0;
    for (int i = 0; i < 4; i++) {
        if (i >= now->levels) break;
        u64 id = bpf_get_current_ancestor_cgroup_id(now->level[i]);
        u32 *slot = slots.lookup(&id);
        if (slot) {
            struct leaf *leaf = leaves.lookup(slot);
            cpu->slot = *slot;
            cpu->batch = leaf && (leaf->kills || leaf->state & (STATE_EXHAUSTED | STATE_CEILING)) ? 1 : BATCH;
            break;
        }
    }
}

RAW_TRACEPOINT_PROBE(mm_page_alloc)
{
    u64 page = ctx->args[0];
    u32 order = ctx->args[1], gfp = ctx->args[2], zero = 0;
    // User memory is movable, what a task makes the kernel keep for it is accounted; the rest is the kernel's own.
    if (!(gfp & (GFP_MOVABLE | GFP_ACCOUNT)) || !page || order > 9) return 0;
    struct cpu *cpu = cpus.lookup(&zero);
    struct settings *now = settings.lookup(&zero);
    if (!cpu || !now) return 0;
    u32 task = bpf_get_current_pid_tgid();
    if (cpu->task != task || cpu->generation != now->generation) {
        s32 rest = cpu->pending;
        cpu->pending = 0;
        if (rest && cpu->slot) settle(cpu->slot, rest, false);
        look_up(cpu, task, now);
    }
    if (!cpu->slot) return 0;
    give(page_number(page), order, cpu->slot);
    cpu->page = page;
    cpu->order = order;
    cpu->pending += 1 << order;
    if (cpu->pending >= cpu->batch) {
        s32 batch = cpu->pending;
        cpu->pending = 0;
        settle(cpu->slot, batch, true);
    }
    return 0;
}

static __always_inline int freed(u64 page, u32 order)
{
    u32 zero = 0, taken = 0, slot = take(page_number(page), order, &taken);
    if (!slot || !taken) return 0;
    struct cpu *cpu = cpus.lookup(&zero);
    if (!cpu) return 0;
    if (cpu->slot != slot) {
        settle(slot, -(s32)taken, false);
        return 0;
    }
    cpu->pending -= taken;
    if (cpu->pending <= -BATCH) {
        s32 batch = cpu->pending;
        cpu->pending = 0;
        settle(slot, batch, false);
    }
    return 0;
}

RAW_TRACEPOINT_PROBE(mm_page_free)
{
    u32 order = ctx->args[1];
    return order > 9 ? 0 : freed(ctx->args[0], order);
}

// A page of a file on disk; tmpfs does not come by here.
RAW_TRACEPOINT_PROBE(mm_filemap_add_to_page_cache)
{
    u32 zero = 0;
    struct cpu *cpu = cpus.lookup(&zero);
    u64 page = ctx->args[0];
    if (!cpu) return 0;
    return freed(page, cpu->page == page && cpu->order <= 9 ? cpu->order : 0);
}
