# Names: every package's name once, found through an open-addressing hash table.
#
# A node is a small header with its name behind it, in 8-byte units of an arena. A slot of the table
# holds a node's handle and 32 bits of its keyed hash: probing touches a node only when those agree.
# Eight slots are a bucket, which is one cache line and looked through at once; what finds its bucket
# full goes to the next that is not, which is rare: a look-up has no branch that is hard to foresee.
# The hash multiplies 64-bit words by secrets drawn for each process (the construction of wyhash and
# foldhash: 64 x 64 -> 128 bits, both halves folded): strangers choose the names, so they must not be
# able to choose the collisions. The table doubles a few slots at a time, so no message ever pays for
# a whole rehash, and goes on with every message, so none pays for two tables for long.

cdef enum:
    INDEXED = 1          # the package is in the index
    FORWARD_DIRTY = 2    # its forward file lags behind
    REVERSE_DIRTY = 4    # its reverse file lags behind
    SELF = 8             # it depends on itself
    BURIED = 16          # removed, kept until the removal is durable
    REVERSE_OWED = 32    # its reverse file lags behind, and is so large that it is written rarely
    RENDERING = 64       # its reverse file is being copied, a slice at a time
    FREED = 128          # no node any more: a block that waits for the next of its size

    FIRST_BUCKETS = 128
    MIGRATE = 2          # old buckets moved at each insertion: done long before the new table fills
    MOVED = 0xFFFFFFFFU
    MAX_NAME = 255

ctypedef packed struct Node:
    uint32_t deps        # its block of edges, sorted by target
    uint32_t ndeps
    uint32_t rev         # the first edge that points at it
    uint32_t nrev
    uint64_t ticket      # the commit that its last coming or going rests on
    uint8_t flags
    uint8_t len
    uint8_t name[6]      # `len` bytes in truth

cdef enum:
    NODE_HEADER = 26
    NODE_ANSWER = 16     # from here on is all that a QUERY reads: few nodes straddle two cache lines so

ctypedef struct Table:
    Bucket *buckets
    uint64_t mask        # number of buckets less one

ctypedef struct Names:
    Arena nodes
    Table now
    Table old            # being emptied into `now`; buckets is NULL when there is none
    uint64_t moved       # old buckets below this one are empty
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


cdef inline bint is_usual(uint32_t length) noexcept nogil:
    """Whether two words, which may overlap, are all of a name: 8 to 16 bytes."""
    return likely(length - 8 <= 8)


cdef inline uint32_t hash_words(const uint64_t *secret, uint64_t state, uint64_t a, uint64_t b) noexcept nogil:
    state = fold(a ^ secret[1], b ^ state)
    return <uint32_t>fold(state ^ secret[2], secret[3])


cdef uint32_t hash_unusual(const uint64_t *secret, const unsigned char *p, uint32_t n) noexcept nogil:
    cdef uint64_t state = secret[0] ^ n
    while n > 16:
        state = fold(load8(p) ^ secret[1], load8(p + 8) ^ state)
        p += 16
        n -= 16
    if n >= 8:
        return hash_words(secret, state, load8(p), load8(p + n - 8))
    if n >= 4:
        return hash_words(secret, state, load4(p), load4(p + n - 4))
    return hash_words(secret, state, (<uint64_t>p[0] << 16) | (<uint64_t>p[n >> 1] << 8) | p[n - 1], 0)


cdef inline uint32_t hash_name(const uint64_t *secret, const unsigned char *p, uint32_t n) noexcept nogil:
    if is_usual(n):
        return hash_words(secret, secret[0] ^ n, load8(p), load8(p + n - 8))
    return hash_unusual(secret, p, n)


cdef inline uint64_t difference(const unsigned char *a, const unsigned char *b, uint32_t n) noexcept nogil:
    """Of two names as long as each other: 0 if they are the same."""
    if is_usual(n):
        return load8(a) ^ load8(b) | load8(a + n - 8) ^ load8(b + n - 8)
    return memcmp(a, b, n) != 0


cdef inline Node *node_at(Names *names, uint32_t handle) noexcept nogil:
    return <Node *>(names.nodes.base + <size_t>handle * 8)


cdef inline bint is_named(Names *names, uint32_t handle, const unsigned char *name,
                          uint32_t length) noexcept nogil:
    cdef Node *node = node_at(names, handle)
    return node.len == length and not difference(node.name, name, length)


cdef inline uint32_t node_units(uint32_t length) noexcept nogil:
    return (NODE_HEADER + length + 7) >> 3


cdef inline Bucket *home(Table *t, uint32_t hash) noexcept nogil:
    return t.buckets + (hash & t.mask)


cdef inline Bucket *next_bucket(Table *t, Bucket *bucket) noexcept nogil:
    return t.buckets + ((bucket - t.buckets + 1) & t.mask)


cdef inline bint is_full(const Bucket *bucket) noexcept nogil:
    return bucket.node[BUCKET_SLOTS - 1] != 0


cdef inline bint table_find(Names *names, Table *t, uint32_t hash, const unsigned char *name,
                            uint32_t length, Bucket **bucket, uint32_t *slot) noexcept nogil:
    """Whether the name is in this table, and where."""
    cdef unsigned int same
    cdef uint32_t node
    bucket[0] = home(t, hash)
    while True:
        same = bucket_matches(bucket[0], hash)
        while same:
            slot[0] = __builtin_ctz(same)
            node = bucket[0].node[slot[0]]
            if node != 0 and node != MOVED and is_named(names, node, name, length):
                return True
            same &= same - 1
        if not is_full(bucket[0]):
            return False
        bucket[0] = next_bucket(t, bucket[0])


cdef inline uint32_t table_guess(Table *t, uint32_t hash) noexcept nogil:
    """The first node with this hash, which is very likely the one sought, or 0; the node is not touched."""
    cdef Bucket *bucket = home(t, hash)
    cdef unsigned int same = bucket_matches(bucket, hash)
    while same == 0 and is_full(bucket):
        bucket = next_bucket(t, bucket)
        same = bucket_matches(bucket, hash)
    return bucket.node[__builtin_ctz(same)] if same else 0


cdef inline uint32_t names_find(Names *names, uint32_t hash, const unsigned char *name,
                                uint32_t length) noexcept nogil:
    """The handle of this name's node, or 0."""
    cdef Bucket *bucket
    cdef uint32_t slot
    if (table_find(names, &names.now, hash, name, length, &bucket, &slot)
            or names.old.buckets != NULL
            and table_find(names, &names.old, hash, name, length, &bucket, &slot)):
        return bucket.node[slot]
    return 0


cdef inline void table_put(Table *t, uint32_t hash, uint32_t handle) noexcept nogil:
    cdef Bucket *bucket = home(t, hash)
    cdef uint32_t slot = 0
    while is_full(bucket):
        bucket = next_bucket(t, bucket)
    while bucket.node[slot] != 0:
        slot += 1
    bucket.hash[slot] = hash
    bucket.node[slot] = handle


cdef void names_migrate(Names *names, uint64_t buckets) noexcept nogil:
    """Move so many old buckets on, if there are any."""
    cdef uint64_t last = names.moved + buckets
    cdef Bucket *bucket
    cdef uint32_t slot
    if names.old.buckets == NULL:
        return
    if last > names.old.mask + 1:
        last = names.old.mask + 1
    while names.moved < last:
        bucket = names.old.buckets + names.moved
        for slot in range(BUCKET_SLOTS):
            if bucket.node[slot] != 0 and bucket.node[slot] != MOVED:
                table_put(&names.now, bucket.hash[slot], bucket.node[slot])
                bucket.node[slot] = MOVED    # later probes of the old table must pass over it
        names.moved += 1
    if names.moved > names.old.mask:
        munmap(names.old.buckets, (names.old.mask + 1) * sizeof(Bucket))
        names.old.buckets = NULL


cdef inline bint is_crowded(Names *names) noexcept nogil:
    """Whether another name would fill more than 3/4 of the table."""
    return (names.count + 1) * 4 > (names.now.mask + 1) * BUCKET_SLOTS * 3


cdef bint names_make_room(Names *names) noexcept nogil:
    """Before an insertion: move some old buckets on, begin to double when 3/4 full."""
    cdef uint64_t size
    cdef void *got
    names_migrate(names, MIGRATE)
    if names.now.buckets == NULL:
        size = FIRST_BUCKETS
    elif not is_crowded(names):
        return True
    else:
        size = (names.now.mask + 1) * 2
    names_migrate(names, names.old.mask + 1)
    got = map_memory(NULL, 0, size * sizeof(Bucket))
    if got == NULL:
        return False
    names.old = names.now
    names.moved = 0
    names.now.buckets = <Bucket *>got
    names.now.mask = size - 1
    return True


cdef inline size_t table_growth(Names *names) noexcept nogil:
    """The bytes that names_make_room() would map."""
    return (names.now.mask + 1) * 2 * sizeof(Bucket) if is_crowded(names) else 0


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


cdef void table_remove(Table *t, Bucket *bucket, uint32_t slot) noexcept nogil:
    """Empty the slot. What had gone past its bucket because that was full must still be found: it comes
    back to the gap, and so on (Knuth 6.4, algorithm R, bucket by bucket)."""
    cdef Bucket *other = bucket
    cdef uint32_t i = 0
    while is_full(other):
        other = next_bucket(t, other)
        for i in range(BUCKET_SLOTS):
            if other.node[i] != 0 and passes(t, other, other.hash[i], bucket):
                bucket.hash[slot] = other.hash[i]
                bucket.node[slot] = other.node[i]
                bucket = other
                slot = i
                break
    i = BUCKET_SLOTS - 1
    while bucket.node[i] == 0:
        i -= 1
    bucket.hash[slot] = bucket.hash[i]
    bucket.node[slot] = bucket.node[i]
    bucket.node[i] = 0


cdef inline bint passes(Table *t, Bucket *at, uint32_t hash, Bucket *by) noexcept nogil:
    """Whether the probe for a hash that lies in the bucket `at` passes the one before it, `by`."""
    return ((at - home(t, hash)) & t.mask) >= ((at - by) & t.mask)


cdef void names_drop(Names *names, uint32_t handle) noexcept nogil:
    cdef Node *node = node_at(names, handle)
    cdef uint32_t hash = hash_name(names.secret, node.name, node.len)
    cdef Bucket *bucket
    cdef uint32_t slot
    if table_find(names, &names.now, hash, node.name, node.len, &bucket, &slot):
        table_remove(&names.now, bucket, slot)
    elif (names.old.buckets != NULL
            and table_find(names, &names.old, hash, node.name, node.len, &bucket, &slot)):
        bucket.node[slot] = MOVED
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
    if names.now.buckets != NULL:
        size += (names.now.mask + 1) * sizeof(Bucket)
    if names.old.buckets != NULL:
        size += (names.old.mask + 1) * sizeof(Bucket)
    return size


cdef void names_release(Names *names) noexcept nogil:
    arena_release(&names.nodes)
    if names.now.buckets != NULL:
        munmap(names.now.buckets, (names.now.mask + 1) * sizeof(Bucket))
    if names.old.buckets != NULL:
        munmap(names.old.buckets, (names.old.mask + 1) * sizeof(Bucket))
