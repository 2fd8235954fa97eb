// SPDX-License-Identifier: Apache-2.0
// Capabilities and signal dispositions: what a process of the sandbox may not inherit.
#include "slot.h"
#include <linux/capability.h>
#include <linux/prctl.h>

// linux/securebits.h; each with its lock, the next higher bit.
enum { SECURE_NOROOT_ = 0x3, SECURE_NO_SETUID_FIXUP_ = 0xc, SECURE_KEEP_CAPS_LOCKED_ = 0x20, SECURE_NO_AMBIENT_ = 0xc0 };

// Empty the bounding set, so that nothing executed later can gain a capability; the kernel ends the list with EINVAL.
long bounding_drop_all(void) {
    for (unsigned cap = 0; cap < 64; cap++) {
        long err = sys_prctl(PR_CAPBSET_DROP, cap, 0, 0, 0);
        if (err == -EINVAL && cap > 0) break;
        if (err < 0) return err;
    }
    return sys_prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
}

// Make `mask` the effective and permitted set; the inheritable one is empty.
long capabilities_set(uint64_t mask) {
    struct __user_cap_header_struct header = {_LINUX_CAPABILITY_VERSION_3, 0};
    struct __user_cap_data_struct data[2] = {{(uint32_t)mask, (uint32_t)mask, 0}, {(uint32_t)(mask >> 32), (uint32_t)(mask >> 32), 0}};
    return SYS2(__NR_capset, &header, data);
}

// Root is nobody special, for good: no capability comes from uid 0, from setuid(2) or from ambient sets. capabilities(7).
long securebits_lock(void) {
    return sys_prctl(PR_SET_SECUREBITS, SECURE_NOROOT_ | SECURE_NO_SETUID_FIXUP_ | SECURE_KEEP_CAPS_LOCKED_ | SECURE_NO_AMBIENT_, 0, 0, 0);
}

// A new session keyring instead of the daemon's, and nobody may do anything with it: one for all slots, for each user
// may own few (keyrings(7), /proc/sys/kernel/keys/maxkeys), and no channel between them. Some kernels have no keys.
void keyring_seal(void) {
    long ring = SYS2(__NR_keyctl, 1 /* KEYCTL_JOIN_SESSION_KEYRING */, NULL);
    if (ring > 0) SYS3(__NR_keyctl, 5 /* KEYCTL_SETPERM */, ring, 0);
}

// The daemon is a Python program: it ignores SIGPIPE and may block others, and execve passes both on.
void signals_default(void) {
    struct { void *handler; unsigned long flags; void *restorer; uint64_t mask; } action = {0};
    uint64_t none = 0;
    for (int sig = 1; sig <= 64; sig++) SYS4(__NR_rt_sigaction, sig, &action, NULL, 8);  // KILL and STOP refuse: fine
    SYS4(__NR_rt_sigprocmask, 2 /* SIG_SETMASK */, &none, NULL, 8);
}
