"""The agent: one per host, it reads the cards and holds what was granted on them."""
