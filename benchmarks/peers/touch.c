/* touch: what it costs on this machine to read a random line of so much memory.
 *
 *     touch BYTES        prints {"ns": nanoseconds a line}
 *
 * Sixteen lines are fetched ahead and then read, as the index does for the messages of a chunk, in pages of
 * the usual size. So what an index of that many bytes costs more than a small one can be told apart: the
 * machine's caches and page tables, which nobody can help, from work that grows.
 */
#define _GNU_SOURCE
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { LINE = 64, GROUP = 16, GROUPS = 200000 };

static uint64_t seed = 88172645463325252u;

static uint64_t draw(void)  /* xorshift64* */
{
    seed ^= seed >> 12;
    seed ^= seed << 25;
    seed ^= seed >> 27;
    return seed * 0x2545F4914F6CDD1Du;
}

int main(int count, char **words)
{
    size_t lines = count == 2 ? strtoull(words[1], NULL, 10) / LINE : 0;
    if (lines == 0) {
        fputs("usage: touch BYTES\n", stderr);
        return 2;
    }
    unsigned char *memory = mmap(NULL, lines * LINE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        perror("touch");
        return 1;
    }
    madvise(memory, lines * LINE, MADV_NOHUGEPAGE);
    memset(memory, 1, lines * LINE);
    uint64_t sum = 0;
    struct timespec from, to;
    for (int pass = 0; pass < 2; pass++) {  /* the first one warms up what can be warm */
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &from);
        for (int i = 0; i < GROUPS; i++) {
            unsigned char *at[GROUP];
            for (int j = 0; j < GROUP; j++)
                __builtin_prefetch(at[j] = memory + draw() % lines * LINE);
            for (int j = 0; j < GROUP; j++)
                sum += *at[j];
        }
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &to);
    }
    double ns = (double)(to.tv_sec - from.tv_sec) * 1e9 + (double)(to.tv_nsec - from.tv_nsec);
    printf("{\"ns\": %.3f, \"sum\": %lu}\n", ns / GROUP / GROUPS, sum);
    return 0;
}
