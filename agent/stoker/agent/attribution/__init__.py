"""Whose a process is, and what of the GPUs others have handed out."""
