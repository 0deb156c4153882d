"""Exchange of adapters with other tools, without importing any of them."""
