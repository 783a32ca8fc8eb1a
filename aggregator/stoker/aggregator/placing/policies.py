"""Placement policies as values: what a good place is, by name, and which pool follows which."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from stoker.aggregator.placing import kernels as k


@dataclass(frozen=True, slots=True, eq=False)  # by identity: it is a key in the inner loop
class Policy:
    """How places are scored; docs/placement.md tells where each comes from."""

    name: str
    summary: str  # for a person
    mode: int  # of the kernels
    tie: int = k.TIE_ORDER
    # Of a mixture: what it is made of, with weights; the first one says which GPU of a node.
    parts: "tuple[tuple[Policy, float], ...]" = ()


_ALL = (
    Policy(
        "fragmentation",
        "loses the fewest GPUs for the requests that are usual",
        k.LOSS,
        k.TIE_FULLEST,
    ),
    Policy("binpack", "fills GPUs and nodes that are in use before others", k.BINPACK),
    Policy("spread", "takes the emptiest GPUs and nodes first", k.SPREAD),
    Policy("balanced", "goes by the live load of GPUs and their memory", k.RANDOM),
    Policy(
        "energy",
        "as fragmentation; among equal places one where the next watt is the cheapest",
        k.LOSS,
        k.TIE_POWER,
    ),
    # Published policies, for comparison: see docs/placement.md.
    Policy("fgd", "Fragmentation Gradient Descent (USENIX ATC 2023)", k.FGD),
    Policy("random", "any place that fits", k.RANDOM),
    Policy("dotprod", "least product of what is free and what is asked (Tetris)", k.DOTPROD),
    Policy("clustering", "tasks of one kind together (Gandiva)", k.CLUSTERING),
    Policy("packing", "GPUs in use, then nodes in use, then others (MLaaS in the Wild)", k.PACKING),
    Policy("bestfit", "least CPU and GPU left over", k.BESTFIT),
)
POLICIES: Mapping[str, Policy] = {policy.name: policy for policy in _ALL}
# Those that a fleet may be told to follow; the others are there to be compared with.
CHOSEN_BY_NAME = ("fragmentation", "binpack", "spread", "balanced", "energy", "fgd", "bestfit")
# Those that are more than a way to score rows.
BALANCED = POLICIES["balanced"]
RANDOM = POLICIES["random"]


@dataclass(frozen=True, slots=True)
class Policies:
    """The policy of each pool; those that are not named follow `default`."""

    default: Policy = POLICIES["fragmentation"]
    by_pool: Mapping[str, Policy] = field(default_factory=dict[str, Policy])

    @staticmethod
    def named(default: str, by_pool: Mapping[str, str] | None = None) -> "Policies":
        """Return the policies of these names; raises ValueError with the known ones."""
        return Policies(
            policy_named(default),
            {pool: policy_named(name) for pool, name in (by_pool or {}).items()},
        )

    def of(self, pool: str) -> Policy:
        """Return the policy that the nodes of the pool follow."""
        return self.by_pool.get(pool, self.default)

    def all(self) -> list[Policy]:
        """Return those that any node follows, the default first, each once."""
        return list(dict.fromkeys([self.default, *self.by_pool.values()]))

    def modes(self) -> set[int]:
        """Return the kernels' modes that any of them, or a part of one, goes by."""
        return {part.mode for policy in self.all() for part in parts_of(policy)}


def parts_of(policy: Policy) -> list[Policy]:
    """Return what the policy is made of: of one that is no mixture itself."""
    return [part for part, _ in policy.parts] or [policy]


@lru_cache(maxsize=256)  # the same text is the same policy
def policy_named(text: str) -> Policy:
    """Return the policy of that name, or the mixture that is written `2*binpack+energy`.

    Raises ValueError with what is known.
    """
    terms = [_term(each, text) for each in text.split("+")]
    if len(terms) == 1 and terms[0][1] == 1.0:
        return terms[0][0]
    for policy, weight in terms:
        if policy in (BALANCED, RANDOM):
            raise ValueError(f"{text!r}: {policy.name} does not score nodes, so it cannot be mixed")
        if not 0.0 < weight < float("inf"):
            raise ValueError(
                f"{text!r}: wanted a weight above 0 for {policy.name}, found {weight:g}"
            )
    first = terms[0][0]
    return Policy(text, f"a mixture: {text}", first.mode, first.tie, tuple(terms))


def _term(text: str, whole: str) -> tuple[Policy, float]:
    weight, star, name = text.rpartition("*")
    policy = POLICIES.get(name.strip())
    if policy is None:
        raise ValueError(
            f"there is no placement policy {name.strip()!r}; known are {', '.join(POLICIES)}"
        )
    try:
        return policy, float(weight) if star else 1.0
    except ValueError:
        raise ValueError(f"{whole!r}: wanted a weight before {text!r}, such as 2*binpack") from None
