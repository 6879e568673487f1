/* commit: the bare loop below a durable change: append, fdatasync, rename; nothing else.
 *
 *     commit FOLDER SECONDS [RATE]     prints {"rate": commits a second, latencies in microseconds}
 *
 * It appends what one INDEX makes of pkgindex's journal, and renames a file to and fro as pkgindex does
 * to prove that it is still the writer. With RATE it makes so many commits a second, and no more.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 1 << 22 };

static double latencies[MOST];

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int count, char **words)
{
    static const char change[] = "batch 00000013 00000001 0000000000000001 00000000\n+p-0000-00000000||\n";
    if (count < 3 || count > 4 || chdir(words[1]) != 0 || mkdir("journal", 0700) != 0 || mkdir("staging", 0700) != 0) {
        fputs("usage: commit EMPTY-FOLDER SECONDS [RATE]\n", stderr);
        return 2;
    }
    int journal = open("journal/segment", O_WRONLY | O_CREAT | O_EXCL | O_APPEND, 0600);
    int staging = open("staging", O_RDONLY | O_DIRECTORY);
    int proof = openat(staging, "proof-00000000-000000000000-0", O_WRONLY | O_CREAT | O_EXCL, 0600);
    if (journal < 0 || staging < 0 || proof < 0) {
        perror("commit");
        return 1;
    }
    char before[40] = "proof-00000000-000000000000-0", after[40];
    size_t commits = 0;
    double pause = count > 3 ? 1 / atof(words[3]) : 0;
    double began = now(), last = began, end = began + atof(words[2]);
    while (last < end && commits < MOST) {
        snprintf(after, sizeof after, "proof-00000000-%012zx-0", commits + 1);
        if (write(journal, change, sizeof change - 1) != sizeof change - 1 || fdatasync(journal) != 0
            || renameat(staging, before, staging, after) != 0) {
            perror("commit");
            return 1;
        }
        strcpy(before, after);
        double at = now();
        latencies[commits++] = (at - last) * 1e6;
        last = at;
        double early = began + (double)commits * pause - at;
        if (pause > 0 && early > 0) {
            nanosleep(&(struct timespec){.tv_nsec = (long)(early * 1e9)}, NULL);
            last = now();
        }
    }
    qsort(latencies, commits, sizeof *latencies, by_value);
    printf("{\"rate\": %.1f, \"latency_us\": {\"mean\": %.2f, \"p50\": %.2f, \"p99\": %.2f, \"max\": %.2f}}\n",
           (double)commits / (last - began), (last - began) / (double)commits * 1e6, latencies[commits / 2],
           latencies[commits - 1 - commits / 100], latencies[commits - 1]);
    return 0;
}
