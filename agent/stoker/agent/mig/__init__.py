"""Partitions of this node's GPUs (MIG): what is, what is wanted, and the way between the two."""
