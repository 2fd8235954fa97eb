/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* Nothing here depends on the version; since Linux 5.0 the kernel does not compare it either. */
#pragma once
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + ((c) > 255 ? 255 : (c)))
#define LINUX_VERSION_CODE KERNEL_VERSION(6, 1, 0)
