# Group commit: append the batch, fdatasync, prove, report (rules W2, W3, W7).
#
# One batch is under way at a time. The event loop hands it over with submit() and hears through an
# eventfd; one thread carries run(), which leaves C only to rotate, to stop or when a call has failed.
#
# A batch in the journal is a line of fixed width and its redo lines:
#
#     batch 00000031 00000002 00000000000004d2 9ae0daaf
#     +openssl@1.1|ca-certificates|
#     -wget|gettext,libidn2
#
# the bytes of its lines, their number, the number of its first change, and the CRC-32C of everything in
# the segment up to and with this batch, that field left out. So a batch is whole only in its own place,
# behind just those that came before it.
#
# Room. A file that grows has its size written at each fdatasync, a disk operation of its own after that of
# the data: a third of a small commit's time. So on a local file system a small batch that would make the
# segment grow takes zeros along, which the next ones write over. They are no batch: who reads stops there.
#
# The proof is a rename inside the writer's staging directory, to a name that carries the position it
# proves: proof-<segment>-<offset>-<serial>. The serial makes every proof a true change of the directory,
# which no client can answer from a cache.

cdef enum:
    BATCH_HEADER = 50
    BATCH_COVERED = 41     # what the checksum covers of it
    ROOM = 1 << 16         # zeros that a small batch takes along
    SMALL = 1 << 14        # a larger one needs no room: its own blocks are worth a new size

cdef char[ROOM] zeros      # static: all of them are

cdef enum State:
    IDLE = 0
    SUBMITTED = 1
    DONE = 2
    FAILED = 3


cdef class Committer:
    """The journal's open segment and the thread that commits to it.

    `staging` and `event` are file descriptors that the caller keeps open. The Python object is used
    by two threads: the loop's (submit, completed) and the one that runs run().
    """
    cdef pthread_mutex_t mutex
    cdef pthread_cond_t wake
    cdef State state
    cdef bint rotate_asked, stop_asked
    cdef int fd, staging, event, error
    cdef const char *failed_call
    cdef Py_buffer view
    cdef bint holds
    cdef uint64_t lines, first_change, serial
    cdef size_t limit
    cdef bint makes_room
    cdef uint64_t end                 # of the segment's file: the offset, or behind room
    cdef char proof[64]
    cdef readonly uint64_t segment
    cdef readonly uint64_t offset     # bytes of the segment: all of them synced, unless a commit is under way
    cdef readonly uint32_t checksum   # CRC-32C of those bytes
    cdef readonly uint64_t next_change
    cdef readonly uint64_t commits
    cdef readonly uint64_t synced_bytes

    def __cinit__(self, int staging, int event, size_t segment_limit, bint makes_room=False):
        """`segment_limit`: bytes past which run() asks for the next segment. `makes_room`: see above."""
        pthread_mutex_init(&self.mutex, NULL)
        pthread_cond_init(&self.wake, NULL)
        self.staging = staging
        self.event = event
        self.limit = segment_limit
        self.makes_room = makes_room
        self.fd = -1

    def __dealloc__(self):
        if self.holds:
            PyBuffer_Release(&self.view)
        pthread_mutex_destroy(&self.mutex)
        pthread_cond_destroy(&self.wake)

    def continue_in(self, int fd, uint64_t segment, uint64_t offset, uint32_t checksum, uint64_t next_change,
                    str proof=None):
        """Append to this segment from now on; no other thread may be in run(). `proof`: the proof's name."""
        self.fd = fd
        self.next_change = next_change
        self.segment = segment
        self.offset = self.end = offset
        self.checksum = checksum
        if proof is not None:
            self.set_proof(proof)

    cdef set_proof(self, str proof):
        raw = proof.encode()
        if len(raw) >= <Py_ssize_t>sizeof(self.proof):
            raise ValueError(f"no proof's name: {proof}")
        memcpy(self.proof, <char *>raw, len(raw) + 1)

    def submit(self, lines, uint64_t number, uint64_t first_change):
        """Commit a batch of redo lines, `number` of them; none at all means just a proof.

        `lines` is kept until completed(), which raises what has failed since, between two commits too: a
        rotation. Raises RuntimeError while one is under way."""
        if self.state == SUBMITTED or self.state == DONE:
            raise RuntimeError("a commit is under way")
        PyObject_GetBuffer(lines, &self.view, PyBUF_SIMPLE)
        self.holds = True
        self.lines = number
        self.first_change = first_change
        pthread_mutex_lock(&self.mutex)
        if self.state == IDLE:
            self.state = SUBMITTED
        pthread_mutex_unlock(&self.mutex)
        pthread_cond_signal(&self.wake)    # unlocked: the thread would only wake to wait for the lock

    def completed(self):
        """Whether the batch is durable and proven. Raises OSError when it failed, for good."""
        cdef State state
        pthread_mutex_lock(&self.mutex)
        state = self.state
        if state == DONE:
            self.state = IDLE
        pthread_mutex_unlock(&self.mutex)
        if state == FAILED:
            raise self.failure()
        if state != DONE:
            return False
        PyBuffer_Release(&self.view)
        self.holds = False
        return True

    def failure(self):
        """What failed, as an OSError: once run() has returned "failed"."""
        return OSError(self.error, f"{self.failed_call.decode()}: {os.strerror(self.error)}")

    def ask_rotation(self):
        """Make run() return "rotate" at the next border between batches."""
        pthread_mutex_lock(&self.mutex)
        self.rotate_asked = True
        pthread_cond_signal(&self.wake)
        pthread_mutex_unlock(&self.mutex)

    def ask_stop(self):
        """Make run() return "stop" once the batch under way is done."""
        pthread_mutex_lock(&self.mutex)
        self.stop_asked = True
        pthread_cond_signal(&self.wake)
        pthread_mutex_unlock(&self.mutex)

    def run(self):
        """Commit until something else must be done: "rotate", "stop", or "failed" (see completed())."""
        cdef int error
        with nogil:
            while True:
                pthread_mutex_lock(&self.mutex)
                while self.state != SUBMITTED and not self.rotate_asked and not self.stop_asked:
                    pthread_cond_wait(&self.wake, &self.mutex)
                if self.state != SUBMITTED or self.offset >= self.limit and self.fd >= 0:
                    pthread_mutex_unlock(&self.mutex)
                    break
                pthread_mutex_unlock(&self.mutex)
                error = self.commit()
                pthread_mutex_lock(&self.mutex)
                self.error = error
                self.state = FAILED if error else DONE
                pthread_mutex_unlock(&self.mutex)
                self.ring()
                if error:
                    break
        if self.state == FAILED:
            return "failed"
        if self.state == SUBMITTED or self.rotate_asked:
            self.rotate_asked = False
            return "rotate"
        return "stop"

    def prove(self):
        """One proof, from the thread that runs run(). Raises OSError when this writer is deposed."""
        cdef int error
        with nogil:
            error = self.rename_proof()
        if error:
            raise OSError(error, f"proof: {os.strerror(error)}")

    def fail(self, int error):
        """Let completed() raise this error: for a rotation that failed."""
        self.failed_call = "the next segment"
        pthread_mutex_lock(&self.mutex)
        self.error = error
        self.state = FAILED
        pthread_mutex_unlock(&self.mutex)
        self.ring()

    cdef void ring(self) noexcept nogil:
        cdef uint64_t one = 1
        write(self.event, &one, 8)

    cdef int commit(self) noexcept nogil:
        """0, or the errno of the first call that failed."""
        cdef char header[BATCH_HEADER + 1]
        cdef uint32_t checksum = self.checksum
        if self.view.len:
            self.failed_call = "batch too large"
            if self.view.len > <Py_ssize_t>0xFFFFFFFF:
                return 27    # EFBIG
            snprintf(header, sizeof(header), "batch %08x %08x %016lx ", <unsigned int>self.view.len,
                     <unsigned int>self.lines, <unsigned long>self.first_change)
            checksum = crc32c_update(checksum, <const unsigned char *>header, BATCH_COVERED)
            checksum = crc32c_update(checksum, <const unsigned char *>self.view.buf, self.view.len)
            snprintf(header + BATCH_COVERED, sizeof(header) - BATCH_COVERED, "%08x\n", checksum)
            self.failed_call = "write"
            if not self.append(header):
                return errno
            self.failed_call = "fdatasync"
            if fdatasync(self.fd):
                return errno
            self.checksum = checksum
            self.next_change = self.first_change + self.lines
            self.offset += BATCH_HEADER + self.view.len
            self.synced_bytes += BATCH_HEADER + self.view.len
        self.commits += 1
        return self.rename_proof()

    cdef bint append(self, char *header) noexcept nogil:
        """Write the batch at the offset, and room behind it if it is small and there is none."""
        cdef iovec parts[3]
        cdef int i = 0, count = 2
        cdef size_t size = BATCH_HEADER + self.view.len
        cdef uint64_t at = self.offset
        cdef ssize_t n
        parts[0].iov_base = header
        parts[0].iov_len = BATCH_HEADER
        parts[1].iov_base = self.view.buf
        parts[1].iov_len = self.view.len
        parts[2].iov_base = zeros
        parts[2].iov_len = ROOM
        if self.makes_room and size <= SMALL and at + size > self.end:
            count = 3
        # Room that is not written whole, on a disk that is nearly full, is no failure.
        while at < self.offset + size:
            n = pwritev(self.fd, parts + i, count - i, at)
            if n < 0:
                if errno == EINTR:
                    continue
                return False
            at += n
            while i < count and <size_t>n >= parts[i].iov_len:
                n -= parts[i].iov_len
                i += 1
            if i < count:
                parts[i].iov_base = <char *>parts[i].iov_base + n
                parts[i].iov_len -= n
        if at > self.end:
            self.end = at
        return True

    cdef int rename_proof(self) noexcept nogil:
        cdef char name[64]
        self.serial += 1
        snprintf(name, sizeof(name), "proof-%08lx-%012lx-%lx", <unsigned long>self.segment,
                 <unsigned long>self.offset, <unsigned long>self.serial)
        self.failed_call = "proof"
        if renameat(self.staging, self.proof, self.staging, name):
            return errno
        memcpy(self.proof, name, sizeof(name))
        return 0


cdef bint write_all(int fd, const char *data, size_t size) noexcept nogil:
    """Write everything; a short write goes on where it stopped, an error is final."""
    cdef ssize_t n
    while size:
        n = write(fd, data, size)
        if n < 0:
            if errno == EINTR:
                continue
            return False
        data += n
        size -= n
    return True


cdef int64_t hex_field(const unsigned char *p, int digits) noexcept nogil:
    """A number in lower-case hexadecimal, or -1."""
    cdef uint64_t v = 0
    cdef int i
    for i in range(digits):
        if c'0' <= p[i] <= c'9':
            v = v << 4 | (p[i] - c'0')
        elif c'a' <= p[i] <= c'f':
            v = v << 4 | (p[i] - c'a' + 10)
        else:
            return -1
    return <int64_t>v


def read_batches(data, size_t offset, uint32_t checksum, uint64_t next_change, size_t limit):
    """Read whole batches of a segment's bytes from `offset` on, about `limit` bytes of them.

    `checksum` is that of all bytes before `offset`. Returns (redo lines, offset behind the last whole
    batch, checksum up to there, number of the next change); nothing more is whole when the offset
    stays where it was."""
    cdef Py_buffer view
    cdef const unsigned char *base
    cdef const unsigned char *p
    cdef int64_t size, lines, first, sum_
    cdef uint32_t check
    cdef size_t end, start = offset
    parts = []
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        base = <const unsigned char *>view.buf
        end = view.len
        while offset + BATCH_HEADER < end and offset - start < limit:
            p = base + offset
            size = hex_field(p + 6, 8)
            lines = hex_field(p + 15, 8)
            first = hex_field(p + 24, 16)
            sum_ = hex_field(p + BATCH_COVERED, 8)
            if (memcmp(p, b"batch ", 6) or p[14] != c' ' or p[23] != c' ' or p[40] != c' ' or p[49] != c'\n'
                    or size <= 0 or lines <= 0 or first < 0 or sum_ < 0
                    or <size_t>size > end - offset - BATCH_HEADER or <uint64_t>first != next_change):
                break
            check = crc32c_update(checksum, p, BATCH_COVERED)
            check = crc32c_update(check, p + BATCH_HEADER, size)
            if check != <uint32_t>sum_:
                break
            parts.append(PyBytes_FromStringAndSize(<const char *>p + BATCH_HEADER, size))
            checksum = check
            next_change += lines
            offset += BATCH_HEADER + size
        return b"".join(parts), offset, checksum, next_change
    finally:
        PyBuffer_Release(&view)
