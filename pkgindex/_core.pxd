# What protocol.py, where it is compiled, calls without going through Python.

from libc.stdint cimport uint64_t


cdef class Batch:
    cdef public bytearray buffer
    cdef public Py_ssize_t start
    cdef public Py_ssize_t stop
    cdef public long room
    cdef public long changes
    cdef public uint64_t ticket
    cdef public bint read_only
    cdef public uint64_t waits
    cdef readonly size_t max_line

    cpdef load(self, bytearray buffer, Py_ssize_t start, Py_ssize_t stop, long room, bint read_only=*,
               uint64_t waits=*)


cdef class Standing:
    cdef public uint64_t settled
    cdef public bint congested


cpdef Py_ssize_t lines_end(bytearray buffer, Py_ssize_t start, Py_ssize_t end) except -1
