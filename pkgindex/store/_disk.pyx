# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The store's hot paths, in C and without the GIL: commits, package files written, package files read.

What is rare (claiming, segments' heads, removal of segments) is Python, in mount.py and its callers.

Promise: nothing here waits for the GIL between the first system call of a batch or a file and the
last, and the first call that fails is reported with its name and errno and never repeated (rule W7).
"""
from libc.errno cimport EEXIST, EINTR, ENOENT, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport free, malloc, qsort, realloc
from libc.string cimport memchr, memcmp, memcpy, memset, strcmp, strlen
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize

import hashlib
import os

cdef extern from "_crc32c.h" nogil:
    uint32_t crc32c_update(uint32_t crc, const unsigned char *data, size_t size)

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *, void *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)
    int pthread_mutex_destroy(pthread_mutex_t *)
    int pthread_cond_init(pthread_cond_t *, void *)
    int pthread_cond_wait(pthread_cond_t *, pthread_mutex_t *)
    int pthread_cond_signal(pthread_cond_t *)
    int pthread_cond_destroy(pthread_cond_t *)

cdef extern from "<unistd.h>" nogil:
    ssize_t write(int fd, const void *data, size_t size)
    ssize_t read(int fd, void *data, size_t size)
    int close(int fd)
    int fdatasync(int fd)
    int fsync(int fd)
    int syncfs(int fd)

cdef extern from "<sys/uio.h>" nogil:
    ctypedef struct iovec "struct iovec":
        void *iov_base
        size_t iov_len
    ssize_t pwritev(int fd, const iovec *parts, int count, int64_t offset)

cdef extern from "<fcntl.h>" nogil:
    int openat(int dir, const char *path, int flags, ...)
    int O_RDONLY, O_WRONLY, O_CREAT, O_EXCL, O_CLOEXEC, O_DIRECTORY, O_NOFOLLOW, O_NONBLOCK
    int AT_SYMLINK_NOFOLLOW

cdef extern from "<stdio.h>" nogil:
    int renameat(int old_dir, const char *old, int new_dir, const char *new)

cdef extern from "<sys/stat.h>" nogil:
    ctypedef struct stat_t "struct stat":
        uint64_t st_ino
        int64_t st_size
        uint32_t st_mode
    int fstat(int fd, stat_t *st)
    int fstatat(int dir, const char *path, stat_t *st, int flags)
    int mkdirat(int dir, const char *path, int mode)
    bint S_ISREG(uint32_t mode)

cdef extern from "<dirent.h>" nogil:
    ctypedef struct DIR:
        pass
    ctypedef struct dirent "struct dirent":
        char *d_name
    DIR *fdopendir(int fd)
    dirent *readdir(DIR *d)
    int closedir(DIR *d)

cdef extern from "<sched.h>" nogil:
    int sched_yield()

cdef extern from "<sys/vfs.h>" nogil:
    ctypedef struct statfs_t "struct statfs":
        long f_type
    int fstatfs(int fd, statfs_t *st)

cdef extern from *:
    """
    static uint64_t pkgindex_temporary;
    #define set_errno(value) (errno = (value))
    #define next_temporary() __atomic_fetch_add(&pkgindex_temporary, 1, __ATOMIC_RELAXED)
    """
    uint64_t next_temporary() nogil
    void set_errno(int value) nogil

include "_commit.pxi"
include "_names.pxi"
include "_files.pxi"
