/* publish: what a file system gives to files that are each written once: temporary file, then rename.
 *
 *     publish FOLDER SECONDS THREADS [RATE]     prints {"rate": files a second}
 *
 * In groups of as many as pkgindex has on their way at once: all are made and written in staging, synced,
 * renamed into one of 256 folders, and the names synced. On a local disk (one thread) a syncfs stands for
 * the syncs of a group; elsewhere (several threads) each file, and each folder, has its own. With RATE it
 * makes so many files a second, and no more, and gives the processor away before each.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { GROUP = 8192, SHARDS = 256, MOST_THREADS = 64, LOCAL_THREADS = 1 };

static int staging, shards[SHARDS], threads;
static double began, end, pause_a_file;
static int over;
static pthread_barrier_t border;

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void check(int result, const char *what)
{
    if (result < 0) {
        perror(what);
        exit(1);
    }
}

static void give_way(void)
{
    if (pause_a_file > 0)
        sched_yield();
}

/* A thread's share of the groups, until the time is over; how many files it has published. */
static void *publish(void *argument)
{
    uintptr_t first = (uintptr_t)argument, files = 0;
    char temporary[32], name[32], text[64];
    for (uintptr_t group = 0;; group++) {
        if (pthread_barrier_wait(&border) == PTHREAD_BARRIER_SERIAL_THREAD) {
            double early = began + (double)(group * GROUP) * pause_a_file - now();
            if (pause_a_file > 0 && early > 0)
                nanosleep(&(struct timespec){(time_t)early, (long)((early - (double)(time_t)early) * 1e9)}, NULL);
            over = now() > end;  /* decided by one, for all */
        }
        pthread_barrier_wait(&border);
        if (over)
            return (void *)files;
        for (uintptr_t i = first; i < GROUP; i += (uintptr_t)threads) {
            snprintf(temporary, sizeof temporary, "%lx", group * GROUP + i);
            int size = snprintf(text, sizeof text, "p-%04lu-%08lu\nforward 0 00000000\n", i % 16, group * GROUP + i);
            give_way();
            int fd = openat(staging, temporary, O_WRONLY | O_CREAT | O_EXCL, 0600);
            check(fd, "open");
            check(write(fd, text, (size_t)size) == size ? 0 : -1, "write");
            if (threads > LOCAL_THREADS)
                check(fsync(fd), "fsync");
            close(fd);
        }
        pthread_barrier_wait(&border);
        if (threads == LOCAL_THREADS)
            check(syncfs(staging), "syncfs");
        for (uintptr_t i = first; i < GROUP; i += (uintptr_t)threads, files++) {
            snprintf(temporary, sizeof temporary, "%lx", group * GROUP + i);
            snprintf(name, sizeof name, "p-%04lu-%08lu", i % 16, group * GROUP + i);
            give_way();
            check(renameat(staging, temporary, shards[i * 2654435761u / 4096 % SHARDS], name), "rename");
        }
        pthread_barrier_wait(&border);
        if (threads == LOCAL_THREADS)
            check(syncfs(staging), "syncfs");
        else
            for (uintptr_t i = first; i < SHARDS; i += (uintptr_t)threads)
                check(fsync(shards[i]), "fsync of a folder");
    }
}

int main(int count, char **words)
{
    threads = count >= 4 ? atoi(words[3]) : 0;
    pause_a_file = count == 5 ? 1 / atof(words[4]) : 0;
    if (threads < 1 || threads > MOST_THREADS || chdir(words[1]) != 0 || mkdir("staging", 0700) != 0) {
        fputs("usage: publish EMPTY-FOLDER SECONDS THREADS [RATE]\n", stderr);
        return 2;
    }
    staging = open("staging", O_RDONLY | O_DIRECTORY);
    for (int i = 0; i < SHARDS; i++) {
        char name[8];
        snprintf(name, sizeof name, "%02x", (unsigned)i);
        check(mkdir(name, 0700), "mkdir");
        check(shards[i] = open(name, O_RDONLY | O_DIRECTORY), "open");
    }
    pthread_barrier_init(&border, NULL, (unsigned)threads);
    pthread_t others[MOST_THREADS];
    began = now();
    uintptr_t files = 0;
    end = began + atof(words[2]);
    for (uintptr_t i = 0; i < (uintptr_t)threads; i++)
        pthread_create(&others[i], NULL, publish, (void *)i);
    for (int i = 0; i < threads; i++) {
        void *published;
        pthread_join(others[i], &published);
        files += (uintptr_t)published;
    }
    printf("{\"rate\": %.1f, \"files\": %lu}\n", (double)files / (now() - began), files);
    return 0;
}
