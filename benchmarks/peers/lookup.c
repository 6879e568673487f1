/* lookup: answers QUERY from an index of names, and does nothing else: what memory and TCP on this machine
 * allow one thread that has to look each name up.
 *
 *     lookup PORT        one thread, epoll, one read and one write a wake-up, loopback
 *
 * INDEX puts a name in, without a rule and without its dependencies, and is answered OK; every other line is
 * taken for a QUERY, and not checked further. What lies where is as in pkgindex, because that is what a rule
 * needs to find later: eight names a cache line of the table, and a node of 26 bytes and the name. It need
 * not survive what a stranger may send: it ends instead.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

enum { CHUNK = 64 * 1024, UNFINISHED = 512, EVENTS = 512, CONNECTIONS = 1024, GROUP = 32, SLOTS = 8 };
enum { HUGE_PAGE = 2 << 20, ROOM = 1 << 30 };  /* address space: what is not touched costs nothing */

typedef struct { uint32_t hash[SLOTS], node[SLOTS]; } Bucket;
typedef struct __attribute__((packed)) { char rules[25]; uint8_t length; char name[]; } Node;
typedef struct { const char *name; uint32_t length, hash; const Node *node; int puts; } Message;

static Bucket *buckets;
static uint64_t mask = 127, names;
static char *nodes;
static uint32_t top = 1;  /* the next node, in units of eight bytes */
static char chunk[UNFINISHED + CHUNK], answers[CHUNK];
static struct { char bytes[UNFINISHED]; size_t size; } unfinished[CONNECTIONS];

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static void *mapped(size_t size, int huge)
{
    char *at = mmap(NULL, size + HUGE_PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                    -1, 0);
    if (at == MAP_FAILED)
        fail("lookup: no memory");
    at += -(uintptr_t)at % HUGE_PAGE;
    if (huge)
        madvise(at, size, MADV_HUGEPAGE);
    return at;
}

static inline uint64_t word(const char *p)
{
    uint64_t value;
    memcpy(&value, p, 8);
    return value;
}

static inline uint64_t fold(uint64_t a, uint64_t b)
{
    unsigned __int128 product = (unsigned __int128)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

/* As pkgindex does it, without a secret: the bench chooses no collisions. */
static inline uint32_t hashed(const char *p, uint32_t n)
{
    uint64_t state = 0x9E3779B97F4A7C15u ^ n;
    for (; n > 16; p += 16, n -= 16)
        state = fold(word(p) ^ 0xBF58476D1CE4E5B9u, word(p + 8) ^ state);
    if (n < 8)
        state ^= n > 3 ? (uint64_t)*(const uint32_t *)p << 32 | *(const uint32_t *)(p + n - 4) : (uint64_t)*p;
    else
        state = fold(word(p) ^ 0x94D049BB133111EBu, word(p + n - 8) ^ state);
    return (uint32_t)fold(state ^ 0xD6E8FEB86659FD93u, 0xA0761D6478BD642Fu);
}

static inline unsigned matching(const Bucket *bucket, uint32_t hash)
{
#ifdef __SSE2__
    const __m128i *hashes = (const __m128i *)bucket->hash, sought = _mm_set1_epi32((int)hash);
    __m128i same = _mm_packs_epi32(_mm_cmpeq_epi32(hashes[0], sought), _mm_cmpeq_epi32(hashes[1], sought));
    return (unsigned)_mm_movemask_epi8(_mm_packs_epi16(same, same)) & 0xFF;
#else
    unsigned found = 0;
    for (int i = 0; i < SLOTS; i++)
        found |= (unsigned)(bucket->hash[i] == hash) << i;
    return found;
#endif
}

/* A bit for each newline of 64 bytes; of fewer where the chunk ends. */
static inline uint64_t newlines(const char *p, const char *end)
{
    uint64_t found = 0;
#ifdef __SSE2__
    if (end - p >= 64) {
        for (int i = 0; i < 4; i++) {
            __m128i bytes = _mm_cmpeq_epi8(_mm_loadu_si128((const __m128i *)p + i), _mm_set1_epi8('\n'));
            found |= (uint64_t)(unsigned)_mm_movemask_epi8(bytes) << 16 * i;
        }
        return found;
    }
#endif
    for (int i = 0; i < 64 && p + i < end; i++)
        found |= (uint64_t)(p[i] == '\n') << i;
    return found;
}

static inline const Node *node_at(const Bucket *bucket, unsigned found)
{
    return (const Node *)(nodes + (size_t)bucket->node[__builtin_ctz(found)] * 8);
}

static inline const Node *node_of(uint32_t hash)  /* that very likely has the name */
{
    for (uint64_t i = hash & mask;; i = (i + 1) & mask) {
        unsigned found = matching(buckets + i, hash);
        if (found)
            return node_at(buckets + i, found);
        if (!buckets[i].node[SLOTS - 1])
            return NULL;
    }
}

static void place(uint32_t hash, uint32_t node)
{
    uint64_t i = hash & mask;
    int slot = 0;
    while (buckets[i].node[SLOTS - 1])
        i = (i + 1) & mask;
    while (buckets[i].node[slot])
        slot++;
    buckets[i].hash[slot] = hash;
    buckets[i].node[slot] = node;
}

static void put(const Message *m)
{
    if (++names * 4 > (mask + 1) * SLOTS * 3) {
        Bucket *before = buckets;
        uint64_t count = mask + 1;
        mask = 2 * count - 1;
        buckets = mapped((mask + 1) * sizeof(Bucket), (mask + 1) * sizeof(Bucket) >= 8 << 20);
        for (uint64_t i = 0; i < count; i++)
            for (int slot = 0; slot < SLOTS && before[i].node[slot]; slot++)
                place(before[i].hash[slot], before[i].node[slot]);
        munmap(before, count * sizeof(Bucket));
    }
    Node *node = (Node *)(nodes + (size_t)top * 8);
    node->length = (uint8_t)m->length;
    memcpy(node->name, m->name, m->length);
    place(m->hash, top);
    top += (uint32_t)(sizeof(Node) + m->length + 7) / 8;
    if ((size_t)top * 8 > ROOM - 1024)
        exit(1);
}

static inline int same(const Node *node, const Message *m)
{
    uint32_t n = m->length;
    if (!node || node->length != n)
        return 0;
    if (n >= 8 && n <= 16)
        return !((word(node->name) ^ word(m->name)) | (word(node->name + n - 8) ^ word(m->name + n - 8)));
    return memcmp(node->name, m->name, n) == 0;
}

static int is_there(const Message *m)  /* whatever other name has its hash */
{
    for (uint64_t i = m->hash & mask;; i = (i + 1) & mask) {
        for (unsigned found = matching(buckets + i, m->hash); found; found &= found - 1)
            if (same(node_at(buckets + i, found), m))
                return 1;
        if (!buckets[i].node[SLOTS - 1])
            return 0;
    }
}

/* Answers the lines from p to end, the byte before which is a newline; the size of the answers. */
static size_t answer(const char *p, const char *end)
{
    Message group[GROUP];
    char *out = answers;
    const char *block = p;
    uint64_t ends = newlines(p, end);
    while (p < end) {
        int n = 0;
        for (; p < end && n < GROUP; n++) {
            Message *m = group + n;
            while (!ends)
                ends = newlines(block += 64, end);
            const char *newline = block + __builtin_ctzll(ends), *bar;
            ends &= ends - 1;
            m->puts = *p == 'I';
            m->name = p + 6;
            bar = newline[-1] == '|' ? newline - 1 : memchr(m->name, '|', (size_t)(newline - m->name));
            m->length = (uint32_t)(bar - m->name);
            m->hash = hashed(m->name, m->length);
            __builtin_prefetch(buckets + (m->hash & mask));
            p = newline + 1;
        }
        for (int i = 0; i < n; i++) {
            group[i].node = node_of(group[i].hash);
            __builtin_prefetch((const char *)group[i].node + 16);
            __builtin_prefetch((const char *)group[i].node + sizeof(Node) + group[i].length - 1);
        }
        for (int i = 0; i < n; i++) {
            int there = same(group[i].node, group + i) || is_there(group + i);
            if (!there && group[i].puts)
                put(group + i);
            memcpy(out, there | group[i].puts ? "OK\n\0\0" : "FAIL\n", 5);
            out += there | group[i].puts ? 3 : 5;
        }
    }
    return (size_t)(out - answers);
}

int main(int count, char **words)
{
    if (count != 2) {
        fputs("usage: lookup PORT\n", stderr);
        return 2;
    }
    buckets = mapped((mask + 1) * sizeof(Bucket), 0);
    nodes = mapped(ROOM, 0);
    int on = 1, poller = epoll_create1(0), listener = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((uint16_t)atoi(words[1])),
                             .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(listener, (struct sockaddr *)&at, sizeof at) != 0 || listen(listener, 4096) != 0)
        fail("lookup: cannot listen");
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener}, events[EVENTS];
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &event);

    for (;;) {
        int ready = epoll_wait(poller, events, EVENTS, -1);
        for (int i = 0; i < ready; i++) {
            int fd = events[i].data.fd;
            if (fd == listener) {
                event.data.fd = fd = accept(listener, NULL, NULL);
                if (fd < 0 || fd >= CONNECTIONS)
                    return 1;
                setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
                epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event);
                unfinished[fd].size = 0;
                continue;
            }
            size_t kept = unfinished[fd].size;
            char *start = chunk + UNFINISHED - kept;
            memcpy(start, unfinished[fd].bytes, kept);
            ssize_t got = recv(fd, chunk + UNFINISHED, CHUNK, 0);
            if (got <= 0) {
                close(fd);
                continue;
            }
            char *end = chunk + UNFINISHED + got, *lines = memrchr(start, '\n', (size_t)(end - start));
            lines = lines ? lines + 1 : start;
            unfinished[fd].size = (size_t)(end - lines);
            if (unfinished[fd].size > UNFINISHED)
                return 1;
            memcpy(unfinished[fd].bytes, lines, unfinished[fd].size);
            size_t size = answer(start, lines);
            /* The generator reads all that it is owed, so a blocking write always ends. */
            for (size_t sent = 0; sent < size;) {
                ssize_t put = send(fd, answers + sent, size - sent, MSG_NOSIGNAL);
                if (put <= 0)
                    break;
                sent += (size_t)put;
            }
        }
    }
}
