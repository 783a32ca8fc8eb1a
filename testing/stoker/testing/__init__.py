"""A world for tests: virtual clock, faulty network, seeded simulation."""
