"""Workloads for placement: fleets and tasks, recorded or made by seed, and the runs over them."""
