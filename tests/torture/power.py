"""Power loss: what was not synced disappears, and nothing that was promised with it. Four campaigns.

- *states*: what the store asks of the file system is recorded, and every state that POSIX allows a power
  loss to leave, at every point of it, is recovered from (power_states.py);
- *ext4*: a loop-mounted image is shut down under a running server (power_live.py, power_disks.py);
- *cache*: the disk beneath an ext4 forgets, block by block, what was not flushed;
- *forgetful*: so does a FUSE file system that forgets all that was not fsynced.
"""

from __future__ import annotations

from tests.store.tracing import strace_works
from tests.torture.campaign import Campaign
from tests.torture.power_campaign import states
from tests.torture.power_disks import Cached, Ext4, Forgetful
from tests.torture.power_live import cached, ext4, forgetful

__all__ = ["CAMPAIGNS"]

CAMPAIGNS = (
    Campaign(
        "power-states",
        "Every state that POSIX allows a power loss to leave, at every point of seven lives of a server, "
        "and of the lives that follow those cut short: recovered from, and judged by the answers.",
        states,
        absent=lambda: strace_works() or None,
        seconds=(200.0, 1400.0),
    ),
    Campaign(
        "power-ext4",
        "An ext4 file system shut down without a flush under a server and 50 clients, and mounted again.",
        ext4,
        absent=Ext4.why_not,
        seconds=(80.0, 240.0),
    ),
    Campaign(
        "power-cache",
        "An ext4 file system on a disk that forgets any part of the blocks that were not flushed, under a "
        "server and 50 clients.",
        cached,
        absent=Cached.why_not,
        seconds=(80.0, 240.0),
    ),
    Campaign(
        "power-forgetful",
        "A FUSE file system that forgets what was not fsynced, under a server and 50 clients.",
        forgetful,
        absent=Forgetful.why_not,
        seconds=(80.0, 300.0),
    ),
)
