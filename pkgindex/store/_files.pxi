# Package files: written through the staging directory, read at recovery.
#
#     wget                          the package's name
#     gettext                       its dependencies (or dependents), one a line, sorted
#     libidn2
#     forward 2 9ae0daaf            kind, number of entries, CRC-32C of all that stands before it
#
# No package's name holds a space, so the last line is always told from the others. Publishing a file
# (rules W1, W5): a temporary file in staging with a counter for a name, its data synced, renamed over the
# old one, its name synced, and then looked for by a path opened anew: if a power loss of the mount's
# server undid the rename in between, the fsync of the descriptor would not say so (X6).

cdef const char **KINDS = ["forward", "reverse"]

cdef enum:
    MOST_SHARDS = 4096
    LOCAL_EXT = 0xEF53
    LOCAL_TMPFS = 0x01021994
    LOCAL_XFS = 0x58465342
    LOCAL_BTRFS = 0x9123683E
    LOCAL_ZFS = 0x2FC12FC1
    LOCAL_F2FS = 0xF2F52010

ctypedef struct Record:          # as the core's render() writes it
    uint32_t size
    uint8_t kind
    uint8_t exists
    uint8_t length
    uint8_t zero
    uint32_t entries

ctypedef struct File:
    const Record *record
    uint64_t temporary
    uint64_t inode
    uint32_t shard
    uint32_t name                # its encoded name's place in `names`

ctypedef struct Text:
    char *data
    size_t size
    size_t room


cdef bint text_put(Text *t, const void *data, size_t size) noexcept nogil:
    cdef char *got
    if t.size + size > t.room:
        got = <char *>realloc(t.data, 2 * (t.size + size))
        if got == NULL:
            return False
        t.data = got
        t.room = 2 * (t.size + size)
    memcpy(t.data + t.size, data, size)
    t.size += size
    return True


cdef int by_name(const void *a, const void *b) noexcept nogil:
    cdef const unsigned char *x = (<const unsigned char **>a)[0]
    cdef const unsigned char *y = (<const unsigned char **>b)[0]
    cdef int order = memcmp(x + 1, y + 1, x[0] if x[0] < y[0] else y[0])
    return order if order else <int>x[0] - <int>y[0]


cdef bint compose(const Record *record, Text *out) noexcept nogil:
    """The contents of a record's file; False without memory."""
    cdef const unsigned char *p = <const unsigned char *>record + sizeof(Record)
    cdef const unsigned char **entries
    cdef char line[32]
    cdef uint32_t i
    cdef bint ok
    out.size = 0
    ok = text_put(out, p, record.length) and text_put(out, b"\n", 1)
    if record.entries:
        entries = <const unsigned char **>malloc(record.entries * sizeof(char *))
        if entries == NULL:
            return False
        p += record.length
        for i in range(record.entries):
            entries[i] = p
            p += 1 + p[0]
        qsort(entries, record.entries, sizeof(char *), by_name)
        for i in range(record.entries):
            ok = ok and text_put(out, entries[i] + 1, entries[i][0]) and text_put(out, b"\n", 1)
        free(entries)
    i = snprintf(line, sizeof(line), "%s %u ", KINDS[record.kind], record.entries)
    ok = ok and text_put(out, line, i)
    if not ok:
        return False
    snprintf(line, sizeof(line), "%08x\n", crc32c_update(0, <const unsigned char *>out.data, out.size))
    return text_put(out, line, 9)


cdef class Folders:
    """Descriptors of the shards' folders, opened when first used and made where missing.

    One for each thread that writes; `shards` folders under each of forward/ and reverse/."""
    cdef int fd[2][MOST_SHARDS]
    cdef readonly uint32_t shards
    cdef bytes root
    cdef const char *root_path
    cdef readonly uint64_t serial    # of this object in the process
    cdef uint8_t touched[2][MOST_SHARDS]

    def __cinit__(self, str root, uint32_t shards):
        if not 1 <= shards <= MOST_SHARDS:
            raise ValueError(f"{shards} shards: 1 to {MOST_SHARDS} are possible")
        self.root = os.fsencode(root)
        self.root_path = self.root
        self.serial = next_temporary()
        self.shards = shards
        memset(self.fd, 0xFF, sizeof(self.fd))

    def close(self):
        """Close every folder."""
        for kind in range(2):
            for i in range(self.shards):
                if self.fd[kind][i] >= 0:
                    close(self.fd[kind][i])
                    self.fd[kind][i] = -1

    def __dealloc__(self):
        self.close()

    cdef int folder(self, uint32_t kind, uint32_t shard, bint anew) noexcept nogil:
        """A descriptor of a shard's folder, or -1 and errno. `anew`: by path, even if it is open."""
        cdef char path[4096]
        cdef int fd = self.fd[kind][shard]
        cdef int parent
        if fd >= 0 and not anew:
            return fd
        snprintf(path, sizeof(path), "%s/%s/%02x", self.root_path, KINDS[kind], shard)
        fd = openat(-1, path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)
        if fd < 0 and errno == ENOENT and not anew:
            # Shard folders are made when first needed, idempotently, and never removed (rule W1); the
            # parent's fsync makes the new name as durable as the files below it are to be.
            if mkdirat(-1, path, 0o750) and errno != EEXIST:
                return -1
            fd = openat(-1, path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)
            if fd < 0:
                return -1
            snprintf(path, sizeof(path), "%s/%s", self.root_path, KINDS[kind])
            parent = openat(-1, path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)
            if parent < 0 or fsync(parent) or close(parent):
                return -1
        if not anew:
            self.fd[kind][shard] = fd
        return fd

    def sync_touched(self):
        """fsync every folder that files were renamed in since the last call. Raises OSError."""
        cdef uint32_t kind, i
        cdef bint failed = False
        with nogil:
            for kind in range(2):
                for i in range(self.shards):
                    if self.touched[kind][i]:
                        self.touched[kind][i] = 0
                        if fsync(self.fd[kind][i]):
                            failed = True
                            break
                if failed:
                    break
        if failed:
            raise OSError(errno, f"fsync of {KINDS[kind].decode()}/{i:02x}: {os.strerror(errno)}")


cdef class Files:
    """The package files of one rendered piece of a round, on their way to disk.

    Calling order: stage(), then publish(), then settle(); each raises OSError at the first call that
    fails, after which nothing more may be tried (rule W7). With `careful`, for mounts on which syncfs
    promises nothing, stage() syncs each file and publish() syncs it again after its rename; otherwise
    the caller calls syncfs between the three. Runs without the GIL; several pieces may be on their way
    at once, each with its own Folders.

    With `yields`, the thread gives the processor away before each file. Otherwise Linux, whatever the
    thread's priority, may let it run up to its next tick, some milliseconds, before one that has woken up.
    """
    cdef bytes records
    cdef Folders folders
    cdef int staging
    cdef bint careful, yields
    cdef File *files
    cdef readonly uint32_t count
    cdef Text names, text
    cdef const char *failed_call
    cdef uint32_t failed_at
    cdef readonly uint64_t bytes_written

    def __cinit__(self, bytes records not None, int staging, Folders folders not None, bint careful,
                  bint yields=False):
        cdef size_t at = 0, size = len(records)
        cdef const char *base = records
        cdef const Record *record
        cdef char name[FILE_NAME_ROOM]
        cdef uint32_t length
        cdef File *f
        self.records = records
        self.folders = folders
        self.staging = staging
        self.careful = careful
        self.yields = yields
        while at < size:
            at += (<const Record *>(base + at)).size
            self.count += 1
        self.files = <File *>malloc(self.count * sizeof(File) + 1)
        if self.files == NULL:
            raise MemoryError("no memory to write package files")
        at = 0
        f = self.files
        while at < size:
            record = <const Record *>(base + at)
            length = encode(<const unsigned char *>record + sizeof(Record), record.length, name)
            f.record = record
            f.inode = 0
            f.temporary = 0
            f.shard = shard_of(name, length, folders.shards)
            f.name = <uint32_t>self.names.size
            if not text_put(&self.names, name, length + 1):
                raise MemoryError("no memory to write package files")
            at += record.size
            f += 1

    def __dealloc__(self):
        free(self.files)
        free(self.names.data)
        free(self.text.data)

    cdef raise_failed(self, int error):
        cdef File *f = self.files + self.failed_at
        where = f"{KINDS[f.record.kind].decode()}/{f.shard:02x}/{(self.names.data + f.name).decode()}"
        raise OSError(error, f"{self.failed_call.decode()} of {where}: {os.strerror(error)}")

    cdef inline void give_way(self) noexcept nogil:
        if self.yields:
            sched_yield()

    def stage(self):
        """Write each file that is to be under a temporary name."""
        cdef uint32_t i
        cdef int error = 0
        with nogil:
            for i in range(self.count):
                self.give_way()
                if self.files[i].record.exists:
                    error = self.stage_one(self.files + i)
                    if error:
                        self.failed_at = i
                        break
        if error:
            self.raise_failed(error)

    cdef int stage_one(self, File *f) noexcept nogil:
        cdef char path[32]
        cdef stat_t st
        cdef int fd
        self.failed_call = "memory for the contents"
        if not compose(f.record, &self.text):
            return 12    # ENOMEM
        f.temporary = next_temporary()
        snprintf(path, sizeof(path), "t%lu", <unsigned long>f.temporary)
        self.failed_call = "open"
        fd = openat(self.staging, path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0o640)
        if fd < 0:
            return errno
        self.failed_call = "write"
        if not write_all(fd, self.text.data, self.text.size):
            return errno
        self.bytes_written += self.text.size
        self.failed_call = "fsync"
        if self.careful and fsync(fd):
            return errno
        self.failed_call = "stat"
        if fstat(fd, &st):
            return errno
        f.inode = st.st_ino
        self.failed_call = "close"
        if close(fd):
            return errno
        return 0

    def publish(self):
        """Rename each file to its place; take away those that are to be no more."""
        cdef uint32_t i
        cdef int error = 0
        with nogil:
            for i in range(self.count):
                self.give_way()
                error = self.publish_one(self.files + i)
                if error:
                    self.failed_at = i
                    break
        if error:
            self.raise_failed(error)

    cdef int publish_one(self, File *f) noexcept nogil:
        cdef char path[32]
        cdef const char *name = self.names.data + f.name
        cdef int fd, folder
        self.failed_call = "open of the folder"
        folder = self.folders.folder(f.record.kind, f.shard, False)
        if folder < 0:
            return errno
        if not f.record.exists:
            # Into staging, where the next one replaces it: nothing shared is ever unlinked (rule W1).
            # ENOENT: it had no file. Or this writer is deposed, and its next proof will say so.
            snprintf(path, sizeof(path), "gone%lu", <unsigned long>self.folders.serial)
            self.failed_call = "removal"
            if renameat(folder, name, self.staging, path) and errno != ENOENT:
                return errno
            self.folders.touched[f.record.kind][f.shard] = 1
            return 0
        snprintf(path, sizeof(path), "t%lu", <unsigned long>f.temporary)
        self.failed_call = "rename"
        if renameat(self.staging, path, folder, name):
            return errno
        self.folders.touched[f.record.kind][f.shard] = 1
        if self.careful:
            # Through FUSE a folder's fsync need not reach the server's disk; a file's own does (W5).
            self.failed_call = "open"
            fd = openat(folder, name, O_RDONLY | O_NOFOLLOW | O_CLOEXEC)
            if fd < 0:
                return errno
            self.failed_call = "fsync after the rename"
            if fsync(fd):
                return errno
            close(fd)
        return 0

    def settle(self):
        """Look for each name by a path opened anew (X6), once the names are synced."""
        cdef uint32_t i
        cdef int error = 0
        cdef int *fresh[2]
        with nogil:
            for i in range(2):
                fresh[i] = <int *>malloc(self.folders.shards * sizeof(int))
                if fresh[i] == NULL:
                    error = 12
                else:
                    memset(fresh[i], 0xFF, self.folders.shards * sizeof(int))
            if not error:
                for i in range(self.count):
                    self.give_way()
                    error = self.settle_one(self.files + i, fresh)
                    if error:
                        self.failed_at = i
                        break
            self.close_fresh(fresh)
        if error:
            self.raise_failed(error)

    cdef void close_fresh(self, int **fresh) noexcept nogil:
        cdef uint32_t kind, i
        for kind in range(2):
            if fresh[kind] != NULL:
                for i in range(self.folders.shards):
                    if fresh[kind][i] >= 0:
                        close(fresh[kind][i])
                free(fresh[kind])

    cdef int settle_one(self, File *f, int **fresh) noexcept nogil:
        cdef stat_t st
        cdef int *fd = &fresh[f.record.kind][f.shard]
        cdef int got
        self.failed_call = "open anew"
        if fd[0] < 0:
            fd[0] = self.folders.folder(f.record.kind, f.shard, True)
            if fd[0] < 0:
                return errno
        self.failed_call = "look after the sync (the mount has undone a synced rename)"
        got = fstatat(fd[0], self.names.data + f.name, &st, AT_SYMLINK_NOFOLLOW)
        if not f.record.exists:
            return EEXIST if got == 0 else 0 if errno == ENOENT else errno
        if got:
            return errno
        return 0 if st.st_ino == f.inode else ENOENT


def sync_file_system(int fd):
    """syncfs(2). Raises OSError."""
    cdef int failed
    with nogil:
        failed = syncfs(fd)
    if failed:
        raise OSError(errno, f"syncfs: {os.strerror(errno)}")


def is_local(int fd):
    """Whether this is a local file system known to honour syncfs: data and names, in one call."""
    cdef statfs_t st
    if fstatfs(fd, &st):
        raise OSError(errno, f"statfs: {os.strerror(errno)}")
    return st.f_type in (LOCAL_EXT, LOCAL_TMPFS, LOCAL_XFS, LOCAL_BTRFS, LOCAL_ZFS, LOCAL_F2FS)


# --- reading -----------------------------------------------------------------------------------------


cdef const char *check_contents(const char *data, size_t size, int kind, const char *file_name,
                                const char **entries_end, const char **name_end) noexcept nogil:
    """NULL if these are the contents of the file of this name, else what is wrong."""
    cdef const char *last
    cdef const char *p
    cdef const char *q
    cdef char encoded[FILE_NAME_ROOM]
    cdef char expected[64]
    cdef size_t count = 0
    cdef int n
    if size < 2 or data[size - 1] != c'\n':
        return "cut short"
    last = data + size - 1
    while last > data and (last - 1)[0] != c'\n':
        last -= 1
    p = data
    while p < last:
        q = <const char *>memchr(p, c'\n', last - p)
        if q == p or q - p > 255 or not visible(p, q):
            return "a line that is no package's name"
        if count == 0:
            name_end[0] = q
        count += 1
        p = q + 1
    if count == 0:
        return "cut short"
    n = snprintf(expected, sizeof(expected), "%s %lu ", KINDS[kind], <unsigned long>(count - 1))
    if <size_t>(data + size - last) != <size_t>n + 9 or memcmp(last, expected, n):
        return "its last line does not fit the rest"
    snprintf(expected, sizeof(expected), "%08x\n",
             crc32c_update(0, <const unsigned char *>data, last - data + n))
    if memcmp(last + n, expected, 9):
        return "its checksum is wrong"
    encode(<const unsigned char *>data, <uint32_t>(name_end[0] - data), encoded)
    if strcmp(encoded, file_name):
        return "its name belongs to another package"
    entries_end[0] = last
    return NULL


cdef bint visible(const char *p, const char *end) noexcept nogil:
    while p < end:
        if not 0x21 <= p[0] <= 0x7E or p[0] == c'|' or p[0] == c',':
            return False
        p += 1
    return True


cdef const char *read_file(int folder, const char *name, Text *out) noexcept nogil:
    """NULL and the whole file in `out`, or what went wrong (errno says more unless it is 0)."""
    cdef stat_t st
    cdef ssize_t n
    # Not to be held up by a named pipe that somebody has put there.
    cdef int fd = openat(folder, name, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC)
    out.size = 0
    if fd < 0:
        return "open"
    if fstat(fd, &st):
        close(fd)
        return "stat"
    if not S_ISREG(st.st_mode):
        close(fd)
        return "not a regular file"
    if <size_t>st.st_size + 1 > out.room:
        free(out.data)
        out.room = 2 * <size_t>st.st_size + 4096
        out.data = <char *>malloc(out.room)
        if out.data == NULL:
            out.room = 0
            close(fd)
            return "memory"
    while out.size < <size_t>st.st_size:
        n = read(fd, out.data + out.size, st.st_size - out.size)
        if n < 0:
            if errno == EINTR:
                continue
            close(fd)
            return "read"
        if n == 0:
            break
        out.size += n
    close(fd)
    return NULL


def read_folder(str path, str kind, uint32_t shard, uint32_t shards):
    """Read every package file of one shard's folder, opened anew (rule C4: only what is listed).

    Returns (redo lines, number of files, [(file name, what is wrong, errno)]); errno is 0 unless the
    system could not read the file. A forward file gives the line "+package|dependencies|", a reverse
    file "+package|dependents|". Raises OSError if the folder cannot be listed.
    """
    cdef int which = 0 if kind == "forward" else 1
    cdef bytes raw = os.fsencode(path)
    cdef const char *folder_path = raw
    cdef DIR *folder
    cdef dirent *entry
    cdef Text names, text, out
    cdef const char *wrong
    cdef const char *name
    cdef const char *end
    cdef const char *name_end
    cdef size_t at, length
    cdef uint64_t count = 0
    cdef int fd, error = 0
    memset(&names, 0, sizeof(Text))
    memset(&text, 0, sizeof(Text))
    memset(&out, 0, sizeof(Text))
    problems = []
    with nogil:
        fd = openat(-1, folder_path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)
        folder = fdopendir(fd) if fd >= 0 else NULL
        if folder == NULL:
            error = errno
        else:
            while True:
                set_errno(0)
                entry = readdir(folder)
                if entry == NULL:
                    error = errno
                    break
                length = strlen(entry.d_name)
                if (strcmp(entry.d_name, b".") == 0 or strcmp(entry.d_name, b"..") == 0
                        or begins_with(entry.d_name, b".nfs") or begins_with(entry.d_name, b".fuse_hidden")):
                    continue
                if not text_put(&names, entry.d_name, length + 1):
                    error = 12
                    break
            at = 0
            while not error and at < names.size:
                name = names.data + at
                length = strlen(name)
                at += length + 1
                count += 1
                set_errno(0)
                wrong = read_file(fd, name, &text)
                if wrong == NULL:
                    wrong = check_contents(text.data, text.size, which, name, &end, &name_end)
                    set_errno(0)
                    if wrong == NULL and shard_of(name, <uint32_t>length, shards) != shard:
                        wrong = "it belongs into another shard"
                if wrong != NULL:
                    error = errno
                    with gil:
                        problems.append((
                            name[:length].decode("utf-8", "surrogateescape"),
                            f"{wrong.decode()}: {os.strerror(error)}" if error else wrong.decode(),
                            error))
                    error = 0
                elif not put_line(&out, text.data, name_end, end):
                    error = 12
            closedir(folder)
    try:
        if error:
            raise OSError(error, os.strerror(error), path)
        return PyBytes_FromStringAndSize(out.data, out.size) if out.size else b"", count, problems
    finally:
        free(names.data)
        free(text.data)
        free(out.data)


cdef inline bint begins_with(const char *name, const char *prefix) noexcept nogil:
    return memcmp(name, prefix, strlen(prefix)) == 0 if strlen(name) >= strlen(prefix) else False


cdef bint put_line(Text *out, const char *data, const char *name_end, const char *end) noexcept nogil:
    """Append a good file's redo line; False without memory."""
    cdef size_t i, start
    if not (text_put(out, b"+", 1) and text_put(out, data, name_end - data) and text_put(out, b"|", 1)):
        return False
    start = out.size
    if not text_put(out, name_end + 1, end - name_end - 1):
        return False
    if out.size > start:
        out.size -= 1                    # the last entry's newline
        for i in range(start, out.size):
            if out.data[i] == c'\n':
                out.data[i] = c','
    return text_put(out, b"|\n", 2)
