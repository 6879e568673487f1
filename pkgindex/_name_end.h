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

static inline const unsigned char *name_end(const unsigned char *p, const unsigned char *end)
{
#ifdef __SSE2__
    while (end - p >= 16) {
        __m128i bytes = _mm_loadu_si128((const __m128i *)p);
        /* Signed: what is above 0x7F is below zero. */
        __m128i printed = _mm_cmpgt_epi8(bytes, _mm_set1_epi8(0x20));
        __m128i marks = _mm_or_si128(
            _mm_cmpeq_epi8(bytes, _mm_set1_epi8(0x7F)),
            _mm_or_si128(_mm_cmpeq_epi8(bytes, _mm_set1_epi8('|')), _mm_cmpeq_epi8(bytes, _mm_set1_epi8(','))));
        int others = _mm_movemask_epi8(_mm_andnot_si128(marks, printed)) ^ 0xFFFF;
        if (others)
            return p + __builtin_ctz(others);
        p += 16;
    }
#endif
    return name_end_portable(p, end);
}
#endif
