/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* What BCC's headers test for; that the running kernel has it is seen when a program loads. */
#pragma once
#define CONFIG_64BIT 1
#define CONFIG_X86_64 1
#define CONFIG_BPF_SYSCALL 1
#define CONFIG_BPF_EVENTS 1
#define CONFIG_PERF_EVENTS 1
