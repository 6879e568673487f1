/* A bucket of the hash table of names: one cache line, eight hashes and the handles of their nodes, compared
   all at once where every processor of the kind can (x86-64), else one by one. */
#ifndef PKGINDEX_BUCKET_H
#define PKGINDEX_BUCKET_H
#include <stdint.h>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

enum { BUCKET_SLOTS = 8 };

typedef struct {
    uint32_t hash[BUCKET_SLOTS];
    uint32_t node[BUCKET_SLOTS];   /* filled from the first on; 0: empty */
} Bucket;

/* A bit for each slot that has this hash; an empty one may. */
static inline unsigned bucket_matches_portable(const Bucket *bucket, uint32_t hash)
{
    unsigned found = 0;
    for (int i = 0; i < BUCKET_SLOTS; i++)
        found |= (unsigned)(bucket->hash[i] == hash) << i;
    return found;
}

static inline unsigned bucket_matches(const Bucket *bucket, uint32_t hash)
{
#ifdef __SSE2__
    const __m128i sought = _mm_set1_epi32((int)hash);
    const __m128i *hashes = (const __m128i *)bucket->hash;
    __m128i same = _mm_packs_epi32(_mm_cmpeq_epi32(_mm_loadu_si128(hashes), sought),
                                   _mm_cmpeq_epi32(_mm_loadu_si128(hashes + 1), sought));
    return (unsigned)_mm_movemask_epi8(_mm_packs_epi16(same, _mm_setzero_si128()));
#else
    return bucket_matches_portable(bucket, hash);
#endif
}
#endif
