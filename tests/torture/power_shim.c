/* A product that leaves out syncs: LD_PRELOAD this, and POWER_FORGETS says which.
 *
 *     files      fsync and fdatasync of regular files, and what syncfs does for them
 *     folders    fsync of folders, and what syncfs does for them
 *     files,folders
 *
 * The call then returns 0 and has done nothing. syncfs, which does both, is left out with either: what
 * it leaves durable cannot be halved. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int forgets(int fd)
{
    const char *which = getenv("POWER_FORGETS");
    struct stat st;

    if (which == NULL || fstat(fd, &st))
        return 0;
    return strstr(which, S_ISDIR(st.st_mode) ? "folders" : "files") != NULL;
}

static int call(const char *name, int fd)
{
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    return real(fd);
}

int fsync(int fd) { return forgets(fd) ? 0 : call("fsync", fd); }
int fdatasync(int fd) { return forgets(fd) ? 0 : call("fdatasync", fd); }
int syncfs(int fd) { return getenv("POWER_FORGETS") ? 0 : call("syncfs", fd); }
