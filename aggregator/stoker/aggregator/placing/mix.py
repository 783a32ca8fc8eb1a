"""What requests are like lately: shapes and how often they come, the recent ones counting for more.

It goes by the order in which requests arrive, not by time, so that a quiet night forgets nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from stoker.aggregator.placing.shapes import Shape

# A request counts half when so many have come after it.
HALF_LIFE = 4_000
# Shapes that are counted; the rarest are forgotten when there are twice as many.
SHAPES_MAX = 512
_SCALE_MAX = 1e100


@dataclass(slots=True)
class Mix:
    """Counts of shapes, each arrival weighing a little more than the one before it."""

    half_life: float = HALF_LIFE
    arrived: int = 0
    weight_of_oldest: float = 1.0  # of a request that came before any other
    _weights: dict[Shape, float] = field(default_factory=dict[Shape, float])
    _next_weight: float = 1.0

    @staticmethod
    def of(shapes: Iterable[Shape]) -> "Mix":
        """Return the mix of a known workload, in which all count alike."""
        mix = Mix(half_life=float("inf"))
        for shape in shapes:
            mix.add(shape)
        return mix

    def add(self, shape: Shape) -> None:
        """Count one request."""
        self.arrived += 1
        self._weights[shape] = self._weights.get(shape, 0.0) + self._next_weight
        self._next_weight *= 2.0 ** (1.0 / self.half_life)
        if self._next_weight > _SCALE_MAX:
            self._weights = {each: w / _SCALE_MAX for each, w in self._weights.items()}
            self._next_weight /= _SCALE_MAX
            self.weight_of_oldest /= _SCALE_MAX
        if len(self._weights) > 2 * SHAPES_MAX:
            self._weights = dict(self.shapes()[:SHAPES_MAX])

    def shapes(self) -> list[tuple[Shape, float]]:
        """Return the shapes with their weights, the heaviest first; the same for the same mix."""
        return sorted(self._weights.items(), key=lambda item: (-item[1], repr(item[0])))
