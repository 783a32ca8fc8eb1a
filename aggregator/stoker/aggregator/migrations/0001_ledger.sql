-- Every durable event in order. `id` is the resource version; it is never used twice, not even after pruning.
CREATE TABLE events (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at REAL NOT NULL,
    kind TEXT NOT NULL,
    payload TEXT NOT NULL
);

-- What the events up to `version` add up to, in parts, so that writing one never holds up a commit for long.
-- A snapshot is complete when it has as many parts as each of them says.
CREATE TABLE snapshots (
    version INTEGER NOT NULL,
    part INTEGER NOT NULL,
    parts INTEGER NOT NULL,
    payload TEXT NOT NULL,
    PRIMARY KEY (version, part)
);

-- Overwritten to find out whether the disk takes writes again.
CREATE TABLE probes (
    id INTEGER PRIMARY KEY,
    count INTEGER NOT NULL
);
