"""The root helper: the few things that an agent without root cannot read or do, for it alone.

What it does is the table `verbs.VERBS`. It opens nothing that a caller names, and passes on of what
it reads only what that table says. What it changes on the host are the verbs
`partitions.CHANGING`: one call of the driver each, for the partitions of a GPU, and a signal to a
process that has a GPU open. Root may ask it, and one more user.

It imports little (nothing of stoker but itself, no event loop), so that it can be read whole,
starts at once, and is small; NVML is loaded only by who answers a caller about partitions. Every
connection has a process of its own, forked from one that only accepts: a caller who says half a
line, or takes no answer, delays nobody and leaves nothing behind.
"""
