"""The root helper: the few things that an agent without root cannot read, told to that agent alone.

What it does is the table `verbs.VERBS`. It changes nothing on the host, opens nothing that a caller
names, and passes on of what it reads only what that table says. Root may ask it, and one more user.

It imports little (nothing of stoker but itself, no event loop), so that it can be read whole,
starts at once, and is small. Every connection has a process of its own, forked from one that only
accepts: a caller who says half a line, or takes no answer, delays nobody and leaves nothing behind.
"""
