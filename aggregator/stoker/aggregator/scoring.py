"""Which of the places that fit is best: best fit, the one that leaves the least behind."""


def whole_score(free_gpus: int, wanted_gpus: int) -> int:
    """Return how many GPUs would be left free on the node; lower is better, none is best.

    `free_gpus` counts those that the request could have: on a node of mixed models, of its model.
    """
    return free_gpus - wanted_gpus


def share_score(is_shared: bool, room_bytes: int) -> tuple[bool, int]:
    """Return how well a share fits on a GPU that has room for it; lower is better.

    A GPU that is shared already comes before one that would be broken up for it, and then the one
    with the least room, so that what is left stays in large pieces.
    """
    return (not is_shared, room_bytes)
