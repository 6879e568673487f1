# Arena: blocks of equal units in one growing mapping, named by 32-bit handles.
#
# A handle is the index of a block's first unit; 0 is no block. Handles stay valid while the arena
# grows, raw pointers do not: derive them again after any call that may allocate. The mapping grows
# with mremap(2), which moves page tables and copies nothing (but once, when it is still small), so
# growth stalls nobody. Freed blocks wait in one free list a size class: exact up to 64 units, above
# that eight classes an octave (at most 12.5 % of a large block is slack).

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *addr, size_t length, int prot, int flags, int fd, long offset)
    void *mremap(void *old, size_t old_size, size_t new_size, int flags, ...)
    int munmap(void *addr, size_t length)
    int madvise(void *addr, size_t length, int advice)
    int MADV_HUGEPAGE
    void *MAP_FAILED
    int PROT_READ, PROT_WRITE, MAP_PRIVATE, MAP_ANONYMOUS, MREMAP_MAYMOVE, MREMAP_FIXED

# Inside a mapping AddressSanitizer sees no borders of its own: a build with it is told which bytes are
# nobody's. Regions begin at 8 bytes, as units do. In every other build all of this is compiled away.
cdef extern from *:
    """
    #ifdef __SANITIZE_ADDRESS__
    #include <sanitizer/asan_interface.h>
    #define PKGINDEX_ASAN 1
    #else
    #define PKGINDEX_ASAN 0
    #define __asan_address_is_poisoned(at) ((void)(at), 0)
    #define __asan_poison_memory_region(at, size) ((void)(at), (void)(size))
    #define __asan_unpoison_memory_region(at, size) ((void)(at), (void)(size))
    #endif
    """
    const bint ASAN "PKGINDEX_ASAN"
    bint is_poisoned "__asan_address_is_poisoned"(const void *at) nogil
    void poison "__asan_poison_memory_region"(const void *at, size_t size) nogil
    void unpoison "__asan_unpoison_memory_region"(const void *at, size_t size) nogil

cdef enum:
    EXACT_CLASSES = 64
    ALL_CLASSES = 64 + 8 * 26 + 1
    FIRST_MAPPING = 65536
    # From here on huge pages are asked for: with a million packages they spare a random look-up half of
    # its time, which went into the TLB (benchmarks/core.py). The slack is a small part of a mapping.
    LARGE_MAPPING = 8 << 20
    HUGE_PAGE = 2 << 20

ctypedef struct Arena:
    char *base
    size_t unit          # bytes in a unit
    size_t mapped        # bytes mapped
    uint64_t top         # first unit never handed out
    uint64_t used        # units in live blocks
    size_t most          # bytes mapped past which it grows by no more than it must; 0: no such
    uint32_t free[ALL_CLASSES]

# Debug builds may make the n-th allocation from now fail; -1 never does.
cdef long fail_allocation_in = -1

cdef inline bint allocation_fails() noexcept nogil:
    global fail_allocation_in
    if fail_allocation_in < 0:
        return False
    if fail_allocation_in == 0:
        return True
    fail_allocation_in -= 1
    return False


cdef void *map_memory(void *old, size_t old_size, size_t new_size) noexcept nogil:
    """Map `new_size` bytes, carrying `old_size` bytes over; NULL when the system has none."""
    cdef void *got = MAP_FAILED
    if allocation_fails():
        return NULL
    if new_size >= LARGE_MAPPING:
        got = map_huge(old, old_size, new_size)
    if got == MAP_FAILED and old == NULL:
        got = mmap(NULL, new_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    elif got == MAP_FAILED:
        got = mremap(old, old_size, new_size, MREMAP_MAYMOVE)
    return NULL if got == MAP_FAILED else got


cdef void *map_huge(void *old, size_t old_size, size_t new_size) noexcept nogil:
    """Map as map_memory() does, in huge pages, or MAP_FAILED. Such a page survives being moved only from one
    multiple of its size to another, and is made only where nothing is yet: what was small is copied."""
    cdef char *place
    cdef void *got = MAP_FAILED
    cdef size_t before
    if old_size >= LARGE_MAPPING:
        got = mremap(old, old_size, new_size, 0)
        if got != MAP_FAILED:
            return got
    place = <char *>mmap(NULL, new_size + HUGE_PAGE, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if place == MAP_FAILED:
        return MAP_FAILED
    before = -<size_t>place & (HUGE_PAGE - 1)
    if before:
        munmap(place, before)
    munmap(place + before + new_size, HUGE_PAGE - before)
    place += before
    if old_size >= LARGE_MAPPING:
        got = mremap(old, old_size, new_size, MREMAP_MAYMOVE | MREMAP_FIXED, place)
        if got == MAP_FAILED:
            munmap(place, new_size)
        return got
    madvise(place, new_size, MADV_HUGEPAGE)
    if old != NULL:
        memcpy(place, old, old_size)
        munmap(old, old_size)
    return place


cdef inline uint32_t size_class(uint32_t units) noexcept nogil:
    cdef uint32_t octave
    if units <= EXACT_CLASSES:
        return units
    octave = 31 - <uint32_t>__builtin_clz(units - 1)
    return EXACT_CLASSES + 8 * (octave - 6) + ((units - 1) >> (octave - 3)) - 7


cdef inline uint32_t class_units(uint32_t c) noexcept nogil:
    cdef uint32_t octave
    if c <= EXACT_CLASSES:
        return c
    c -= EXACT_CLASSES + 1
    octave = 6 + (c >> 3)
    return ((c & 7) + 9) << (octave - 3)


cdef inline size_t whole_mappings(size_t size) noexcept nogil:
    return (size + FIRST_MAPPING - 1) & ~(<size_t>FIRST_MAPPING - 1)


cdef void arena_poison(Arena *a) noexcept nogil:
    """Mark what no block has: unit 0, the free blocks, and all from the top on. All is unmarked before."""
    cdef uint32_t c, handle, following
    cdef char *block
    if a.base == NULL:
        return
    poison(a.base, a.unit)
    poison(a.base + a.top * a.unit, a.mapped - a.top * a.unit)
    for c in range(ALL_CLASSES):
        handle = a.free[c]
        while handle:
            block = a.base + handle * a.unit
            following = (<uint32_t *>block)[0]
            poison(block, class_units(c) * a.unit)
            handle = following


cdef bint arena_reserve(Arena *a, uint64_t units) noexcept nogil:
    """Make room for `units` more units at the top; False when memory or handles run out."""
    cdef size_t need, size
    cdef void *got
    if a.top == 0:
        a.top = 1
    if a.top + units > 0xFFFFFFFFU:
        return False
    need = (a.top + units) * a.unit
    if need <= a.mapped:
        return True
    size = a.mapped + (a.mapped >> 3)
    if size < need:
        size = need
    size = whole_mappings(size)
    if size >= LARGE_MAPPING:
        size = (size + HUGE_PAGE - 1) & ~(<size_t>HUGE_PAGE - 1)
    if a.most and size > a.most:
        size = whole_mappings(need)
    if ASAN:
        unpoison(a.base, a.mapped)    # marks stay where they were when a mapping moves
    got = map_memory(a.base, a.mapped, size)
    if got != NULL:
        a.base = <char *>got
        a.mapped = size
    if ASAN:
        arena_poison(a)
    return got != NULL


cdef size_t arena_growth(Arena *a, uint32_t units) noexcept nogil:
    """The bytes that arena_alloc() of so many units would have to map."""
    cdef uint32_t c = size_class(units)
    cdef size_t need = ((a.top if a.top else 1) + class_units(c)) * a.unit
    return 0 if a.free[c] or need <= a.mapped else whole_mappings(need) - a.mapped


cdef uint32_t arena_alloc(Arena *a, uint32_t units) noexcept nogil:
    """A block of at least `units` units (its bytes undefined), or 0 when there is no memory."""
    cdef uint32_t c = size_class(units)
    cdef size_t asked = units
    cdef uint32_t handle = a.free[c]
    if handle:
        if ASAN:
            unpoison(a.base + handle * a.unit, sizeof(uint32_t))
        a.free[c] = (<uint32_t *>(a.base + handle * a.unit))[0]
    else:
        units = class_units(c)
        if not arena_reserve(a, units):
            return 0
        handle = <uint32_t>a.top
        a.top += units
    a.used += class_units(c)
    if ASAN:
        unpoison(a.base + handle * a.unit, asked * a.unit)
    return handle


cdef void arena_free(Arena *a, uint32_t handle, uint32_t units) noexcept nogil:
    cdef uint32_t c = size_class(units)
    (<uint32_t *>(a.base + handle * a.unit))[0] = a.free[c]
    a.free[c] = handle
    a.used -= class_units(c)
    if ASAN:
        poison(a.base + handle * a.unit, class_units(c) * a.unit)


cdef void arena_release(Arena *a) noexcept nogil:
    if a.base != NULL:
        if ASAN:
            unpoison(a.base, a.mapped)
        munmap(a.base, a.mapped)
        a.base = NULL


# Bytes: a buffer that only grows, for redo lines, replies and lists of handles.

ctypedef struct Bytes:
    char *data
    size_t size
    size_t mapped


cdef bint bytes_reserve(Bytes *b, size_t more) noexcept nogil:
    cdef size_t size
    cdef void *got
    if b.size + more <= b.mapped:
        if ASAN:
            unpoison(b.data + (b.size & ~<size_t>7), (b.size & 7) + more)
        return True
    size = 2 * b.mapped if 2 * b.mapped > b.size + more else b.size + more
    size = whole_mappings(size)
    if ASAN:
        unpoison(b.data, b.mapped)
    got = map_memory(b.data, b.mapped, size)
    if got == NULL:
        return False
    b.data = <char *>got
    b.mapped = size
    if ASAN:
        poison(b.data + b.size + more, size - b.size - more)
    return True


cdef inline void bytes_put(Bytes *b, const void *data, size_t size) noexcept nogil:
    """Append; the caller has reserved the room."""
    memcpy(b.data + b.size, data, size)
    b.size += size


cdef inline void bytes_put_char(Bytes *b, char c) noexcept nogil:
    b.data[b.size] = c
    b.size += 1


cdef void bytes_trim(Bytes *b, size_t keep) noexcept nogil:
    """Empty the buffer; give memory back when it had grown past `keep` bytes."""
    cdef void *got
    b.size = 0
    if ASAN and b.data != NULL:
        unpoison(b.data, b.mapped)
    if b.mapped > keep:
        got = mremap(b.data, b.mapped, keep, MREMAP_MAYMOVE)
        if got != MAP_FAILED:
            b.data = <char *>got
            b.mapped = keep
    if ASAN and b.data != NULL:
        poison(b.data, b.mapped)


cdef void bytes_release(Bytes *b) noexcept nogil:
    if b.data != NULL:
        if ASAN:
            unpoison(b.data, b.mapped)
        munmap(b.data, b.mapped)
        b.data = NULL
