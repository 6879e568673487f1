# Redo lines, which the journal holds and recovery replays, and the records that become package files.
#
#     +openssl@1.1|ca-certificates|perl     openssl@1.1 is indexed; its whole dependency list; what the
#                                           change took away from it, so that no reverse file is forgotten
#     -wget|gettext,libidn2                 wget is removed; what it depended on until then
#     *zlib                                 zlib's reverse file is owed (in a segment's head only)
#     @0f3c… 1041 OOFEO                     what became of messages 1041 to 1045 of the origin 0f3c… (32
#                                           digits): OK, FAIL or ERROR. A note (in a batch only, rule F2):
#                                           it is no change, is not counted as one, and no graph shows it
#
# Large reverse files are owed: written rarely (N2), and named until then in the head of each segment.
#
# A record of render(), numbers in the machine's byte order:
#
#     u32 size of the record | u8 kind (0 forward, 1 reverse) | u8 exists | u8 name length | u8 0 |
#     u32 number of entries | name | entries, each u8 length and the name | zeros to a multiple of 4
#
# Redo lines are absolute: replaying one twice, or over a newer file, gives the same (rule W4).

ctypedef struct Redo:
    char kind
    uint32_t length
    const unsigned char *name
    const unsigned char *deps
    size_t deps_length
    const unsigned char *gone
    size_t gone_length
    const unsigned char *end
    const uint32_t *hashes    # of its name and its dependencies, in order; NULL: not computed ahead

ctypedef struct Record:
    uint32_t size
    uint8_t kind
    uint8_t exists
    uint8_t length
    uint8_t zero
    uint32_t entries


cdef inline void put_names(Dependencies *g, Bytes *out, const uint32_t *which, uint32_t n) noexcept nogil:
    cdef uint32_t i
    cdef Node *node
    for i in range(n):
        if i:
            bytes_put_char(out, c',')
        node = node_at(&g.names, which[i])
        bytes_put(out, node.name, node.len)


cdef inline void put_index_line(Dependencies *g, Bytes *out, const Message *m, const uint32_t *gone,
                                uint32_t lost) noexcept nogil:
    bytes_put_char(out, c'+')
    bytes_put(out, m.name, m.length)
    bytes_put_char(out, c'|')
    bytes_put(out, list_of(m), m.newline - list_of(m))
    bytes_put_char(out, c'|')
    put_names(g, out, gone, lost)
    bytes_put_char(out, c'\n')


cdef inline void put_remove_line(Dependencies *g, Bytes *out, const unsigned char *name, uint32_t length,
                                 const uint32_t *gone, uint32_t lost) noexcept nogil:
    bytes_put_char(out, c'-')
    bytes_put(out, name, length)
    bytes_put_char(out, c'|')
    put_names(g, out, gone, lost)
    bytes_put_char(out, c'\n')


cdef const unsigned char *scan_list(const unsigned char *p, const unsigned char *end) noexcept nogil:
    """The end of "name,name", which may be empty; NULL if it is not that."""
    cdef const unsigned char *item
    if not in_name[p[0]]:
        return p
    while True:
        item = p
        p = name_end(p, end)
        if not 1 <= p - item <= MAX_NAME:
            return NULL
        if p[0] != c',':
            return p
        p += 1


cdef bint parse_redo(const unsigned char *p, const unsigned char *end, Redo *r) noexcept nogil:
    """Parse the line at `p`. False if it is none, or has no newline before `end`."""
    if memchr(p, c'\n', end - p) == NULL:
        return False
    r.kind = <char>p[0]
    r.name = p + 1
    p = name_end(r.name, end)
    r.length = <uint32_t>(p - r.name)
    if not 1 <= p - r.name <= MAX_NAME:
        return False
    r.deps = r.gone = p
    r.deps_length = r.gone_length = 0
    if r.kind == c'+':
        if p[0] != c'|':
            return False
        r.deps = p + 1
        p = scan_list(r.deps, end)
        if p == NULL:
            return False
        r.deps_length = p - r.deps
    if r.kind == c'+' or r.kind == c'-':
        if p[0] != c'|':
            return False
        r.gone = p + 1
        p = scan_list(r.gone, end)
        if p == NULL:
            return False
        r.gone_length = p - r.gone
    elif r.kind != c'*':
        return False
    if p[0] != c'\n':
        return False
    r.end = p + 1
    r.hashes = NULL
    return True


cdef enum:
    NOTE_ORIGIN = 32     # hexadecimal digits
    NOTE_FIRST = 18      # decimal digits at most


cdef const unsigned char *parse_note(const unsigned char *p, const unsigned char *end,
                                     const unsigned char **letters) noexcept nogil:
    """The newline of the note at `p`, and where its letters begin; NULL if it is none."""
    cdef const unsigned char *newline = <const unsigned char *>memchr(p, c'\n', end - p)
    cdef const unsigned char *digits = p + 1 + NOTE_ORIGIN + 1
    cdef const unsigned char *q
    if newline == NULL or newline < digits or p[0] != c'@' or digits[-1] != c' ':
        return NULL
    q = p + 1
    while q < digits - 1:
        if not (c'0' <= q[0] <= c'9' or c'a' <= q[0] <= c'f'):
            return NULL
        q += 1
    q = digits
    while c'0' <= q[0] <= c'9':    # a newline is there to end it
        q += 1
    if not 1 <= q - digits <= NOTE_FIRST or digits[0] == c'0' or q[0] != c' ':
        return NULL
    letters[0] = q = q + 1
    while q[0] == c'O' or q[0] == c'F' or q[0] == c'E':
        q += 1
    return newline if q == newline and q > letters[0] else NULL


cdef void put_line(Dependencies *g, Bytes *out, Node *node) noexcept nogil:
    """The redo line that says what is now; the caller has reserved (dependencies + 2) long names' room."""
    cdef uint32_t i
    bytes_put_char(out, c'+' if node.flags & INDEXED else c'-')
    bytes_put(out, node.name, node.len)
    bytes_put_char(out, c'|')
    if node.flags & INDEXED:
        for i in range(node.ndeps):
            if i:
                bytes_put_char(out, c',')
            put_names(g, out, &edge_at(g, node.deps + i).target, 1)
        bytes_put_char(out, c'|')
    bytes_put_char(out, c'\n')


cdef bint put_effect(Dependencies *g, Bytes *out, uint32_t handle) noexcept nogil:
    """The redo lines that a dirty package's files need; False without memory."""
    cdef Node *node = node_at(&g.names, handle)
    if not bytes_reserve(out, (<size_t>node.ndeps + 2) * (MAX_NAME + 4)):
        return False
    if node.flags & FORWARD_DIRTY:
        put_line(g, out, node)
    return not node.flags & REVERSE_DIRTY or put_owed(g, out, handle)


cdef bint put_owed(Dependencies *g, Bytes *out, uint32_t handle) noexcept nogil:
    cdef Node *node = node_at(&g.names, handle)
    if not bytes_reserve(out, MAX_NAME + 2):
        return False
    bytes_put_char(out, c'*')
    bytes_put(out, node.name, node.len)
    bytes_put_char(out, c'\n')
    return True


cdef inline bint put_entry(Dependencies *g, Bytes *out, uint32_t handle) noexcept nogil:
    cdef Node *node = node_at(&g.names, handle)
    if not bytes_reserve(out, MAX_NAME + 4):
        return False
    bytes_put_char(out, <char>node.len)
    bytes_put(out, node.name, node.len)
    return True


cdef bint begin_record(Bytes *out, Node *node, uint8_t kind, bint exists) noexcept nogil:
    cdef Record record
    if not bytes_reserve(out, sizeof(Record) + MAX_NAME + 4):
        return False
    record.size = 0
    record.kind = kind
    record.exists = exists
    record.length = node.len
    record.zero = 0
    record.entries = 0
    bytes_put(out, &record, sizeof(Record))
    bytes_put(out, node.name, node.len)
    return True


cdef void end_record(Bytes *out, size_t start, uint32_t entries) noexcept nogil:
    """There is room for three more bytes: each entry, and the name, reserve more than they take."""
    cdef Record *record
    while out.size & 3:
        bytes_put_char(out, 0)
    record = <Record *>(out.data + start)
    record.size = <uint32_t>(out.size - start)
    record.entries = entries
    if record.kind:
        record.exists = entries != 0     # no dependents, no file (N2)


cdef bint put_forward(Dependencies *g, Bytes *out, uint32_t handle) noexcept nogil:
    """The record of a package's forward file; False without memory."""
    cdef Node *node = node_at(&g.names, handle)
    cdef size_t start = out.size
    cdef uint32_t i
    if not begin_record(out, node, 0, node.flags & INDEXED):
        return False
    for i in range(node.ndeps):
        if not put_entry(g, out, edge_at(g, node.deps + i).target):
            return False
    end_record(out, start, node.ndeps)
    return True


cdef bint put_dependents(Dependencies *g, Bytes *out, uint32_t *entries, uint32_t limit) noexcept nogil:
    """Append up to `limit` dependents from the cursor on; False without memory.

    The list may change between two slices: an edge that goes takes the cursor along, one that comes
    stands before it. Either has marked the package again, so a later round writes what this one missed."""
    cdef uint32_t edge
    while g.cursor and limit:
        edge = g.cursor
        if not put_entry(g, out, edge_at(g, edge).source):
            return False
        g.cursor = edge_at(g, edge).next
        entries[0] += 1
        limit -= 1
    return True


cdef int hash_redo(Names *names, const Redo *r, uint32_t *hashes, int room) noexcept nogil:
    """Hash a line's name and its dependencies, and fetch their slots; their number, 0 if too many."""
    cdef Table *now = &names.now
    cdef const unsigned char *p = r.deps
    cdef const unsigned char *end = r.deps + r.deps_length
    cdef const unsigned char *item
    cdef int n = 1
    if room == 0:
        return 0
    hashes[0] = hash_name(names.secret, r.name, r.length)
    prefetch(home(now, hashes[0]))
    while p < end:
        if n == room:
            return 0
        item = p
        p = name_end(p, end)
        hashes[n] = hash_name(names.secret, item, <uint32_t>(p - item))
        prefetch(home(now, hashes[n]))
        n += 1
        p += 1
    return n
