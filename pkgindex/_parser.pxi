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
    uint32_t length      # of the name; 0 if malformed
    uint32_t hash        # of the name
    uint32_t node        # that very likely has the name, while nothing changes, if it is a QUERY; else 0
    const unsigned char *name        # behind it stands "|", and then the dependencies as they were sent
    const unsigned char *newline

# The first six bytes of a line as one little-endian word (both supported machines are little-endian).
cdef uint64_t WORD_INDEX, WORD_QUERY, WORD_REMOVE
memcpy(&WORD_INDEX, b"INDEX|\0\0", 8)
memcpy(&WORD_QUERY, b"QUERY|\0\0", 8)
memcpy(&WORD_REMOVE, b"REMOVE\0\0", 8)

cdef enum:
    SHORTEST_LINE = 9    # QUERY|a|\n


cdef inline void parse(const unsigned char *p, const unsigned char *newline, const unsigned char *end,
                       size_t max_line, Message *m) noexcept nogil:
    """Parse the line at `p`, whose newline is known; what is readable ends at `end`."""
    cdef const unsigned char *q = p + 6
    cdef Command command
    cdef uint64_t word
    m.command = MALFORMED
    m.length = 0
    m.newline = newline
    if unlikely(newline - p < SHORTEST_LINE - 1 or <size_t>(newline - p) > max_line):
        return
    word = load8(p) & 0xFFFFFFFFFFFFULL
    if likely(word == WORD_QUERY):
        command = QUERY
    elif word == WORD_INDEX:
        command = INDEX
    elif word == WORD_REMOVE and q[0] == c'|':
        command = REMOVE
        q += 1
    else:
        return
    m.name = q
    if (newline - 1)[0] == c'|' and is_name(q, newline - 1, end):
        q = newline - 1
    else:
        q = name_end(q, end)
        if q[0] != c'|' or not is_list(q + 1, newline, end):
            return
    if likely(1 <= q - m.name <= MAX_NAME):
        m.command = command
        m.length = <uint32_t>(q - m.name)


cdef inline const unsigned char *list_of(const Message *m) noexcept nogil:
    """Where the dependencies begin. They end at the newline."""
    return m.name + m.length + 1


cdef bint is_list(const unsigned char *p, const unsigned char *newline, const unsigned char *end) noexcept nogil:
    """Whether there are names from `p` up to the newline, with commas between."""
    cdef const unsigned char *item
    while True:
        item = p
        p = name_end(p, end)
        if not 1 <= p - item <= MAX_NAME:
            return False
        if p == newline:
            return True
        if p[0] != c',':
            return False
        p += 1
