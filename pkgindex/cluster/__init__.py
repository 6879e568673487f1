"""Several servers on one mount: one writes, the others follow it, and any of them may take over."""
