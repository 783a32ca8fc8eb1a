"""A simulated GPU driver at the boundary of nvidia-ml-py, for tests and for trying out."""
