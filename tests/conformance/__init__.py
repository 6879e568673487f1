"""What any server of the protocol must do, judged over the wire alone.

    pytest tests/conformance                             # pkgindex with every store
    pytest tests/conformance --server HOST:PORT          # a server that is already running
    pytest tests/conformance --server … --only-spec      # and that need not share our decisions

Each test is marked `spec` (the original specification says so) or `decision` (it is silent, and
this is what pkgindex decided). Tests work under names with a random prefix and remove them at the
end: a run leaves the server's index as it was. Limits are those of a server with its defaults.
"""
