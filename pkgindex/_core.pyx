# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The index itself: message parser, interned names, graph, reverse edges, reply bytes, redo lines.

No I/O, and no Python object for a message: one call takes all complete lines of a received chunk and
gives the bytes of their replies. The parts, each in a file of its own, from the ground up:

    _arena.pxi    memory: growing mappings, blocks named by handles
    _names.pxi    a package's name once, found by a keyed hash
    _graph.pxi    dependencies and reverse edges
    _parser.pxi   one line of the protocol
    _redo.pxi     redo lines written and replayed, the contents of package files
    this file     Batch (the seam's unit) and Graph (what stands behind memory: and file:)

Tickets. Every commit has a number, its ticket. All changes made while one commit is being synced go
into the next, whose ticket is `Graph.ticket`. An answer rests on a ticket and may leave once that is
settled (durable and proven): a change and every INDEX or REMOVE on the open one (rule W3), a QUERY on
the last coming or going of its package. A graph that is not journalled has the one ticket 0, which is
always settled.
"""
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.stdlib cimport qsort
from libc.string cimport memchr, memcmp, memcpy, memmove, memset
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.memoryview cimport PyMemoryView_FromMemory
from cpython.buffer cimport PyBUF_READ, PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer

import os

cdef extern from "_crc32c.h" nogil:
    uint32_t crc32c_update(uint32_t crc, const unsigned char *data, size_t size)
    uint32_t crc32c_portable(uint32_t crc, const unsigned char *data, size_t size)

cdef extern from "_bucket.h" nogil:
    enum: BUCKET_SLOTS
    ctypedef struct Bucket:
        uint32_t hash[BUCKET_SLOTS]
        uint32_t node[BUCKET_SLOTS]
    unsigned int bucket_matches(const Bucket *bucket, uint32_t hash)
    unsigned int bucket_matches_portable(const Bucket *bucket, uint32_t hash)

cdef extern from "_name_end.h" nogil:
    const unsigned char in_name[256]
    const unsigned char *name_end(const unsigned char *p, const unsigned char *end)
    bint is_name(const unsigned char *p, const unsigned char *to, const unsigned char *end)
    bint is_name_portable(const unsigned char *p, const unsigned char *to)
    const unsigned char *name_end_portable(const unsigned char *p, const unsigned char *end)

cdef extern from "_newlines.h" nogil:
    ctypedef struct Lines:
        const unsigned char *start
        const unsigned char *end
    uint64_t newlines(const unsigned char *p, const unsigned char *end)
    uint64_t newlines_portable(const unsigned char *p, size_t size)
    Lines lines_of(const unsigned char *p, const unsigned char *end)
    const unsigned char *next_newline(Lines *lines)

cdef extern from *:
    """
    typedef unsigned __int128 uint128_t;
    """
    ctypedef unsigned long long uint128_t    # 128 bits in truth; Cython only needs "an integer"
    int __builtin_clz(unsigned int x) nogil
    unsigned int __builtin_ctz(unsigned int x) nogil
    const void *memrchr(const void *p, int c, size_t n) nogil    # a GNU function: _GNU_SOURCE is Python's
    void prefetch "__builtin_prefetch"(const void *p) nogil
    bint likely(bint holds) nogil
    bint unlikely(bint holds) nogil

include "_arena.pxi"
include "_names.pxi"
include "_graph.pxi"
include "_parser.pxi"
include "_redo.pxi"

cdef enum:
    GROUP = 16           # messages parsed ahead, so that their cache misses overlap
    REPLAY_NAMES = 256   # names of redo lines looked up ahead
    # A chunk ends early once its changes have touched so many edges (a millisecond or two: a short line
    # may take away a long list), or the open commit holds so many bytes of redo lines (a mount that hangs
    # must not fill the memory).
    WORK_LIMIT = 20000
    REDO_LIMIT = 32 << 20
    SEGMENTS = 8         # of a chunk's replies; tickets grow along it, so there are at most three
    OK = 0
    FAIL = 1
    ERROR = 2

cdef bytes REPLY_OK = b"OK\n"
cdef bytes REPLY_FAIL = b"FAIL\n"
cdef bytes REPLY_ERROR = b"ERROR\n"

ctypedef struct Segment:
    uint64_t ticket
    size_t end           # of its replies
    long changes


cdef inline uint32_t fetch_node(Table *now, const char *nodes, const Message *m) noexcept nogil:
    """The handle of the node that very likely has the message's name, or 0. What a QUERY reads of it is fetched."""
    cdef uint32_t handle = table_guess(now, m.hash)
    cdef const char *node = nodes + <size_t>handle * 8
    prefetch(node + NODE_ANSWER)
    prefetch(node + NODE_HEADER + m.length - 1)    # it may straddle two cache lines
    return handle


cdef class Batch:
    """The complete lines of one received chunk: what an Index is given, and what it says of them.

    `buffer[start:stop]` ends in a newline. `room` is how many more INDEX and REMOVE messages the
    connection may have unanswered. The Index reads messages from `start`, stops before one that
    would exceed the room, and leaves `start` at the first byte that it did not read and `changes`
    at the number of INDEX and REMOVE messages that it took; `ticket` at that on which all the
    answers rest if they are one piece, 0 if they may be sent now.

    With `read_only` the connection may change nothing: its INDEX and REMOVE are answered FAIL if they
    are well-formed, need no room and are not counted. `waits` is the last ticket that the connection waits
    for, 0 if it has been given no answers that are not settled yet.

    Iterating gives each message as (command, package, dependencies), None for a malformed one, and
    False for one that may change nothing: for an Index that does not stand on Graph. It reads by the
    same rules, `room` included.
    """
    def __init__(self, size_t max_line=1 << 20):
        self.max_line = max_line
        self.buffer = bytearray()

    cpdef load(self, bytearray buffer, Py_ssize_t start, Py_ssize_t stop, long room,
               bint read_only=False, uint64_t waits=0):
        """Point the batch at `buffer[start:stop]`. Raises ValueError if that does not end in a newline."""
        if buffer is None:
            raise TypeError("a batch needs a buffer")
        if not 0 <= start < stop <= len(buffer) or PyByteArray_AS_STRING(buffer)[stop - 1] != c'\n':
            raise ValueError("a batch is a non-empty run of complete lines")
        self.buffer = buffer
        self.start = start
        self.stop = stop
        self.room = room
        self.changes = 0
        self.ticket = 0
        self.read_only = read_only
        self.waits = waits

    def take(self, long most):
        """Take messages, `most` of them, as the rules allow without answering them, for an Index that has it
        done elsewhere. Returns their number."""
        cdef const unsigned char *base = <const unsigned char *>PyByteArray_AS_STRING(self.buffer)
        cdef const unsigned char *newline
        cdef Message m
        cdef long n = 0
        while self.start < self.stop and n < most:
            newline = <const unsigned char *>memchr(base + self.start, c'\n', self.stop - self.start)
            parse(base + self.start, newline, base + self.stop, self.max_line, &m)
            if (m.command == INDEX or m.command == REMOVE) and not self.read_only:
                if self.changes >= self.room:
                    break
                self.changes += 1
            self.start = newline + 1 - base
            n += 1
        return n

    def __iter__(self):
        cdef const unsigned char *base
        cdef const unsigned char *newline
        cdef Message m
        while self.start < self.stop:
            base = <const unsigned char *>PyByteArray_AS_STRING(self.buffer)
            newline = <const unsigned char *>memchr(base + self.start, c'\n', self.stop - self.start)
            parse(base + self.start, newline, base + self.stop, self.max_line, &m)
            if (m.command == INDEX or m.command == REMOVE) and not self.read_only:
                if self.changes >= self.room:
                    return
                self.changes += 1
            self.start = newline + 1 - base
            if m.command == MALFORMED:
                yield None
            elif m.command != QUERY and self.read_only:
                yield False
            else:
                yield (
                    "INDEX" if m.command == INDEX else "REMOVE" if m.command == REMOVE else "QUERY",
                    (<const char *>m.name)[:m.length].decode("ascii"),
                    tuple((<const char *>list_of(&m))[:m.newline - list_of(&m)].decode("ascii").split(","))
                    if list_of(&m) != m.newline else (),
                )


cdef class Standing:
    """How far an Index has come. The connections look at it for each chunk, so it is read without Python.

    `settled` is the highest ticket whose replies may be sent. While it is `congested`, it takes no more
    changes: batches get no room for them until a ticket settles.
    """


cdef class Graph:
    """A consistent index of packages in memory.

    With `journalled`, every change also leaves a redo line, dirty files and a ticket:

    - `wake()`, the caller's, is called when there is something to seal;
    - `seal()` closes the open commit and gives its redo lines; `settle(ticket)` says it is durable.
    - `take_dirty()` and `render()` give the packages whose files lag behind, and their contents.
    - `replay()` applies redo lines unjudged; `effect()` writes those that the dirty files need.

    With `defer` the graph answers by itself only what anybody may: QUERYs that rest on nothing unsettled,
    of a connection that waits for nothing. The rest of a batch, from the first other message on, is handed
    to `defer(batch, replies)`, with the replies to what came before; what that returns is the answer.

    Not for several threads at once without the GIL. Raises MemoryError when the system has no memory
    for a change; the graph is then as it was before that message, but the chunk's earlier messages
    have taken effect and their replies are lost: end the process.
    """
    cdef Dependencies g
    cdef Bytes replies
    cdef Bytes redo           # the open commit's lines
    cdef Bytes sealed         # the lines of the commit that is under way
    cdef uint64_t lines       # redo lines in `redo`
    cdef size_t work          # edges that the chunk's changes have touched
    cdef uint64_t counted[12]  # command * 3 + outcome
    cdef Bytes rounds         # handles that take_dirty() took
    cdef size_t rendered      # bytes of them that render() has given
    cdef Bytes slice          # the record of the reverse file that is being copied
    cdef uint32_t slicing     # whose it is; 0: none
    cdef uint32_t entries     # that it has so far
    cdef readonly bint journalled
    cdef readonly uint64_t asked   # INDEX and REMOVE whose answers rest on the open commit
    cdef public object wake        # called when that is no longer 0, and when the open commit is full
    cdef public object defer       # called for what is not to be answered here and now; None: all is
    cdef public bint defers_all    # which every message is
    cdef readonly uint64_t ticket  # of the open commit
    cdef readonly uint64_t settled
    cdef readonly uint64_t changes  # changes made so far: the number of the last one
    cdef public uint64_t limit     # bytes that names and edges may map for an INDEX; 0: any number
    cdef readonly uint64_t beyond_limit  # INDEX messages that were answered FAIL for that

    def __cinit__(self, bint journalled=False):
        secrets = os.urandom(32)
        memcpy(self.g.names.secret, PyBytes_AS_STRING(secrets), 32)
        self.g.names.nodes.unit = 8
        self.g.edges.unit = sizeof(Edge)
        self.journalled = journalled
        self.ticket = 1 if journalled else 0
        if not names_make_room(&self.g.names) or not bytes_reserve(&self.replies, FIRST_MAPPING):
            raise MemoryError("no memory for an empty index")

    def __dealloc__(self):
        graph_release(&self.g)
        bytes_release(&self.replies)
        bytes_release(&self.redo)
        bytes_release(&self.sealed)
        bytes_release(&self.rounds)
        bytes_release(&self.slice)

    # --- the wire -------------------------------------------------------------------------------

    def apply(self, Batch batch not None, bint whole=False):
        """Answer the messages of a batch; with `whole`, those too that would be deferred.

        May stop before the batch's end, for room or because this chunk has been given enough work.
        Returns bytes when all of them may be sent at the same time, once `batch.ticket` is settled;
        otherwise a list of (ticket, bytes, changes): each piece may be sent when its ticket is, and
        answers that many INDEX and REMOVE.
        """
        cdef const unsigned char *base = <const unsigned char *>PyByteArray_AS_STRING(batch.buffer)
        cdef const unsigned char *p = base + batch.start
        cdef const unsigned char *end = base + batch.stop
        cdef Message groups[2][GROUP]
        cdef Message *group = groups[0]
        cdef Message *ahead = groups[1]
        cdef Lines lines = lines_of(p, end)
        cdef Segment segments[SEGMENTS]
        cdef Segment *segment = segments
        cdef Message *m
        cdef char *out
        cdef int coming, parsed, taken, guessed, i, outcome = OK
        cdef uint64_t rests, hits
        cdef bint full = False, asked = self.asked != 0, defers = self.defer is not None and not whole
        if defers and (self.defers_all or batch.waits):
            return self.defer(batch, b"")
        self.replies.size = 0
        self.work = 0
        segment.ticket = 0
        segment.changes = 0
        segment.end = 0
        coming = self.parse_group(&lines, batch.max_line, ahead)
        self.fetch_nodes(ahead, coming)
        while p < end and not full:
            group, ahead = ahead, group
            parsed = taken = guessed = coming
            coming = self.parse_group(&lines, batch.max_line, ahead)
            hits = 0
            if not bytes_reserve(&self.replies, 6 * GROUP):
                raise MemoryError("no memory for replies")
            out = self.replies.data + self.replies.size
            for i in range(parsed):
                m = &group[i]
                if m.node and self.hit(m):
                    memcpy(out, b"OK\n", 4)    # a word; the next reply is written over its last byte
                    out += 3
                    hits += 1
                    continue
                rests = 0
                if m.command == QUERY:
                    outcome = self.query(m, &rests)
                    if defers and rests > self.settled:
                        full = True
                elif m.command == MALFORMED:
                    outcome = ERROR
                elif batch.read_only:
                    outcome = FAIL
                elif (batch.changes >= batch.room or self.work > WORK_LIMIT
                        or self.redo.size > REDO_LIMIT or defers):
                    full = True
                else:
                    while guessed > i:    # they may be wrong now, without looking so
                        guessed -= 1
                        group[guessed].node = 0
                    outcome = self.index(m) if m.command == INDEX else self.remove(m)
                    if outcome < 0:
                        raise MemoryError("no memory for another package or dependency")
                    batch.changes += 1
                    if self.journalled:
                        rests = self.ticket
                        self.asked += 1
                if full:
                    taken = i
                    break
                if rests > segment.ticket and rests > self.settled:
                    segment.end = out - self.replies.data
                    if segment.end or segment.changes:
                        segment += 1
                        segment.changes = 0
                    segment.ticket = rests
                if (m.command == INDEX or m.command == REMOVE) and not batch.read_only:
                    segment.changes += 1
                self.counted[m.command * 3 + outcome] += 1
                if outcome == OK:
                    memcpy(out, b"OK\n", 3)
                    out += 3
                elif outcome == FAIL:
                    memcpy(out, b"FAIL\n", 5)
                    out += 5
                else:
                    memcpy(out, b"ERROR\n", 6)
                    out += 6
            if taken:
                p = group[taken - 1].newline + 1
            self.fetch_nodes(ahead, coming)
            self.counted[QUERY * 3 + OK] += hits
            self.replies.size = out - self.replies.data
        segment.end = self.replies.size
        batch.start = p - base
        if defers and full:
            return self.defer(batch, self.take_replies(0, self.replies.size))
        if self.wake is not None and ((self.asked and not asked) or self.redo.size > REDO_LIMIT):
            self.wake()
        if segment == segments:
            batch.ticket = segment.ticket
            if self.replies.size <= 6:
                return (REPLY_OK if self.replies.size == 3 else
                        REPLY_FAIL if self.replies.size == 5 else
                        PyBytes_FromStringAndSize(self.replies.data, self.replies.size))
            return self.take_replies(0, self.replies.size)
        pieces = []
        rests = 0
        for i in range(<int>(segment - segments) + 1):
            pieces.append((segments[i].ticket, self.take_replies(rests, segments[i].end), segments[i].changes))
            rests = segments[i].end
        return pieces

    cdef inline bytes take_replies(self, size_t start, size_t end):
        return PyBytes_FromStringAndSize(self.replies.data + start, end - start)

    cdef inline int parse_group(self, Lines *lines, size_t max_line, Message *group) noexcept nogil:
        """Parse the next messages, and fetch the buckets of their names. Their number."""
        cdef int n = 0
        cdef Message *m
        cdef Lines ahead = lines[0]    # copies: what is stored in the group might be them, for all that C knows
        cdef Table now
        cdef const unsigned char *p = ahead.start
        names_migrate(&self.g.names, 2 * MIGRATE)    # a table that grows is two to look through
        now = self.g.names.now
        while p < ahead.end and n < GROUP:
            m = group + n
            parse(p, next_newline(&ahead), ahead.end, max_line, m)
            if m.length:
                m.hash = hash_name(self.g.names.secret, m.name, m.length)
                prefetch(home(&now, m.hash))
            p = m.newline + 1
            n += 1
        ahead.start = p
        lines[0] = ahead
        return n

    cdef inline void fetch_nodes(self, Message *group, int n) noexcept nogil:
        """Find the nodes that very likely have the messages' names, and fetch what a QUERY reads of them."""
        cdef int i
        cdef Message *m
        cdef Table now = self.g.names.now
        cdef const char *nodes = self.g.names.nodes.base
        for i in range(n):
            m = group + i
            if m.command == QUERY:
                m.node = fetch_node(&now, nodes, m)
            else:
                m.node = 0
                if m.command != MALFORMED:
                    fetch_node(&now, nodes, m)

    cdef inline bint hit(self, const Message *m) noexcept nogil:
        """Whether the guess was right, and OK is the answer that may be given now."""
        cdef Node *node = node_at(&self.g.names, m.node)
        return (node.len == m.length and not difference(node.name, m.name, m.length)
                and node.flags & INDEXED and node.ticket <= self.settled)

    cdef int query(self, const Message *m, uint64_t *rests) noexcept nogil:
        cdef uint32_t handle = names_find(&self.g.names, m.hash, m.name, m.length)
        cdef Node *node
        if handle == 0:
            return FAIL
        node = node_at(&self.g.names, handle)
        rests[0] = node.ticket
        return OK if node.flags & INDEXED else FAIL

    cdef int index(self, const Message *m) noexcept nogil:
        """OK or FAIL, or -1 when there is no memory (and nothing changed)."""
        cdef Dependencies *g = &self.g
        cdef uint32_t handle = names_find(&g.names, m.hash, m.name, m.length), n = 0, lost, block = 0
        cdef Node *node
        cdef bint new = handle == 0
        cdef int found = self.resolve(m, &n)
        if found != OK:
            return found
        if new:
            if self.limit and not self.fits(m, True, n):
                return FAIL
            handle = names_intern(&g.names, m.hash, m.name, m.length)
            if handle == 0:
                return -1
        node = node_at(&g.names, handle)
        self.work += n + node.ndeps
        if not bytes_reserve(&g.gone, node.ndeps * sizeof(uint32_t)):
            forget_if_unused(g, handle)
            return -1
        lost = subtract(g, node, handles(&g.wanted), n)
        if node.flags & INDEXED and lost == 0 and n == node.ndeps:
            return OK
        if self.limit and not new and not self.fits(m, False, n):
            return FAIL
        if n:
            block = arena_alloc(&g.edges, n)
            if block == 0:
                forget_if_unused(g, handle)
                return -1
        if self.journalled and not self.reserve_redo(m, n + lost + 1):
            if block:
                arena_free(&g.edges, block, n)
            forget_if_unused(g, handle)
            return -1
        if self.journalled:
            put_index_line(g, &self.redo, m, handles(&g.gone), lost)
            self.lines += 1
        replace_edges(g, handle, handles(&g.wanted), n, block, self.journalled)
        node = node_at(&g.names, handle)
        self.changes += 1
        if not node.flags & INDEXED:
            node.flags |= INDEXED
            node.ticket = self.ticket
            g.packages += 1
        if self.journalled:
            mark_dirty(g, handle, FORWARD_DIRTY)
        return OK

    cdef bint fits(self, const Message *m, bint new, uint32_t n) noexcept nogil:
        """Whether a change may map what it needs, for a name if that is `new` and for n dependencies."""
        cdef Names *names = &self.g.names
        cdef Arena *edges = &self.g.edges
        cdef uint64_t for_table = table_growth(names) if new else 0
        cdef uint64_t for_name = arena_growth(&names.nodes, node_units(m.length)) if new else 0
        cdef uint64_t for_edges = arena_growth(edges, n) if n else 0
        cdef uint64_t after = names_mapped(names) + edges.mapped + for_table + for_name + for_edges
        if for_table + for_name + for_edges == 0:
            return True
        if after > self.limit:
            self.beyond_limit += 1
            names_migrate(names, 64 * MIGRATE)    # which insertions would do: its end makes room
            return False
        names.nodes.most = names.nodes.mapped + for_name + (self.limit - after) // 2
        edges.most = edges.mapped + for_edges + (self.limit - after) // 2
        return True

    cdef int resolve(self, const Message *m, uint32_t *n) noexcept nogil:
        """Put the handles of a message's dependencies, sorted, into `wanted`: OK, FAIL if one is not
        indexed, -1 without memory. A group is hashed and fetched ahead, then looked up."""
        cdef Dependencies *g = &self.g
        cdef Table *now = &g.names.now
        cdef const unsigned char *p = list_of(m)
        cdef const unsigned char *end = m.newline
        cdef const unsigned char *items[GROUP]
        cdef uint32_t lengths[GROUP]
        cdef uint32_t hashes[GROUP]
        cdef uint32_t handle
        cdef int count, i
        g.wanted.size = 0
        if not bytes_reserve(&g.wanted, (<size_t>(end - p) // 2 + 1) * sizeof(uint32_t)):
            return -1
        while p < end:
            count = 0
            while p < end and count < GROUP:
                items[count] = p
                p = name_end(p, end)
                lengths[count] = <uint32_t>(p - items[count])
                hashes[count] = hash_name(g.names.secret, items[count], lengths[count])
                prefetch(home(now, hashes[count]))
                count += 1
                p += 1
            if count > 1:
                for i in range(count):
                    prefetch(g.names.nodes.base + <size_t>table_guess(now, hashes[i]) * 8)
            for i in range(count):
                handle = names_find(&g.names, hashes[i], items[i], lengths[i])
                if handle == 0 or not node_at(&g.names, handle).flags & INDEXED:
                    return FAIL
                bytes_put(&g.wanted, &handle, sizeof(uint32_t))
        n[0] = sort_unique(handles(&g.wanted), <uint32_t>(g.wanted.size // sizeof(uint32_t)))
        return OK

    cdef int remove(self, const Message *m) noexcept nogil:
        """OK or FAIL, or -1 when there is no memory (and nothing changed)."""
        cdef Dependencies *g = &self.g
        cdef uint32_t handle = names_find(&g.names, m.hash, m.name, m.length), lost
        cdef Node *node
        cdef Grave grave
        if handle == 0:
            return OK
        node = node_at(&g.names, handle)
        if not node.flags & INDEXED:
            return OK
        if node.nrev > (1 if node.flags & SELF else 0):
            return FAIL
        self.work += node.ndeps
        if not bytes_reserve(&g.gone, node.ndeps * sizeof(uint32_t)):
            return -1
        lost = subtract(g, node, NULL, 0)
        if self.journalled:
            if not self.reserve_redo(m, lost + 1) or not bytes_reserve(&g.buried, sizeof(Grave)):
                return -1
            put_remove_line(g, &self.redo, m.name, m.length, handles(&g.gone), lost)
            self.lines += 1
        replace_edges(g, handle, NULL, 0, 0, self.journalled)
        self.changes += 1
        node.flags &= ~INDEXED
        node.ticket = self.ticket
        g.packages -= 1
        if self.journalled:
            mark_dirty(g, handle, FORWARD_DIRTY)
            node.flags |= BURIED
            grave.ticket = self.ticket
            grave.handle = handle
            bytes_put(&g.buried, &grave, sizeof(Grave))
        else:
            forget_if_unused(g, handle)
        return OK

    cdef inline bint reserve_redo(self, const Message *m, size_t touched) noexcept nogil:
        """Room for the redo line of this message and for `touched` dirty packages."""
        return (bytes_reserve(&self.redo, <size_t>(m.newline - m.name) + 8
                              + self.g.gone.size // sizeof(uint32_t) * (MAX_NAME + 1))
                and reserve_dirty(&self.g, touched))

    # --- commits --------------------------------------------------------------------------------

    @property
    def redo_bytes(self):
        """Bytes of redo lines in the open commit."""
        return self.redo.size

    @property
    def queries(self):
        """QUERY messages answered so far."""
        return self.counted[QUERY * 3 + OK] + self.counted[QUERY * 3 + FAIL]

    @property
    def newest(self):
        """The ticket that the last change rests on; 0 before the first."""
        return self.ticket if self.redo.size else self.ticket - 1

    def ask(self):
        """Let one more answer rest on the open commit, which is then made if only as a proof. Its ticket."""
        self.asked += 1
        if self.asked == 1 and self.wake is not None:
            self.wake()
        return self.ticket

    @property
    def full(self):
        """Whether the open commit takes no more changes; a batch given now stops before the next one."""
        return self.redo.size > REDO_LIMIT

    def note(self, lines):
        """Add notes, complete lines of what became of origins' messages, to the open commit (rule F2).

        Not before its first change: a batch without one would not be read back, so RuntimeError then.
        Raises ValueError if one is no note; none of them is added then."""
        cdef Py_buffer view
        cdef const unsigned char *p
        cdef const unsigned char *end
        cdef const unsigned char *letters = NULL
        if not self.lines:
            raise RuntimeError("a note needs a change to be committed with")
        PyObject_GetBuffer(lines, &view, PyBUF_SIMPLE)
        try:
            p = <const unsigned char *>view.buf
            end = p + view.len
            while p < end:
                p = parse_note(p, end, &letters)
                if p == NULL:
                    raise ValueError("not a note of what became of an origin's messages")
                p += 1
            if not bytes_reserve(&self.redo, view.len):
                raise MemoryError("no memory for another note")
            bytes_put(&self.redo, view.buf, view.len)
        finally:
            PyBuffer_Release(&view)

    def seal(self):
        """Close the open commit: (ticket, redo lines and notes as a memoryview, number of changes).

        The view is good until the next seal(), which must wait for this commit to be settled."""
        cdef Bytes spare = self.sealed
        cdef uint64_t lines = self.lines
        if self.settled + 1 != self.ticket:
            raise RuntimeError("a commit is under way")
        self.sealed = self.redo
        self.redo = spare
        bytes_trim(&self.redo, 1 << 20)
        self.lines = 0
        self.asked = 0
        self.ticket += 1
        view = (PyMemoryView_FromMemory(self.sealed.data, self.sealed.size, PyBUF_READ)
                if self.sealed.size else memoryview(b""))
        return self.ticket - 1, view, lines

    def settle(self, uint64_t ticket):
        """The commit `ticket`, and all before it, are durable and proven."""
        if not self.settled < ticket < self.ticket:
            raise ValueError("no such commit is under way")
        self.settled = ticket
        exhume(&self.g, ticket)

    # --- files ----------------------------------------------------------------------------------

    def take_dirty(self):
        """Begin a round: set aside the packages whose files lag behind. Returns how many they are."""
        cdef Bytes spare
        if self.taken:
            raise RuntimeError("the round before is not rendered yet")
        spare = self.rounds
        self.rounds = self.g.dirty
        self.g.dirty = spare
        bytes_trim(&self.g.dirty, 1 << 20)
        self.rendered = 0
        return self.rounds.size // sizeof(uint32_t)

    def render(self, size_t limit, uint32_t count):
        """The contents of the round's next files, as records that the file writer reads; None at its end.

        At most `count` packages and entries of large files, and no more once `limit` bytes are full;
        b"" when a large file needs another slice. Format: see _redo.pxi."""
        cdef Bytes out
        cdef uint32_t handle
        cdef size_t first = self.rendered
        cdef uint32_t before = self.slicing
        if not self.taken:
            return None
        memset(&out, 0, sizeof(Bytes))
        try:
            if self.slicing:
                self.render_slice(&out, count)
            else:
                while (count and out.size < limit and self.rendered < self.rounds.size
                        and not self.slicing):
                    self.render_next(&out, handles(&self.rounds)[self.rendered // sizeof(uint32_t)])
                    self.rendered += sizeof(uint32_t)
                    count -= 1
            records = PyBytes_FromStringAndSize(out.data, out.size) if out.size else b""
        except MemoryError:
            self.rendered = first
            if self.slicing and not before:
                self.drop_slice()
            raise
        finally:
            bytes_release(&out)
        while first < self.rendered:
            handle = handles(&self.rounds)[first // sizeof(uint32_t)]
            node_at(&self.g.names, handle).flags &= ~(FORWARD_DIRTY | REVERSE_DIRTY)
            forget_if_unused(&self.g, handle)
            first += sizeof(uint32_t)
        return records

    cdef int render_next(self, Bytes *out, uint32_t handle) except -1:
        """One package: its forward file, and its reverse file or the beginning of that."""
        cdef Node *node = node_at(&self.g.names, handle)
        cdef Bytes *to = &self.slice if node.nrev >= LARGE else out
        cdef size_t start = to.size
        cdef uint32_t entries = 0
        if node.flags & FORWARD_DIRTY and not put_forward(&self.g, out, handle):
            raise MemoryError("no memory to render package files")
        if node.flags & REVERSE_DIRTY:
            start = to.size
            if not begin_record(to, node, 1, node.nrev != 0):
                raise MemoryError("no memory to render package files")
            self.g.cursor = node.rev
            if node.nrev >= LARGE:
                self.slicing = handle
                self.entries = 0
                node.flags |= RENDERING
            else:
                if not put_dependents(&self.g, to, &entries, LARGE):
                    raise MemoryError("no memory to render package files")
                end_record(to, start, entries)
        return 0

    cdef int render_slice(self, Bytes *out, uint32_t count) except -1:
        """Go on with a large reverse file; out of memory, the same slice may be asked for again."""
        cdef uint32_t handle = self.slicing
        if not put_dependents(&self.g, &self.slice, &self.entries, count):
            raise MemoryError("no memory to render package files")
        if self.g.cursor == 0:
            if not bytes_reserve(out, self.slice.size + sizeof(uint32_t)):
                raise MemoryError("no memory to render package files")
            end_record(&self.slice, 0, self.entries)
            bytes_put(out, self.slice.data, self.slice.size)
            self.drop_slice()
            forget_if_unused(&self.g, handle)
        return 0

    cdef void drop_slice(self) noexcept:
        node_at(&self.g.names, self.slicing).flags &= ~RENDERING
        self.slicing = 0
        self.g.cursor = 0
        bytes_trim(&self.slice, FIRST_MAPPING)

    @property
    def taken(self):
        """Packages of the round that render() has not given yet."""
        return (self.rounds.size - self.rendered) // sizeof(uint32_t) + (1 if self.slicing else 0)

    def dirty_packages(self):
        """The names of the packages whose forward files lag behind, a round's not counted."""
        return self.dirty_names(FORWARD_DIRTY)

    def dirty_reverses(self):
        """The names of the packages whose reverse files lag behind, a round's not counted."""
        return self.dirty_names(REVERSE_DIRTY) + [name for name, _ in self.owed_reverses()]

    cdef list dirty_names(self, uint8_t what):
        cdef size_t i
        return [self.name_of(handles(&self.g.dirty)[i]) for i in range(self.g.dirty.size // sizeof(uint32_t))
                if node_at(&self.g.names, handles(&self.g.dirty)[i]).flags & what]

    @property
    def dirty(self):
        """Packages whose files lag behind, those of an unfinished round and owed ones not counted."""
        return self.g.dirty.size // sizeof(uint32_t)

    @property
    def owed(self):
        """Packages whose large reverse files are owed."""
        return self.g.owed.size // sizeof(uint32_t)

    def owed_reverses(self):
        """[(package, number of dependents)] of the reverse files that are owed."""
        return [(self.name_of(handles(&self.g.owed)[i]), node_at(&self.g.names, handles(&self.g.owed)[i]).nrev)
                for i in range(self.g.owed.size // sizeof(uint32_t))]

    def owed_lines(self):
        """The owed reverse files as redo lines, for the head of a segment."""
        return "".join([f"*{name}\n" for name, _ in self.owed_reverses()]).encode("ascii")

    def write_owed(self, names):
        """Let the next round write these of the reverse files that are owed."""
        cdef uint32_t handle
        cdef size_t i, kept = 0
        due = set(names)
        if not bytes_reserve(&self.g.dirty, self.g.owed.size):
            raise MemoryError("no memory for another round")
        for i in range(self.g.owed.size // sizeof(uint32_t)):
            handle = handles(&self.g.owed)[i]
            if self.name_of(handle) in due:
                node = node_at(&self.g.names, handle)
                node.flags &= ~REVERSE_OWED
                if not node.flags & (FORWARD_DIRTY | REVERSE_DIRTY):
                    bytes_put(&self.g.dirty, &handle, sizeof(uint32_t))
                node.flags |= REVERSE_DIRTY
            else:
                handles(&self.g.owed)[kept] = handle
                kept += 1
        self.g.owed.size = kept * sizeof(uint32_t)

    # --- recovery -------------------------------------------------------------------------------

    def replay(self, lines, bint track=True, list notes=None):
        """Apply redo lines as they stand, judging nothing (rule W4); with `track` mark the files they touch.

        A dependency that is not indexed is interned all the same: see dangling(). Notes among the lines
        go to the end of `notes` as (origin, first, letters). Returns the number of lines without them.
        Raises ValueError, naming the offset, if one is not a redo line; a note is none without `notes`."""
        cdef Py_buffer view
        cdef const unsigned char *newline
        cdef const unsigned char *letters = NULL
        cdef const unsigned char *start
        cdef const unsigned char *p
        cdef const unsigned char *end
        cdef Redo group[GROUP]
        cdef uint32_t hashes[REPLAY_NAMES]
        cdef int parsed, i
        cdef uint64_t n = 0
        PyObject_GetBuffer(lines, &view, PyBUF_SIMPLE)
        try:
            start = p = <const unsigned char *>view.buf
            end = p + view.len
            while p < end:
                if p[0] == c'@' and notes is not None:
                    newline = parse_note(p, end, &letters)
                    if newline == NULL:
                        raise ValueError(f"not a redo line at byte {p - start}")
                    notes.append((p[1:1 + NOTE_ORIGIN].decode("ascii"),
                                  int(p[2 + NOTE_ORIGIN:letters - p - 1]),
                                  letters[:newline - letters].decode("ascii")))
                    p = newline + 1
                    continue
                parsed = self.parse_redo_group(p, end, group, hashes)
                if parsed == 0:
                    raise ValueError(f"not a redo line at byte {p - start}")
                for i in range(parsed):
                    if not self.redo_line(&group[i], track):
                        raise MemoryError("no memory to replay the journal")
                p = group[parsed - 1].end
                n += parsed
            return n
        finally:
            PyBuffer_Release(&view)

    cdef int parse_redo_group(self, const unsigned char *p, const unsigned char *end, Redo *group,
                              uint32_t *hashes) noexcept nogil:
        """Parse lines ahead, and fetch what they will touch: their cache misses then overlap.

        The number of lines; 0 if the first is none."""
        cdef Names *names = &self.g.names
        cdef Table *now = &names.now
        cdef Redo *r
        cdef uint32_t guesses[REPLAY_NAMES]
        cdef int lines = 0, n = 0, ahead, i
        while p < end and lines < GROUP:
            r = group + lines
            if not parse_redo(p, end, r):
                break
            ahead = hash_redo(names, r, hashes + n, REPLAY_NAMES - n)
            if ahead == 0 and lines:
                break    # it has too many names for what is left: it begins the next group
            if ahead:
                r.hashes = hashes + n
            n += ahead
            p = r.end
            lines += 1
        for i in range(n):
            guesses[i] = table_guess(now, hashes[i])
            prefetch(names.nodes.base + <size_t>guesses[i] * 8)
        for i in range(n):
            if guesses[i]:
                prefetch(edge_at(&self.g, node_at(names, guesses[i]).rev))
        return lines

    cdef uint32_t intern(self, const unsigned char *name, uint32_t length, uint32_t hash) noexcept nogil:
        cdef uint32_t handle = names_find(&self.g.names, hash, name, length)
        return handle if handle else names_intern(&self.g.names, hash, name, length)

    cdef uint32_t intern_anew(self, const unsigned char *name, uint32_t length) noexcept nogil:
        return self.intern(name, length, hash_name(self.g.names.secret, name, length))

    cdef bint redo_line(self, Redo *r, bint track) noexcept nogil:
        cdef Dependencies *g = &self.g
        cdef uint32_t handle, n = 0, lost, block = 0, other, i
        cdef const uint32_t *ahead = r.hashes + 1
        cdef const unsigned char *p
        cdef const unsigned char *item
        cdef Node *node
        if r.hashes != NULL:
            handle = self.intern(r.name, r.length, r.hashes[0])
        else:
            handle = self.intern_anew(r.name, r.length)
        if handle == 0:
            return False
        if r.kind == c'*':
            if track:
                if not reserve_dirty(g, 1):
                    return False
                mark_dirty(g, handle, REVERSE_DIRTY)
            forget_if_unused(g, handle)
            return True
        g.wanted.size = 0
        if not bytes_reserve(&g.wanted, (r.deps_length // 2 + 1) * sizeof(uint32_t)):
            return False
        p = r.deps
        while p < r.deps + r.deps_length:
            item = p
            p = name_end(p, r.deps + r.deps_length)
            if r.hashes != NULL:
                other = self.intern(item, <uint32_t>(p - item), ahead[0])
                ahead += 1
            else:
                other = self.intern_anew(item, <uint32_t>(p - item))
            if other == 0:
                return False
            bytes_put(&g.wanted, &other, sizeof(uint32_t))
            p += 1
        n = sort_unique(handles(&g.wanted), <uint32_t>(g.wanted.size // sizeof(uint32_t)))
        node = node_at(&g.names, handle)
        if not bytes_reserve(&g.gone, node.ndeps * sizeof(uint32_t)):
            return False
        lost = subtract(g, node, handles(&g.wanted), n)
        if not reserve_dirty(g, n + lost + 1):
            return False
        if n:
            block = arena_alloc(&g.edges, n)
            if block == 0:
                return False
        replace_edges(g, handle, handles(&g.wanted), n, block, track)
        node = node_at(&g.names, handle)
        if r.kind == c'+':
            if not node.flags & INDEXED:
                node.flags |= INDEXED
                g.packages += 1
        elif node.flags & INDEXED:
            node.flags &= ~INDEXED
            g.packages -= 1
        if track:
            # Whatever the files look like now: a round that was cut short may have written some of
            # those that this change touches and not the others (rule C7).
            mark_dirty(g, handle, FORWARD_DIRTY)
            for i in range(n):
                mark_dirty(g, edge_at(g, block + i).target, REVERSE_DIRTY)
            p = r.gone
            while p < r.gone + r.gone_length:
                item = p
                p = name_end(p, r.gone + r.gone_length)
                other = self.intern_anew(item, <uint32_t>(p - item))
                if other == 0 or not reserve_dirty(g, 1):
                    return False
                mark_dirty(g, other, REVERSE_DIRTY)
                p += 1
        else:
            for i in range(lost):
                forget_if_unused(g, handles(&g.gone)[i])
            if not (lost and has_handle(&g.gone, handle)):
                forget_if_unused(g, handle)
        return True

    def walk(self, uint32_t after=0, size_t limit=1 << 16, uint32_t count=1 << 30):
        """Indexed packages as redo lines, in the order of memory: (lines, number of them, the last one).

        At most `count` places are looked at, freed ones among them, and no more once `limit` bytes are
        full; `after` is what the call before gave as the last one, 0 at the beginning and at the end. Every
        package that is indexed during the whole walk is met; one that changes meanwhile as it is or was, or
        not at all."""
        cdef Bytes out
        cdef uint32_t n = 0
        cdef bint freed = False
        cdef Node *node
        memset(&out, 0, sizeof(Bytes))
        try:
            while count and out.size < limit:
                after = names_next(&self.g.names, after, &freed)
                if after == 0:
                    break
                count -= 1
                node = node_at(&self.g.names, after)
                if not freed and node.flags & INDEXED:
                    if not bytes_reserve(&out, (<size_t>node.ndeps + 2) * (MAX_NAME + 4)):
                        raise MemoryError("no memory to copy the index")
                    put_line(&self.g, &out, node)
                    n += 1
            return (PyBytes_FromStringAndSize(out.data, out.size) if out.size else b""), n, after
        finally:
            bytes_release(&out)

    def effect(self):
        """Redo lines that bring any older state of the dirty packages' files to this one (rule C6).

        Raises RuntimeError while a round is being rendered: its packages are not in the list."""
        cdef Bytes out
        cdef size_t i
        if self.taken:
            raise RuntimeError("a round is being rendered")
        memset(&out, 0, sizeof(Bytes))
        try:
            for i in range(self.g.dirty.size // sizeof(uint32_t)):
                if not put_effect(&self.g, &out, handles(&self.g.dirty)[i]):
                    raise MemoryError("no memory for the journal's head")
            for i in range(self.g.owed.size // sizeof(uint32_t)):
                if not put_owed(&self.g, &out, handles(&self.g.owed)[i]):
                    raise MemoryError("no memory for the journal's head")
            return PyBytes_FromStringAndSize(out.data, out.size) if out.size else b""
        finally:
            bytes_release(&out)

    def continue_at(self, uint64_t changes):
        """Number the next change `changes` + 1."""
        self.changes = changes

    def dangling(self, Py_ssize_t limit=10):
        """Up to `limit` (package, dependency) pairs whose dependency is not indexed; [] in a sound index."""
        found = []
        for handle in self.all_handles():
            if len(found) >= limit:
                break
            if not node_at(&self.g.names, handle).flags & INDEXED:
                for name in self.names_of(handle, True):
                    found.append((name, self.name_of(handle)))
        return found[:limit]

    # --- reading --------------------------------------------------------------------------------

    cdef str name_of(self, uint32_t handle):
        cdef Node *node = node_at(&self.g.names, handle)
        return (<const char *>node.name)[:node.len].decode("ascii")

    cdef list names_of(self, uint32_t handle, bint reverse):
        """The dependencies of a node, or its dependents, sorted."""
        cdef Node *node = node_at(&self.g.names, handle)
        cdef uint32_t i, edge
        names = []
        if reverse:
            edge = node.rev
            while edge:
                names.append(self.name_of(edge_at(&self.g, edge).source))
                edge = edge_at(&self.g, edge).next
        else:
            for i in range(node.ndeps):
                names.append(self.name_of(edge_at(&self.g, node.deps + i).target))
        names.sort()
        return names

    cdef list all_handles(self):
        cdef bint freed = False
        cdef uint32_t handle = names_next(&self.g.names, 0, &freed)
        handles = []
        while handle:
            if not freed:
                handles.append(handle)
            handle = names_next(&self.g.names, handle, &freed)
        return handles

    cdef uint32_t handle_of(self, str name) except? 0:
        cdef bytes raw
        cdef const unsigned char *p
        if not name.isascii() or not 1 <= len(name) <= MAX_NAME:
            return 0
        raw = name.encode("ascii")
        p = raw
        return names_find(&self.g.names, hash_name(self.g.names.secret, p, <uint32_t>len(raw)), p, <uint32_t>len(raw))

    def __len__(self):
        """The number of indexed packages."""
        return self.g.packages

    def __contains__(self, str name):
        cdef uint32_t handle = self.handle_of(name)
        return handle != 0 and node_at(&self.g.names, handle).flags & INDEXED

    def __iter__(self):
        """The indexed packages' names, in no order; the graph must not change meanwhile."""
        for handle in self.all_handles():
            if node_at(&self.g.names, handle).flags & INDEXED:
                yield self.name_of(handle)

    def dependencies(self, str name):
        """The names that a package depends on, sorted; [] if it is not indexed."""
        cdef uint32_t handle = self.handle_of(name)
        return self.names_of(handle, False) if handle else []

    def dependents(self, str name):
        """The names that depend on a package, sorted; [] if it is not indexed."""
        cdef uint32_t handle = self.handle_of(name)
        return self.names_of(handle, True) if handle else []

    def stats(self):
        """Counts, and bytes of memory as mapped for each part (slack included)."""
        memory = {
            "names": names_mapped(&self.g.names),
            "edges": self.g.edges.mapped,
            "scratch": (self.g.wanted.mapped + self.g.gone.mapped + self.replies.mapped),
            "journal": (self.redo.mapped + self.sealed.mapped + self.g.buried.mapped),
            "dirty": self.g.dirty.mapped + self.rounds.mapped,
        }
        return {
            "packages": self.g.packages,
            "names": self.g.names.count,
            "dependencies": self.g.links,
            "changes": self.changes,
            "beyond_max_index": self.beyond_limit,
            "ticket": self.ticket,
            "settled": self.settled,
            "messages": {
                f"{command}_{outcome}": self.counted[c * 3 + o]
                for c, command in ((INDEX, "index"), (REMOVE, "remove"), (QUERY, "query"))
                for o, outcome in ((OK, "ok"), (FAIL, "fail"))
            } | {"error": self.counted[MALFORMED * 3 + ERROR]},
            "memory": memory,
            "bytes": sum(memory.values()),
        }

    def verify(self):
        """Walk everything and raise AssertionError at the first broken link. For tests."""
        cdef uint64_t packages = 0, links = 0, back
        cdef uint32_t i, edge, before
        cdef Node *node
        for handle in self.all_handles():
            node = node_at(&self.g.names, handle)
            name = self.name_of(handle)
            expect(self.handle_of(name) == handle, name, "is not found by its name")
            expect(still_needed(node), name, "is kept for nothing")
            packages += 1 if node.flags & INDEXED else 0
            links += node.ndeps
            before = 0
            for i in range(node.ndeps):
                expect(edge_at(&self.g, node.deps + i).source == handle, name, "has an edge of another source")
                expect(edge_at(&self.g, node.deps + i).target > before, name, "has edges out of order")
                before = edge_at(&self.g, node.deps + i).target
            expect(bool(node.flags & SELF) == has_target(&self.g, node, handle), name, "has a wrong self flag")
            back = 0
            before = 0
            edge = node.rev
            while edge:
                expect(edge_at(&self.g, edge).target == handle, name, "has another's reverse edge")
                expect(edge_at(&self.g, edge).prev == before, name, "has a broken list of reverse edges")
                before = edge
                edge = edge_at(&self.g, edge).next
                back += 1
            expect(back == node.nrev, name, "has a wrong count of dependents")
        expect(packages == self.g.packages, "the index", "has a wrong count of packages")
        expect(links == self.g.links, "the index", "has a wrong count of dependencies")


cdef inline int expect(bint holds, str name, str otherwise) except -1:
    if not holds:
        raise AssertionError(f"{name} {otherwise}")
    return 0


cpdef Py_ssize_t lines_end(bytearray buffer, Py_ssize_t start, Py_ssize_t end) except -1:
    """Where the complete lines of buffer[start:end] end: behind its last newline; 0 if it has none."""
    cdef const char *base
    cdef const void *found
    if buffer is None or not 0 <= start <= end <= len(buffer):
        raise ValueError("no such part of the buffer")
    base = PyByteArray_AS_STRING(buffer)
    found = memrchr(base + start, c'\n', end - start)
    return <const char *>found - base + 1 if found != NULL else 0


def crc32c(data, uint32_t start=0):
    """CRC-32C (Castagnoli, as in RFC 3720) of bytes, continuing `start`."""
    cdef Py_buffer view
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        return crc32c_update(start, <const unsigned char *>view.buf, view.len)
    finally:
        PyBuffer_Release(&view)


def crc32c_by_table(data, uint32_t start=0):
    """crc32c() as a machine without the instruction computes it. For tests."""
    cdef Py_buffer view
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        return ~crc32c_portable(~start, <const unsigned char *>view.buf, view.len)
    finally:
        PyBuffer_Release(&view)


def name_length(data, bint portable=False):
    """How many of the first bytes of `data` a name may have. `portable`: as any processor tells. For tests."""
    cdef Py_buffer view
    cdef const unsigned char *p
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        if view.len == 0 or in_name[(<const unsigned char *>view.buf)[view.len - 1]]:
            raise ValueError("there must be an end")
        p = <const unsigned char *>view.buf
        return (name_end_portable if portable else name_end)(p, p + view.len) - p
    finally:
        PyBuffer_Release(&view)


def is_all_name(data, Py_ssize_t stop, bint portable=False):
    """Whether a name may have all of data[:stop]; what follows is looked at, not counted. For tests."""
    cdef Py_buffer view
    cdef const unsigned char *p
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        if not 0 <= stop < view.len or in_name[(<const unsigned char *>view.buf)[stop]]:
            raise ValueError("there must be an end")
        p = <const unsigned char *>view.buf
        return bool(is_name_portable(p, p + stop) if portable else is_name(p, p + stop, p + view.len))
    finally:
        PyBuffer_Release(&view)


def newline_offsets(data, bint portable=False):
    """Where the newlines of the first 64 bytes of `data` are. For tests."""
    cdef Py_buffer view
    cdef const unsigned char *p
    cdef uint64_t found
    PyObject_GetBuffer(data, &view, PyBUF_SIMPLE)
    try:
        p = <const unsigned char *>view.buf
        found = newlines_portable(p, min(view.len, 64)) if portable else newlines(p, p + view.len)
    finally:
        PyBuffer_Release(&view)
    return [i for i in range(64) if found >> i & 1]


def matching_slots(hashes, uint32_t sought, bint portable=False):
    """Which slots of a bucket with these hashes have the one that is sought. For tests."""
    cdef Bucket bucket
    cdef uint32_t i
    cdef unsigned int found
    for i in range(BUCKET_SLOTS):
        bucket.hash[i] = hashes[i]
    found = (bucket_matches_portable if portable else bucket_matches)(&bucket, sought)
    return [i for i in range(BUCKET_SLOTS) if found >> i & 1]


def fail_allocation(long n):
    """Make the n-th allocation from now and all after it fail; -1: none. For tests."""
    global fail_allocation_in
    fail_allocation_in = n
