"""Reads hardware counters from an nv-hostengine, where NVML has none."""
