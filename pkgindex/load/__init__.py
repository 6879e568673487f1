"""Loads package lists of the real world into a server; knows only `pkgindex.client` below it.

source      a file or standard input, decompressed
formats     which format it has; the table of readers
homebrew, debian, jsonlines     the readers: what depends on what
order       each package after everything it depends on; cycles
loader      sends them, and says what became of each
"""
