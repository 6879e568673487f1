# Names: every package's name once, found through an open-addressing hash table.
#
# A node is a small header with its name behind it, in 8-byte units of an arena. A slot of the table
# holds a node's handle and 32 bits of its keyed hash: probing touches a node only when those agree.
# The hash multiplies 64-bit words by secrets drawn for each process (the construction of wyhash and
# foldhash: 64 x 64 -> 128 bits, both halves folded): strangers choose the names, so they must not be
# able to choose the collisions. The table doubles a few slots at a time, so no message ever pays for
# a whole rehash.

cdef enum:
    INDEXED = 1          # the package is in the index
    FORWARD_DIRTY = 2    # its forward file lags behind
    REVERSE_DIRTY = 4    # its reverse file lags behind
    SELF = 8             # it depends on itself
    BURIED = 16          # removed, kept until the removal is durable
    REVERSE_OWED = 32    # its reverse file lags behind, and is so large that it is written rarely
    RENDERING = 64       # its reverse file is being copied, a slice at a time
    FREED = 128          # no node any more: a block that waits for the next of its size

    FIRST_SLOTS = 1024
    MIGRATE = 16         # old slots moved at each insertion: done long before the new table fills
    MOVED = 0xFFFFFFFFU
    MAX_NAME = 255

ctypedef packed struct Node:
    uint64_t ticket      # the commit that its last coming or going rests on
    uint32_t deps        # its block of edges, sorted by target
    uint32_t ndeps
    uint32_t rev         # the first edge that points at it
    uint32_t nrev
    uint8_t flags
    uint8_t len
    uint8_t name[6]      # `len` bytes in truth

cdef enum:
    NODE_HEADER = 26

ctypedef struct Slot:
    uint32_t hash
    uint32_t node

ctypedef struct Table:
    Slot *slots
    uint64_t mask        # number of slots less one

ctypedef struct Names:
    Arena nodes
    Table now
    Table old            # being emptied into `now`; slots is NULL when there is none
    uint64_t moved       # old slots below this one are empty
    uint64_t count
    uint64_t secret[4]


cdef inline uint64_t load8(const unsigned char *p) noexcept nogil:
    cdef uint64_t v
    memcpy(&v, p, 8)
    return v


cdef inline uint64_t load4(const unsigned char *p) noexcept nogil:
    cdef uint32_t v
    memcpy(&v, p, 4)
    return v


cdef inline uint64_t fold(uint64_t a, uint64_t b) noexcept nogil:
    cdef uint128_t product = <uint128_t>a * b
    return <uint64_t>product ^ <uint64_t>(product >> 64)


cdef inline uint32_t hash_name(const uint64_t *secret, const unsigned char *p, uint32_t n) noexcept nogil:
    cdef uint64_t a, b, state = secret[0] ^ n
    cdef const unsigned char *end = p + n
    while n > 16:
        state = fold(load8(p) ^ secret[1], load8(p + 8) ^ state)
        p += 16
        n -= 16
    if n >= 8:
        a = load8(p)
        b = load8(end - 8)
    elif n >= 4:
        a = load4(p)
        b = load4(end - 4)
    else:
        a = (<uint64_t>p[0] << 16) | (<uint64_t>p[n >> 1] << 8) | p[n - 1]
        b = 0
    state = fold(a ^ secret[1], b ^ state)
    return <uint32_t>fold(state ^ secret[2], secret[3])


cdef inline bint same_name(const unsigned char *a, const unsigned char *b, uint32_t n) noexcept nogil:
    """memcmp() == 0 without the call: words, the last of which may overlap the one before."""
    cdef const unsigned char *last
    if n >= 8:
        last = a + n - 8
        if load8(last) != load8(b + n - 8):
            return False
        while a < last:
            if load8(a) != load8(b):
                return False
            a += 8
            b += 8
        return True
    if n >= 4:
        return load4(a) == load4(b) and load4(a + n - 4) == load4(b + n - 4)
    return a[0] == b[0] and a[n >> 1] == b[n >> 1] and a[n - 1] == b[n - 1]


cdef inline Node *node_at(Names *names, uint32_t handle) noexcept nogil:
    return <Node *>(names.nodes.base + <size_t>handle * 8)


cdef inline bint is_named(Names *names, uint32_t handle, const unsigned char *name,
                          uint32_t length) noexcept nogil:
    cdef Node *node = node_at(names, handle)
    return node.len == length and same_name(node.name, name, length)


cdef inline uint32_t node_units(uint32_t length) noexcept nogil:
    return (NODE_HEADER + length + 7) >> 3


cdef inline bint table_find(Names *names, Table *t, uint32_t hash, const unsigned char *name,
                            uint32_t length, uint64_t *at) noexcept nogil:
    """Whether the name is in this table; `at` is its slot, or the empty one where the probe ended."""
    cdef uint64_t i = hash & t.mask
    cdef Slot *slot
    while True:
        slot = t.slots + i
        if slot.node == 0:
            at[0] = i
            return False
        if slot.hash == hash and slot.node != MOVED:
            if is_named(names, slot.node, name, length):
                at[0] = i
                return True
        i = (i + 1) & t.mask


cdef inline uint32_t table_guess(Table *t, uint32_t hash) noexcept nogil:
    """The first node with this hash, which is very likely the one sought, or 0; the node is not touched."""
    cdef uint64_t i = hash & t.mask
    while t.slots[i].hash != hash and t.slots[i].node != 0:
        i = (i + 1) & t.mask
    return t.slots[i].node


cdef inline uint32_t names_find(Names *names, uint32_t hash, const unsigned char *name,
                                uint32_t length) noexcept nogil:
    """The handle of this name's node, or 0."""
    cdef uint64_t at
    if table_find(names, &names.now, hash, name, length, &at):
        return names.now.slots[at].node
    if names.old.slots != NULL and table_find(names, &names.old, hash, name, length, &at):
        return names.old.slots[at].node
    return 0


cdef inline void table_put(Table *t, uint32_t hash, uint32_t handle) noexcept nogil:
    cdef uint64_t i = hash & t.mask
    while t.slots[i].node != 0:
        i = (i + 1) & t.mask
    t.slots[i].hash = hash
    t.slots[i].node = handle


cdef void names_migrate(Names *names, uint64_t slots) noexcept nogil:
    cdef uint64_t last = names.moved + slots
    cdef Slot *slot
    if last > names.old.mask + 1:
        last = names.old.mask + 1
    while names.moved < last:
        slot = names.old.slots + names.moved
        if slot.node != 0 and slot.node != MOVED:
            table_put(&names.now, slot.hash, slot.node)
            slot.node = MOVED            # later probes of the old table must pass over it
        names.moved += 1
    if names.moved > names.old.mask:
        munmap(names.old.slots, (names.old.mask + 1) * sizeof(Slot))
        names.old.slots = NULL


cdef bint names_make_room(Names *names) noexcept nogil:
    """Before an insertion: move some old slots on, begin to double when 3/4 full."""
    cdef uint64_t size
    cdef void *got
    if names.old.slots != NULL:
        names_migrate(names, MIGRATE)
    if names.now.slots == NULL:
        size = FIRST_SLOTS
    elif (names.count + 1) * 4 <= (names.now.mask + 1) * 3:
        return True
    else:
        size = (names.now.mask + 1) * 2
    if names.old.slots != NULL:
        names_migrate(names, names.old.mask + 1)
    got = map_memory(NULL, 0, size * sizeof(Slot))
    if got == NULL:
        return False
    names.old = names.now
    names.moved = 0
    names.now.slots = <Slot *>got
    names.now.mask = size - 1
    return True


cdef inline size_t table_growth(Names *names) noexcept nogil:
    """The bytes that names_make_room() would map."""
    return (names.now.mask + 1) * 2 * sizeof(Slot) if (names.count + 1) * 4 > (names.now.mask + 1) * 3 else 0


cdef uint32_t names_intern(Names *names, uint32_t hash, const unsigned char *name,
                           uint32_t length) noexcept nogil:
    """A new node for a name that is not there yet, or 0 when there is no memory."""
    cdef uint32_t handle
    cdef Node *node
    if not names_make_room(names):
        return 0
    handle = arena_alloc(&names.nodes, node_units(length))
    if handle == 0:
        return 0
    node = node_at(names, handle)
    memset(node, 0, NODE_HEADER)
    node.len = <uint8_t>length
    memcpy(node.name, name, length)
    table_put(&names.now, hash, handle)
    names.count += 1
    return handle


cdef void table_remove(Table *t, uint64_t hole) noexcept nogil:
    """Close the gap by shifting later entries of the run back (Knuth 6.4, algorithm R)."""
    cdef uint64_t i = hole, home
    while True:
        i = (i + 1) & t.mask
        if t.slots[i].node == 0:
            break
        home = t.slots[i].hash & t.mask
        if ((i - home) & t.mask) >= ((i - hole) & t.mask):
            t.slots[hole] = t.slots[i]
            hole = i
    t.slots[hole].node = 0


cdef void names_drop(Names *names, uint32_t handle) noexcept nogil:
    cdef Node *node = node_at(names, handle)
    cdef uint32_t hash = hash_name(names.secret, node.name, node.len)
    cdef uint64_t at
    if table_find(names, &names.now, hash, node.name, node.len, &at):
        table_remove(&names.now, at)
    elif names.old.slots != NULL and table_find(names, &names.old, hash, node.name, node.len, &at):
        names.old.slots[at].node = MOVED
    names.count -= 1
    node.flags = FREED
    arena_free(&names.nodes, handle, node_units(node.len))


cdef inline uint32_t block_units(Names *names, uint32_t handle, bint *freed) noexcept nogil:
    """The units of a node's block, and whether it was freed: its header tells still."""
    cdef Node *node = node_at(names, handle)
    cdef bint hidden = ASAN and is_poisoned(node)
    cdef uint32_t units
    if hidden:
        unpoison(node, NODE_HEADER)
    units = node_units(node.len)
    freed[0] = node.flags & FREED
    if hidden:
        poison(node, NODE_HEADER)
    return units


cdef inline uint32_t names_next(Names *names, uint32_t handle, bint *freed) noexcept nogil:
    """The block behind this one in memory (0: the first of all), a node or a freed one; 0 when there is none.

    Blocks never move and keep their size, so a walk that is broken off and taken up again, whatever has
    come and gone meanwhile, meets every node that was there all the time."""
    handle = handle + block_units(names, handle, freed) if handle else 1
    if handle >= names.nodes.top:
        return 0
    block_units(names, handle, freed)
    return handle


cdef size_t names_mapped(Names *names) noexcept nogil:
    cdef size_t size = names.nodes.mapped
    if names.now.slots != NULL:
        size += (names.now.mask + 1) * sizeof(Slot)
    if names.old.slots != NULL:
        size += (names.old.mask + 1) * sizeof(Slot)
    return size


cdef void names_release(Names *names) noexcept nogil:
    arena_release(&names.nodes)
    if names.now.slots != NULL:
        munmap(names.now.slots, (names.now.mask + 1) * sizeof(Slot))
    if names.old.slots != NULL:
        munmap(names.old.slots, (names.old.mask + 1) * sizeof(Slot))
