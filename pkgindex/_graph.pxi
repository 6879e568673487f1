# Graph: who depends on whom. Nodes are packages, an edge is one dependency.
#
# A package's edges lie in one block of an arena, sorted by target, and each edge is also a link of
# the doubly linked list of all edges that point at its target. So a dependency is added and removed
# in O(1) however many others depend on the same package, and a package costs 16 bytes a dependency.
# Every change first gets all the memory it may need and only then touches the graph: one that runs
# out of memory leaves it as it was.

ctypedef struct Edge:
    uint32_t target
    uint32_t source
    uint32_t next        # in the list of edges that point at `target`
    uint32_t prev

ctypedef struct Dependencies:
    Names names
    Arena edges
    uint64_t packages    # indexed nodes
    uint64_t links       # edges
    Bytes wanted         # scratch: the handles that an INDEX names
    Bytes gone           # scratch: handles that a change takes away
    Bytes dirty          # handles of nodes whose files lag behind
    Bytes owed           # handles of nodes whose large reverse files do
    uint32_t cursor      # the next edge of a reverse list that is being copied
    Bytes buried         # (ticket, handle) of removed nodes, oldest first
    size_t unburied      # bytes of `buried` already dealt with

ctypedef struct Grave:
    uint64_t ticket
    uint64_t handle


cdef inline Edge *edge_at(Dependencies *g, uint32_t handle) noexcept nogil:
    return <Edge *>(g.edges.base + <size_t>handle * sizeof(Edge))


cdef inline void link_edge(Dependencies *g, uint32_t handle, uint32_t source, uint32_t target) noexcept nogil:
    cdef Edge *edge = edge_at(g, handle)
    cdef Node *node = node_at(&g.names, target)
    edge.target = target
    edge.source = source
    edge.prev = 0
    edge.next = node.rev
    if node.rev:
        edge_at(g, node.rev).prev = handle
    node.rev = handle
    node.nrev += 1


cdef inline void unlink_edge(Dependencies *g, uint32_t handle) noexcept nogil:
    cdef Edge *edge = edge_at(g, handle)
    cdef Node *node = node_at(&g.names, edge.target)
    if handle == g.cursor:
        g.cursor = edge.next
    if edge.next:
        edge_at(g, edge.next).prev = edge.prev
    if edge.prev:
        edge_at(g, edge.prev).next = edge.next
    else:
        node.rev = edge.next
    node.nrev -= 1


cdef int by_handle(const void *a, const void *b) noexcept nogil:
    cdef uint32_t x = (<const uint32_t *>a)[0]
    cdef uint32_t y = (<const uint32_t *>b)[0]
    return (x > y) - (x < y)


cdef uint32_t sort_unique(uint32_t *v, uint32_t n) noexcept nogil:
    """Sort in place, drop what comes twice; the number that is left."""
    cdef uint32_t i, j, x
    if n > 24:
        qsort(v, n, sizeof(uint32_t), by_handle)
    else:
        for i in range(1, n):
            x = v[i]
            j = i
            while j > 0 and v[j - 1] > x:
                v[j] = v[j - 1]
                j -= 1
            v[j] = x
    j = 0
    for i in range(n):
        if j == 0 or v[j - 1] != v[i]:
            v[j] = v[i]
            j += 1
    return j


cdef enum:
    LARGE = 4096         # dependents from which on a reverse file is owed rather than written each round


cdef inline bint reserve_dirty(Dependencies *g, size_t nodes) noexcept nogil:
    """Room to mark so many nodes."""
    return (bytes_reserve(&g.dirty, nodes * sizeof(uint32_t))
            and bytes_reserve(&g.owed, nodes * sizeof(uint32_t)))


cdef inline void mark_dirty(Dependencies *g, uint32_t handle, uint8_t what) noexcept nogil:
    """Room has been reserved."""
    cdef Node *node = node_at(&g.names, handle)
    if what == REVERSE_DIRTY and node.nrev >= LARGE and not node.flags & REVERSE_DIRTY:
        if not node.flags & REVERSE_OWED:
            bytes_put(&g.owed, &handle, sizeof(uint32_t))
            node.flags |= REVERSE_OWED
        return
    if not node.flags & (FORWARD_DIRTY | REVERSE_DIRTY):
        bytes_put(&g.dirty, &handle, sizeof(uint32_t))
    node.flags |= what


cdef inline uint32_t *handles(Bytes *b) noexcept nogil:
    return <uint32_t *>b.data


cdef uint32_t subtract(Dependencies *g, Node *node, const uint32_t *wanted, uint32_t n) noexcept nogil:
    """Put into `gone` what `node` depends on and `wanted` (sorted) lacks; room was reserved. The number."""
    cdef uint32_t i = 0, j = 0, target
    g.gone.size = 0
    for i in range(node.ndeps):
        target = edge_at(g, node.deps + i).target
        while j < n and wanted[j] < target:
            j += 1
        if j == n or wanted[j] != target:
            bytes_put(&g.gone, &target, sizeof(uint32_t))
    return <uint32_t>(g.gone.size // sizeof(uint32_t))


cdef bint has_handle(Bytes *b, uint32_t handle) noexcept nogil:
    cdef size_t i
    for i in range(b.size // sizeof(uint32_t)):
        if handles(b)[i] == handle:
            return True
    return False


cdef bint has_target(Dependencies *g, Node *node, uint32_t target) noexcept nogil:
    cdef uint32_t low = 0, high = node.ndeps, middle
    while low < high:
        middle = (low + high) >> 1
        if edge_at(g, node.deps + middle).target < target:
            low = middle + 1
        else:
            high = middle
    return low < node.ndeps and edge_at(g, node.deps + low).target == target


cdef void replace_edges(Dependencies *g, uint32_t handle, const uint32_t *wanted, uint32_t n, uint32_t block,
                        bint track) noexcept nogil:
    """Make `wanted` (sorted) the dependencies of `handle`, in `block` (allocated for n, or 0).

    With `track`, mark the reverse files of what comes and goes; `gone` holds what goes, and room
    to mark all of it has been reserved."""
    cdef Node *node = node_at(&g.names, handle)
    cdef uint32_t i
    if track:
        for i in range(n):
            # A kept one too while its reverse file is being copied: its edge moves before the cursor.
            if (not has_target(g, node, wanted[i])
                    or node_at(&g.names, wanted[i]).flags & RENDERING):
                mark_dirty(g, wanted[i], REVERSE_DIRTY)
        for i in range(<uint32_t>(g.gone.size // sizeof(uint32_t))):
            mark_dirty(g, handles(&g.gone)[i], REVERSE_DIRTY)
    for i in range(node.ndeps):
        unlink_edge(g, node.deps + i)
    if node.ndeps:
        arena_free(&g.edges, node.deps, node.ndeps)
    g.links += n
    g.links -= node.ndeps
    node.deps = block
    node.ndeps = n
    node.flags &= ~SELF
    for i in range(n):
        link_edge(g, block + i, handle, wanted[i])
        if wanted[i] == handle:
            node.flags |= SELF


cdef inline bint still_needed(Node *node) noexcept nogil:
    return node.flags & ~SELF or node.nrev or node.ndeps


cdef void forget_if_unused(Dependencies *g, uint32_t handle) noexcept nogil:
    if not still_needed(node_at(&g.names, handle)):
        names_drop(&g.names, handle)


cdef void exhume(Dependencies *g, uint64_t settled) noexcept nogil:
    """Free the removed nodes whose removal is durable, unless they came back or a file still waits.

    A package removed twice within two commits has two graves: the flag says which one counts."""
    cdef size_t first = g.unburied, at
    cdef Grave *grave
    cdef Node *node
    while g.unburied < g.buried.size:
        grave = <Grave *>(g.buried.data + g.unburied)
        if grave.ticket > settled:
            break
        g.unburied += sizeof(Grave)
        node = node_at(&g.names, <uint32_t>grave.handle)
        if node.flags & BURIED:
            node.flags &= ~BURIED
        else:
            grave.handle = 0
    at = g.unburied
    while at < g.buried.size:
        node_at(&g.names, <uint32_t>(<Grave *>(g.buried.data + at)).handle).flags |= BURIED
        at += sizeof(Grave)
    while first < g.unburied:
        grave = <Grave *>(g.buried.data + first)
        if grave.handle:
            forget_if_unused(g, <uint32_t>grave.handle)
        first += sizeof(Grave)
    if g.unburied == g.buried.size:
        bytes_trim(&g.buried, FIRST_MAPPING)
        g.unburied = 0
    elif 2 * g.unburied >= g.buried.size:
        memmove(g.buried.data, g.buried.data + g.unburied, g.buried.size - g.unburied)
        g.buried.size -= g.unburied
        g.unburied = 0


cdef void graph_release(Dependencies *g) noexcept nogil:
    names_release(&g.names)
    arena_release(&g.edges)
    bytes_release(&g.wanted)
    bytes_release(&g.gone)
    bytes_release(&g.dirty)
    bytes_release(&g.owed)
    bytes_release(&g.buried)
