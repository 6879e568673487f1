"""Several servers on one mount: one member writes, the others follow it, any of them may take over.

Theory of operation. The mount is the one arbiter: whoever makes `staging/<n+1>` and takes the older
directories away is the writer of epoch n+1, and nothing that its predecessors still do can count any
more (rules C1 to C8, store/claim.py). All else here only decides *when* to claim and *whom* to follow:
lock, heartbeat and reach are hints that may be late or wrong, and a wrong one costs a needless takeover,
never a change. So safety rests on the mount and liveness on clocks, and the two never mix.

`takeover` holds these decisions as a state machine without I/O, clock, thread or chance of its own: a
driver feeds it what it sees and does what it says. tests/simulation runs that very machine through
random schedules of faults and checks the invariants after every step; `node` drives it in a server.

The parts, from the ground up:

    frames, trust, stream    what servers say to each other, and whom they believe
    members                  the servers/ folder, by which they meet
    takeover, actions        who writes
    pending                  this server's unanswered messages: its origin's stream
    writer, feed             one reign: messages evaluated, followers fed
    follower                 the other side of a feed
    blocking, port, node     all that, driven by a clock, a mount and the cluster port
    index                    the Index that clients talk to
"""
