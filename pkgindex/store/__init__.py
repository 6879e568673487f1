"""What stands behind `file:`: a journal first, then one file per package, on a mount that may be shared.

    mount.py      a shared folder, and what may be asked of it: names listed anew, renames through staging
    format.py     FORMAT: what this store is
    lease.py      LOCK: is the last writer's process still there
    claim.py      becoming the one writer: epoch, fence
    journal.py    segments, their heads, the thread that commits
    origins.py    what became of messages that came through other servers: each takes effect once
    packages.py   write-behind rounds: package files from the graph
    recovery.py   reading it all back
    check.py      verifying it, mending what is derived
    _disk.pyx     the hot paths of these, in C

The rules that these keep have numbers (W1, C3, …): docs/storage.md states each, with what is lost
without it.
"""
