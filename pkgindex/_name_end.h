/* Where a name ends: at the first byte that no name has. Sixteen bytes a step where every processor of
   the kind can (x86-64), else one by one. */
#ifndef PKGINDEX_NAME_END_H
#define PKGINDEX_NAME_END_H
#include <stddef.h>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

static unsigned char in_name[256];

__attribute__((constructor)) static void name_end_fill(void)
{
    for (int c = 0x21; c <= 0x7E; c++)
        in_name[c] = c != '|' && c != ',';
}

/* Something that no name has must come at the latest at end[-1]. */
static inline const unsigned char *name_end_portable(const unsigned char *p, const unsigned char *end)
{
    (void)end;
    while (in_name[*p])
        p++;
    return p;
}

#ifdef __SSE2__
/* A bit for each of sixteen bytes that no name has. */
static inline unsigned not_in_name(const unsigned char *p)
{
    __m128i bytes = _mm_loadu_si128((const __m128i *)p);
    /* Signed: what is above 0x7F is below zero. */
    __m128i unprinted = _mm_or_si128(_mm_cmplt_epi8(bytes, _mm_set1_epi8(0x21)),
                                     _mm_cmpeq_epi8(bytes, _mm_set1_epi8(0x7F)));
    __m128i marks = _mm_or_si128(_mm_cmpeq_epi8(bytes, _mm_set1_epi8('|')),
                                 _mm_cmpeq_epi8(bytes, _mm_set1_epi8(',')));
    return (unsigned)_mm_movemask_epi8(_mm_or_si128(unprinted, marks));
}
#endif

static inline const unsigned char *name_end(const unsigned char *p, const unsigned char *end)
{
#ifdef __SSE2__
    while (end - p >= 16) {
        unsigned others = not_in_name(p);
        if (others)
            return p + (unsigned)__builtin_ctz(others);
        p += 16;
    }
#endif
    return name_end_portable(p, end);
}

/* Whether a name may have all the bytes from p to `to`. */
static inline int is_name_portable(const unsigned char *p, const unsigned char *to)
{
    while (p < to && in_name[*p])
        p++;
    return p == to;
}

/* The same; what is readable ends at `end`. */
static inline int is_name(const unsigned char *p, const unsigned char *to, const unsigned char *end)
{
#ifdef __SSE2__
    if (to - p <= 16 && end - p >= 16)
        return !(not_in_name(p) << (-(unsigned)(to - p) & 31));    /* an empty one is none: then `to` itself counts */
    return name_end(p, end) >= to;
#else
    (void)end;
    return is_name_portable(p, to);
#endif
}
#endif
