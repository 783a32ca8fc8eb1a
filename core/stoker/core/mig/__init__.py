"""MIG: how boards can be cut up, what is wanted of a GPU, and how that is written down."""
