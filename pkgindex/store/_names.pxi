# File names (rule N1): one canonical name for each package, on any file system.
#
# %xx stands for upper case (a mount may not tell the cases apart), for what some file system forbids,
# for a leading or trailing dot and for the first letter of a DOS device's name. A name whose encoding is
# longer than 200 bytes becomes its first 100 bytes, "~" and 128 bits of SHA-256 of the package's name;
# "~" stands in no other. The file's first line is the package's name in full.

cdef enum:
    LONGEST_FILE_NAME = 200
    KEPT_OF_LONG_NAME = 100
    FILE_NAME_ROOM = 3 * 255 + 1

cdef unsigned char escaped[256]

cdef void fill_escaped() noexcept nogil:
    cdef int c
    for c in range(256):
        escaped[c] = c'A' <= c <= c'Z' or memchr(b"%/\\:*?\"<>~", c, 10) != NULL
fill_escaped()

cdef const char **DEVICES = ["con", "prn", "aux", "nul", NULL]


cdef bint is_device(const unsigned char *name, uint32_t length) noexcept nogil:
    """Whether DOS would take this, whatever follows a dot, for a device."""
    cdef const unsigned char *dot = <const unsigned char *>memchr(name, c'.', length)
    cdef uint32_t n = <uint32_t>(dot - name) if dot != NULL else length
    cdef int i = 0
    if n == 4 and c'0' <= name[3] <= c'9':
        return memcmp(name, b"com", 3) == 0 or memcmp(name, b"lpt", 3) == 0
    while DEVICES[i] != NULL:
        if n == 3 and memcmp(name, DEVICES[i], 3) == 0:
            return True
        i += 1
    return False


cdef uint32_t encode(const unsigned char *name, uint32_t length, char *out) noexcept nogil:
    """Encode a name of up to 255 bytes into FILE_NAME_ROOM bytes, NUL-terminated; the length."""
    cdef const char *hexadecimal = "0123456789abcdef"
    cdef uint32_t i, n = 0
    cdef unsigned char c
    cdef bint device = is_device(name, length)
    for i in range(length):
        c = name[i]
        if escaped[c] or c == c'.' and (i == 0 or i == length - 1) or i == 0 and device:
            out[n] = c'%'
            out[n + 1] = hexadecimal[c >> 4]
            out[n + 2] = hexadecimal[c & 15]
            n += 3
        else:
            out[n] = <char>c
            n += 1
    if n > LONGEST_FILE_NAME:
        with gil:
            digest = hashlib.sha256((<const char *>name)[:length]).hexdigest()[:32].encode()
            out[KEPT_OF_LONG_NAME] = c'~'
            memcpy(out + KEPT_OF_LONG_NAME + 1, <char *>digest, 32)
        n = KEPT_OF_LONG_NAME + 33
    out[n] = 0
    return n


cdef inline uint32_t shard_of(const char *file_name, uint32_t length, uint32_t shards) noexcept nogil:
    return crc32c_update(0, <const unsigned char *>file_name, length) % shards


def file_name(str package):
    """The name of a package's files. Raises ValueError for what is no package's name."""
    cdef char out[FILE_NAME_ROOM]
    cdef bytes raw = package.encode("ascii")
    if not 1 <= len(raw) <= 255:
        raise ValueError(f"no package's name: {package!r}")
    return out[:encode(raw, <uint32_t>len(raw), out)].decode()


def shard(str name, uint32_t shards):
    """The sub-folder, of `shards`, that holds the file of this name."""
    cdef bytes raw = name.encode("ascii")
    return f"{shard_of(raw, <uint32_t>len(raw), shards):02x}"
