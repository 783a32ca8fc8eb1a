"""Judges the health of the node's GPUs: what was seen becomes verdicts, and what must be kept."""
