/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * The memory controller's own account, seen as it is charged. page_counter_try_charge() is reached once for each batch of 64
 * pages a CPU takes from a memory cgroup (MEMCG_CHARGE_BATCH), for anonymous memory, page cache, tmpfs, huge pages, kernel memory and
 * sockets alike. The OFF_ offsets are the running kernel's, from its BTF.
 */
#pragma once
#include <asm/page.h>
#include "judge.h"

static __always_inline u64 word_at(u64 address)
{
    u64 value = 0;
    bpf_probe_read_kernel(&value, sizeof(value), (void *)address);
    return value;
}

static __always_inline int charged(u64 counter, u64 pages)
{
    /* The counter is a member of its cgroup's struct mem_cgroup. Of other counters (swap) this reads something that is no leaf's id. */
    u64 cgroup = word_at(counter - OFF_MEMORY + OFF_CGROUP);
    u64 id = word_at(word_at(cgroup + OFF_KN) + OFF_ID);
    u32 *slot = slots.lookup(&id);
    if (!slot) return 0;
    u32 number = *slot;
    struct leaf *leaf = leaves.lookup(&number);
    if (!leaf || !leaf->armed) return 0;
    u64 usage = (word_at(counter + OFF_USAGE) + pages) << PAGE_SHIFT, cache = leaf->discount;
    usage = usage > cache ? usage - cache : 0;
    /* Not every charge is made by a task of the leaf: reclaim and network interrupts charge as well. */
    judge(leaf, number, usage, bpf_get_current_ancestor_cgroup_id(leaf->level) == id);
    return 0;
}
