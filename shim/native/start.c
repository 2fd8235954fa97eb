// SPDX-License-Identifier: Apache-2.0
// Where the kernel enters: find argc, argv and the environment on the stack and call program().
#include "sys.h"

void *memset(void *dst, int byte, size_t n) {
    for (char *p = dst; n--;) *p++ = (char)byte;
    return dst;
}

void *memcpy(void *dst, const void *src, size_t n) {
    char *d = dst;
    for (const char *s = src; n--;) *d++ = *s++;
    return dst;
}

int memcmp(const void *a, const void *b, size_t n) {
    const unsigned char *x = a, *y = b;
    for (; n--; x++, y++)
        if (*x != *y) return *x - *y;
    return 0;
}

__attribute__((naked, noreturn)) void _start(void) {
    __asm__("xor %ebp, %ebp\n mov %rsp, %rdi\n and $-16, %rsp\n call start_c\n");
}

__attribute__((noreturn, used)) void start_c(long *stack) {
    int argc = (int)stack[0];
    char **argv = (char **)(stack + 1);
    sys_exit(program(argc, argv, argv + argc + 1));
}
