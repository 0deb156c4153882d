"""Adapters: from a few trained arrays to the low-rank factors of all sites."""
