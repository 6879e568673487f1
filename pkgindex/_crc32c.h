/* CRC-32C (Castagnoli, RFC 3720 appendix B.4): eight bytes a step through tables, or by the
   processor's own instruction where it has one (x86-64 with SSE 4.2, found at run time). */
#ifndef PKGINDEX_CRC32C_H
#define PKGINDEX_CRC32C_H
#include <stddef.h>
#include <stdint.h>
#include <string.h>

static uint32_t crc32c_table[8][256];

__attribute__((constructor)) static void crc32c_fill(void)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int k = 0; k < 8; k++)
            c = c & 1 ? (c >> 1) ^ 0x82F63B78u : c >> 1;
        crc32c_table[0][i] = c;
    }
    for (uint32_t i = 0; i < 256; i++)
        for (int t = 1; t < 8; t++)
            crc32c_table[t][i] = (crc32c_table[t - 1][i] >> 8) ^ crc32c_table[0][crc32c_table[t - 1][i] & 255];
}

static uint32_t crc32c_portable(uint32_t crc, const unsigned char *p, size_t n)
{
    for (; n >= 8; p += 8, n -= 8) {
        uint64_t w;
        memcpy(&w, p, 8);
        w ^= crc;
        crc = crc32c_table[7][w & 255] ^ crc32c_table[6][w >> 8 & 255] ^ crc32c_table[5][w >> 16 & 255]
            ^ crc32c_table[4][w >> 24 & 255] ^ crc32c_table[3][w >> 32 & 255] ^ crc32c_table[2][w >> 40 & 255]
            ^ crc32c_table[1][w >> 48 & 255] ^ crc32c_table[0][w >> 56];
    }
    while (n--)
        crc = (crc >> 8) ^ crc32c_table[0][(crc ^ *p++) & 255];
    return crc;
}

#ifdef __x86_64__
__attribute__((target("sse4.2"))) static uint32_t crc32c_sse42(uint32_t crc, const unsigned char *p, size_t n)
{
    uint64_t c = crc;
    for (; n >= 8; p += 8, n -= 8) {
        uint64_t w;
        memcpy(&w, p, 8);
        c = __builtin_ia32_crc32di(c, w);
    }
    while (n--)
        c = __builtin_ia32_crc32qi((uint32_t)c, *p++);
    return (uint32_t)c;
}
#endif

static inline uint32_t crc32c_update(uint32_t crc, const unsigned char *p, size_t n)
{
#ifdef __x86_64__
    if (__builtin_cpu_supports("sse4.2"))
        return ~crc32c_sse42(~crc, p, n);
#endif
    return ~crc32c_portable(~crc, p, n);
}
#endif
