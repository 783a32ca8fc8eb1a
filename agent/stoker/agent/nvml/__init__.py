"""Reads GPUs through NVML, and knows its habits."""
