"""Random schedules of the takeover protocol, in virtual time; `python -m tests.simulation` runs them.

The decisions under test are the product's own (pkgindex/cluster/takeover.py). What they stand on is
modelled: the mount with its caches, locks and power losses (mount.py), the members that claim, write and
follow on it, operation by operation (member.py), the network and the faults (world.py), and a judge who
sees all of it (judge.py). A seed gives the whole schedule.
"""
