"""Where the verbs about GPUs look and act: set by whoever starts the helper, never by a caller."""


class Ground:
    """The places and the driver that there are."""

    def __init__(self, proc: str, locks: str, standin: tuple[str, ...] = ()) -> None:
        """Take where /proc is, and a folder for locks that nobody else can write to.

        `locks` is empty where there is no such folder. `standin`: which simulated driver is asked
        in place of the real one, as options; empty: the real one.
        """
        self.proc = proc
        self.locks = locks
        self.standin = standin
