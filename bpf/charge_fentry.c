// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
// Charges of the memory controller, by fentry: the cheapest way in. Needs the controller, BTF and BPF trampolines.
#include "charge.h"

struct page_counter;
KFUNC_PROBE(page_counter_try_charge, struct page_counter *counter, unsigned long pages)
{
    return charged((u64)counter, pages);
}
