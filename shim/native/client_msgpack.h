// SPDX-License-Identifier: Apache-2.0
// As much msgpack as one request and one answer need. The reader trusts nothing: the daemon is root, but it may be
// another version, or not the daemon at all.
#pragma once
#include "sys.h"

// A request is at most FRAME_MAX long, an answer ANSWER_MAX: captured output grows when it is written as JSON.
enum { FRAME_MAX = 4 << 20, ANSWER_MAX = 16 << 20 };

// Room for the largest frame costs nothing: it is zero pages until touched. `len` counts on past the end, so that a
// request which does not fit can say its size. One spare byte lets a text at the very end be terminated in place.
struct frame { size_t len; uint8_t bytes[4 + ANSWER_MAX + 1]; };

static inline void put(struct frame *f, const void *data, size_t n) {
    if (f->len + n <= 4 + ANSWER_MAX) memcpy(f->bytes + f->len, data, n);
    f->len += n;
}

// Every header in its 32-bit form: longer than it could be by three bytes, and one case instead of four.
#define LITERAL(s) s, sizeof s - 1
enum { BIN32 = 0xc6, STR32 = 0xdb, ARRAY32 = 0xdd, MAP32 = 0xdf };

static inline void put_head(struct frame *f, uint8_t tag, size_t n) {
    uint8_t head[5] = {tag, (uint8_t)(n >> 24), (uint8_t)(n >> 16), (uint8_t)(n >> 8), (uint8_t)n};
    put(f, head, sizeof head);
}

static inline void put_text(struct frame *f, uint8_t tag, const char *s) {
    put_head(f, tag, str_len(s));
    put(f, s, str_len(s));
}

// ---------------------------------------------------------------- reading

struct reader { uint8_t *at, *end; };
enum kind { BROKEN, INT, BYTES, ARRAY, MAP, OTHER };
struct item { enum kind kind; uint64_t n; uint8_t *bytes; };  // n: the integer, the length, or the number of elements

// The next item's head and, for a scalar, its content. Elements of an array or a map are items of their own.
static inline struct item get(struct reader *r) {
    // What the tags 0xc0 to 0xdf mean, and how many bytes of length or integer follow: n(il), b(ytes), e(xtension),
    // f(loat), u(nsigned), i(nteger), x (extension of a fixed size), a(rray), m(ap).
    static const char kinds[] = "n?nnbbbeeeffuuuuiiiixxxxxbbbaamm";
    static const uint8_t widths[] = {0, 0, 0, 0, 1, 2, 4, 1, 2, 4, 4, 8, 1, 2, 4, 8,
                                     1, 2, 4, 8, 1, 2, 4, 8, 16, 1, 2, 4, 2, 4, 2, 4};
    const struct item broken = {BROKEN, 0, NULL};
    if (r->at == r->end) return broken;
    uint8_t tag = *r->at++;
    if (tag < 0x80 || tag >= 0xe0) return (struct item){INT, (uint64_t)(int8_t)tag, NULL};
    if (tag < 0x90) return (struct item){MAP, tag & 15, NULL};
    if (tag < 0xa0) return (struct item){ARRAY, tag & 15, NULL};

    char kind = 'b';
    uint64_t n = tag & 31;
    if (tag >= 0xc0) {
        kind = kinds[tag - 0xc0];
        size_t width = widths[tag - 0xc0];
        if ((size_t)(r->end - r->at) < width) return broken;
        n = kind == 'i' && *r->at >= 0x80 ? ~0ul : 0;
        if (kind == 'x' || kind == 'f') n = width;
        else while (width--) n = n << 8 | *r->at++;
    }
    if (kind == '?') return broken;
    if (kind == 'u' || kind == 'i') return (struct item){INT, n, NULL};
    if (kind == 'a') return (struct item){ARRAY, n, NULL};
    if (kind == 'm') return (struct item){MAP, n, NULL};
    if (kind == 'e' || kind == 'x') n++;  // the extension's type
    if (kind == 'n') n = 0;
    if ((uint64_t)(r->end - r->at) < n) return broken;
    r->at += n;
    return (struct item){kind == 'b' ? BYTES : OTHER, n, r->at - n};
}

static inline uint64_t elements(struct item item) {
    return item.kind == ARRAY ? item.n : item.kind == MAP ? 2 * item.n : 0;
}

// Step over `count` items with all they contain. A counter, not recursion: depth is the sender's choice.
static inline bool skip(struct reader *r, uint64_t count) {
    while (count--) {
        struct item item = get(r);
        if (item.kind == BROKEN) return false;
        count += elements(item);
    }
    return true;
}

static inline bool is_text(struct item item, const char *s) {
    return item.kind == BYTES && item.n == str_len(s) && !memcmp(item.bytes, s, item.n);
}
