"""Replicas that come in bursts and share GPUs, placed by the aggregator's own decisions."""
