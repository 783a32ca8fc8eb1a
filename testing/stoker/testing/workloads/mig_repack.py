"""Whether GPU instances fit on so many GPUs if all could be moved at will: what no policy exceeds.

It is the reference for how much free migration of everything would give, on boards of seven slices:
there the answer is a closed form. 7g takes a whole GPU. Of the other GPUs the left half (slices 0
to 3) holds 4g or 3g or two pairs of slices; the right half 3g, or a pair (4 and 5) and the end (6
and 7). A pair holds 2g, or 1g of double memory, or two 1g; the end 1g of double memory, or one 1g.
A left half holds whatever a right half does, so 3g goes to the right while there is room; of the
rest an end loses less than a pair to 1g of double memory. Every exchange that departs from this
order frees no more, so what does not fit in it fits in none.
"""

from collections.abc import Sequence

from stoker.aggregator.placing.mig_slices import Shape

# In this order they are counted.
SEVEN_SLICE_SHAPES = (
    Shape(1, (0, 1, 2, 3, 4, 5, 6)),
    Shape(2, (0, 2, 4, 6)),
    Shape(2, (0, 2, 4)),
    Shape(4, (0, 4)),
    Shape(4, (0,)),
    Shape(8, (0,)),
)


def fits(gpus: int, counts: Sequence[int]) -> bool:
    """Whether so many instances of each of SEVEN_SLICE_SHAPES fit on so many GPUs."""
    ones, doubles, twos, threes, fours, sevens = counts
    cut = gpus - sevens
    right_threes = min(threes, cut)
    left_halves = cut - fours - (threes - right_threes)
    right_halves = cut - right_threes
    if cut < 0 or left_halves < 0:
        return False
    pairs = 2 * left_halves + right_halves - twos
    ends = right_halves
    doubles_at_ends = min(doubles, ends)
    pairs -= doubles - doubles_at_ends
    ends -= doubles_at_ends
    return pairs >= 0 and ones <= 2 * pairs + ends
