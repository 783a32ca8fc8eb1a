"""What is wrong with this host, and what to do: looks with deadlines, and a table of checks."""
