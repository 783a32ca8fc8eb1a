"""The child process that holds the driver open, and the agent's side of it."""
