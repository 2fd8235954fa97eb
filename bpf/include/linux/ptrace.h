/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
#pragma once
/* Registers as the x86-64 kernel saves them: arch/x86/include/asm/ptrace.h. */
struct pt_regs {
    unsigned long r15, r14, r13, r12, bp, bx, r11, r10, r9, r8, ax, cx, dx, si, di, orig_ax, ip, cs, flags, sp, ss;
};
