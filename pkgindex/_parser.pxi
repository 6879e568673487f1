# Parser: one line of the wire protocol, checked byte by byte against a table of classes.
#
# A complete line ends in "\n", which is in no name: the scan needs no other bound. What a name may
# be made of: visible ASCII without the two separators.

ctypedef enum Command:
    MALFORMED = 0
    INDEX = 1
    REMOVE = 2
    QUERY = 3

ctypedef struct Message:
    Command command
    uint32_t length      # of the name
    uint32_t hash        # of the name
    uint32_t node        # that very likely has the name, as long as nothing changes; 0: not looked for
    const unsigned char *name
    const unsigned char *deps        # "dep,dep" as it was sent; NULL when there are none
    size_t deps_length

# The first six bytes of a line as one little-endian word (both supported machines are little-endian).
cdef uint64_t WORD_INDEX, WORD_QUERY, WORD_REMOVE
memcpy(&WORD_INDEX, b"INDEX|\0\0", 8)
memcpy(&WORD_QUERY, b"QUERY|\0\0", 8)
memcpy(&WORD_REMOVE, b"REMOVE\0\0", 8)

cdef enum:
    SHORTEST_LINE = 9    # QUERY|a|\n


cdef inline const unsigned char *parse(const unsigned char *p, const unsigned char *end, size_t max_line,
                                       Message *m) noexcept nogil:
    """Parse the line at `p` and return where the next one begins. The byte before `end` is a newline."""
    cdef const unsigned char *q
    cdef const unsigned char *item
    cdef uint64_t word
    m.command = MALFORMED
    if end - p >= SHORTEST_LINE:
        word = load8(p) & 0xFFFFFFFFFFFFULL
        q = p + 6
        if word == WORD_QUERY:
            m.command = QUERY
        elif word == WORD_INDEX:
            m.command = INDEX
        elif word == WORD_REMOVE and q[0] == c'|':
            m.command = REMOVE
            q += 1
        if m.command != MALFORMED:
            m.name = q
            q = name_end(q, end)
            m.length = <uint32_t>(q - m.name)
            if q[0] == c'|' and 1 <= q - m.name <= MAX_NAME:
                q += 1
                m.deps = q
                if q[0] == c'\n':
                    m.deps_length = 0
                    return within(p, q, max_line, m)
                while True:
                    item = q
                    q = name_end(q, end)
                    if not 1 <= q - item <= MAX_NAME:
                        break
                    if q[0] == c'\n':
                        m.deps_length = q - m.deps
                        return within(p, q, max_line, m)
                    if q[0] != c',':
                        break
                    q += 1
            m.command = MALFORMED
            p = q
    return <const unsigned char *>memchr(p, c'\n', end - p) + 1


cdef inline const unsigned char *within(const unsigned char *p, const unsigned char *newline, size_t max_line,
                                        Message *m) noexcept nogil:
    if <size_t>(newline - p) > max_line:
        m.command = MALFORMED
    return newline + 1
