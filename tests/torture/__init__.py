"""Campaigns that try to break each promise with real faults. `make torture` runs them; see campaign.py."""
