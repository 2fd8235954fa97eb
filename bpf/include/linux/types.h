/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* The integer types that BCC's own headers and our programs name. */
#pragma once

typedef unsigned char __u8;
typedef signed char __s8;
typedef unsigned short __u16;
typedef short __s16;
typedef unsigned int __u32;
typedef int __s32;
typedef unsigned long long __u64;
typedef long long __s64;
typedef __u8 u8;
typedef __s8 s8;
typedef __u16 u16;
typedef __s16 s16;
typedef __u32 u32;
typedef __s32 s32;
typedef __u64 u64;
typedef __s64 s64;
typedef __u16 __be16;
typedef __u16 __le16;
typedef __u32 __be32;
typedef __u64 __be64;
typedef __u32 __wsum;
typedef __u16 __sum16;
#define __aligned_u64 __u64 __attribute__((aligned(8)))

typedef _Bool bool;
enum { false = 0, true = 1 };
typedef unsigned long size_t;
typedef long ssize_t;
typedef unsigned long uintptr_t;
typedef long intptr_t;
typedef int pid_t;
typedef unsigned uid_t;
typedef unsigned gid_t;
typedef unsigned gfp_t;
typedef unsigned dev_t;
typedef unsigned fmode_t;
typedef unsigned short umode_t;
typedef unsigned short sa_family_t;
typedef unsigned long sector_t;
typedef unsigned long pgoff_t;
typedef long long loff_t;
typedef long long ktime_t;

#define NULL ((void *)0)
#define TASK_COMM_LEN 16
#ifndef __always_inline
#define __always_inline inline __attribute__((always_inline))
#endif
#ifndef offsetof
#define offsetof(type, member) __builtin_offsetof(type, member)
#endif
