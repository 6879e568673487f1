/* Where the lines of a chunk end: 64 bytes become a word, a bit for each newline. What a line is made of
   does not matter for that, so no line has to wait for the one before it to be parsed. */
#ifndef PKGINDEX_NEWLINES_H
#define PKGINDEX_NEWLINES_H
#include <stdint.h>
#include <string.h>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

enum { NEWLINES_BLOCK = 64 };

typedef struct {
    const unsigned char *start;   /* of the next line, as the reader keeps it */
    const unsigned char *block;
    const unsigned char *end;
    uint64_t newlines;            /* in the block, the bits of those already given are off */
} Lines;

static inline uint64_t newlines_portable(const unsigned char *p, size_t size)
{
    uint64_t found = 0;
    const unsigned char *at = p, *end = p + size;
    while (at < end && (at = memchr(at, '\n', (size_t)(end - at))) != NULL)
        found |= (uint64_t)1 << (at++ - p);
    return found;
}

static inline uint64_t newlines(const unsigned char *p, const unsigned char *end)
{
    size_t left = (size_t)(end - p);
    if (left < NEWLINES_BLOCK)
        return newlines_portable(p, left);
#ifdef __SSE2__
    const __m128i newline = _mm_set1_epi8('\n');
    uint64_t found = 0;
    for (int i = 0; i < 4; i++) {
        __m128i bytes = _mm_loadu_si128((const __m128i *)p + i);
        found |= (uint64_t)(unsigned)_mm_movemask_epi8(_mm_cmpeq_epi8(bytes, newline)) << (16 * i);
    }
    return found;
#else
    return newlines_portable(p, NEWLINES_BLOCK);
#endif
}

static inline Lines lines_of(const unsigned char *p, const unsigned char *end)
{
    Lines lines = {p, p, end, newlines(p, end)};
    return lines;
}

/* The next newline. There must be one. */
static inline const unsigned char *next_newline(Lines *lines)
{
    while (__builtin_expect(lines->newlines == 0, 0)) {
        lines->block += NEWLINES_BLOCK;
        lines->newlines = newlines(lines->block, lines->end);
    }
    const unsigned char *at = lines->block + (unsigned)__builtin_ctzll(lines->newlines);
    lines->newlines &= lines->newlines - 1;
    return at;
}
#endif
