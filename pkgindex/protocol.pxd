# What makes protocol.py a compiled module: the types of its fields, and which calls need no Python.
#
# The same file runs uncompiled, only slower: at one message a read, half of what a message costs
# beside the system calls is the interpreter.

cimport cython
from libc.stdint cimport uint64_t

from pkgindex._core cimport Batch, Standing, lines_end

cdef object LINES, SKIPPING, ENDED, DRAINING


cdef class Hub:
    cdef readonly object loop
    cdef readonly Standing index
    cdef readonly long window
    cdef readonly Py_ssize_t max_line, max_clients
    cdef readonly Batch batch
    cdef object _apply
    cdef readonly bytearray shared
    cdef readonly object shared_view, first_view
    cdef readonly double now
    cdef readonly set connections
    cdef readonly dict waiting, unfinished
    cdef readonly list leaving
    cdef readonly long accepted, refused, late, idle
    cdef public long skipped, strangers, unsecured, no_memory
    cdef public object failed
    cdef public bint admits

    @cython.locals(connection=Connection)
    cpdef send(self)

    @cython.locals(connection=Connection)
    cpdef settled(self)


cdef class Connection:
    cdef Hub _hub
    cdef object _listener, _transport, _write
    cdef bint _read_only
    cdef bytearray _buffer
    cdef Py_ssize_t _filled, _lines
    cdef object _state
    cdef object _replies, _behind, _leaving
    cdef uint64_t _ticket, _newest
    cdef long _changes
    cdef Py_ssize_t _held
    cdef long _unanswered
    cdef bint _error_due, _blocked, _yielding, _paused
    cdef public double seen

    @cython.locals(waits=cython.ulonglong)
    cdef Py_ssize_t _process(self, bytearray buffer, Py_ssize_t start, Py_ssize_t stop) except -1
    cdef _answer(self, uint64_t ticket, replies, long changes)
    cdef _send(self, replies)
    cpdef send(self)
    cdef _next(self, uint64_t settled)
    cdef _keep(self, bytearray buffer, Py_ssize_t start, Py_ssize_t end, Py_ssize_t cut)
    cdef _behind_the_line(self)
    cdef _let_go(self)
    cpdef bint release(self, uint64_t settled) except -1
    cdef _steer(self)
    cdef _take_up(self)
    cdef _finish(self)


cdef bytearray _moved(bytearray buffer, Py_ssize_t start, Py_ssize_t end, Py_ssize_t size)
