// SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only
// The same by kprobe, where a kernel refuses fentry.
#include <uapi/linux/ptrace.h>
#include "charge.h"

int kprobe__page_counter_try_charge(struct pt_regs *ctx)
{
    return charged(PT_REGS_PARM1(ctx), PT_REGS_PARM2(ctx));
}
