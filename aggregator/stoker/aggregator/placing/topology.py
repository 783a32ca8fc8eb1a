"""Which of a node's GPUs lie best to each other, and which choice spoils least for those to come.

Theory of operation. Two GPUs are linked by their direct NVLinks, and through NVSwitches by as many
links as the one with fewer has to them. Of all sets of free GPUs of the size that is wanted the
best one is, in this order,

1. that whose worst linked pair has the most links, since the slowest link is what a ring or a tree
   of a collective runs at, then that with the most links in all;
2. on the fewest NUMA nodes (before 1, where the request asks for one NUMA node);
3. that which breaks the fewest cliques that are whole, the largest first: a clique is a largest set
   of GPUs that are all linked to each other, such as an NVLink pair, and whole while all of it is
   free. A request for one GPU so takes an odd one while there is any;
4. that which cuts the fewest links, then the fewest common NUMA nodes, to GPUs that stay free;
5. first in PCI order.

Where all links among the free GPUs are alike, as behind NVSwitches or without NVLink, only NUMA
nodes are left to weigh, and that needs no search. Otherwise all sets are looked at, less what
cannot win any more, and the answer is remembered: fleets have many nodes of few kinds. On nodes
with more than SEARCHED_MAX GPUs that are linked directly and unevenly (no such board is known) a
set is grown from each GPU instead, and may be less than the best; but if any lies as the request
asks, so does the one that is taken.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

from stoker.aggregator.model import Gpu, GpuTopology

SEARCHED_MAX = 16
# One kind of node has few hundred answers: subsets of free GPUs times sizes. About 2 KiB each.
REMEMBERED_MAX = 4096

Links = tuple[tuple[int, ...], ...]  # between the GPUs at two positions


@dataclass(frozen=True, slots=True)
class _Board:
    """What the search goes by: GPUs are positions in the node's list."""

    links: Links
    numa: tuple[int, ...]  # a number for each NUMA node


def links_between(one: Gpu, other: Gpu) -> int:
    """Return how many NVLinks join the two, directly or through NVSwitches; 0: none."""
    direct = min(_links_to(one, other.uuid), _links_to(other, one.uuid))
    return max(direct, min(one.nvswitch_links, other.nvswitch_links))


def satisfies(gpus: Sequence[Gpu], topology: GpuTopology) -> bool:
    """Whether these GPUs of one node lie to each other as `topology` says."""
    if len(gpus) < 2:
        return True
    match topology:
        case GpuTopology.ANY:
            return True
        case GpuTopology.NUMA:
            return gpus[0].numa_node is not None and len({gpu.numa_node for gpu in gpus}) == 1
        case GpuTopology.NVLINK:
            return all(links_between(one, other) > 0 for one, other in combinations(gpus, 2))


def best_set(
    gpus: Sequence[Gpu],
    free: Sequence[int],
    count: int,
    topology: GpuTopology = GpuTopology.ANY,
    must: int | None = None,
) -> tuple[int, ...]:
    """Return the best `count` of the free GPUs, rising; see the module's theory of operation.

    Positions are those in the node's list; `free` are rising and not fewer than `count`. With
    `must` the set has that one in it. If any set lies as `topology` says, then so does the answer,
    among those with `must`.
    """
    assert len(free) >= count, f"{count} of {free}"
    if len(free) == count:
        return tuple(free)
    if _is_even(gpus, free):
        numa = _numa_nodes([gpus[place] for place in free])
        return _fewest_numa_nodes(tuple(free), numa, count, must)
    board = _Board(_links_of(gpus), _numa_nodes(gpus))
    return _search(board, tuple(free), count, topology is GpuTopology.NUMA, must)


def _links_to(gpu: Gpu, uuid: str) -> int:
    for peer, links in gpu.nvlink_peers:
        if peer == uuid:
            return links
    return 0


def _links_of(gpus: Sequence[Gpu]) -> Links:
    """Return what `links_between` says of each two."""
    places = {gpu.uuid: place for place, gpu in enumerate(gpus)}
    told = [[0] * len(gpus) for _ in gpus]
    for row, gpu in zip(told, gpus, strict=True):
        for uuid, links in gpu.nvlink_peers:
            other = places.get(uuid)
            if other is not None:
                row[other] = links
    switched = [gpu.nvswitch_links for gpu in gpus]
    if any(switched):
        return tuple(
            tuple(
                0 if i == j else max(min(links, told[j][i]), min(switched[i], switched[j]))
                for j, links in enumerate(row)
            )
            for i, row in enumerate(told)
        )
    return tuple(
        tuple(min(links, told[j][i]) if links else 0 for j, links in enumerate(row))
        for i, row in enumerate(told)
    )


def _is_even(gpus: Sequence[Gpu], free: Sequence[int]) -> bool:
    """Whether each free GPU has as many links to each other one."""
    switched = gpus[free[0]].nvswitch_links
    uuids: set[str] | None = None
    for place in free:
        gpu = gpus[place]
        if gpu.nvswitch_links != switched:
            return False
        if gpu.nvlink_peers:
            uuids = uuids or {gpus[each].uuid for each in free}
            if any(peer in uuids for peer, _ in gpu.nvlink_peers):
                return False
    return True


def _numa_nodes(gpus: Sequence[Gpu]) -> tuple[int, ...]:
    """Return a number for each GPU: that of its NUMA node; where it is not known, one of its own.

    Where none is known they are all alike.
    """
    if all(gpu.numa_node is None for gpu in gpus):
        return (0,) * len(gpus)
    return tuple(
        -1 - place if gpu.numa_node is None else gpu.numa_node for place, gpu in enumerate(gpus)
    )


# --- without a search

_Places = tuple[int, ...]


def _fewest_numa_nodes(
    free: _Places, numa: tuple[int, ...], count: int, must: int | None
) -> _Places:
    """Return the set on the fewest NUMA nodes that leaves the most whole, first in PCI order.

    `numa` are the nodes of `free`.
    """
    groups: dict[int, list[int]] = {}
    for place, node in zip(free, numa, strict=True):
        groups.setdefault(node, []).append(place)
    if must is None:
        return _from_groups(list(groups.values()), count)[2]
    home = groups.pop(numa[free.index(must)])
    neighbours = [place for place in home if place != must]
    best: tuple[int, int, _Places] | None = None
    for taken in range(1, min(len(home), count) + 1):
        others = list(groups.values())
        if sum(map(len, others)) < count - taken:
            continue
        nodes, cut, places = _from_groups(others, count - taken)
        cut += taken * (len(home) - taken)
        key = (nodes, cut, tuple(sorted((must, *neighbours[: taken - 1], *places))))
        best = key if best is None or key < best else best
    assert best is not None, f"{count} of {free} with {must}"
    return best[2]


def _from_groups(groups: list[list[int]], count: int) -> tuple[int, int, _Places]:
    """Return how many groups are needed for `count`, the pairs that are cut, and the set.

    Of the fewest groups that have enough all but one are taken whole: one fewer would not do.
    """
    if count == 0:
        return 0, 0, ()
    sizes = sorted((len(group) for group in groups), reverse=True)
    needed = 1
    while sum(sizes[:needed]) < count:
        needed += 1
    best: tuple[int, _Places] | None = None
    for chosen in combinations(groups, needed):
        for partial in chosen:
            whole = [place for group in chosen if group is not partial for place in group]
            rest = count - len(whole)
            if 0 < rest <= len(partial):
                places = tuple(sorted((*whole, *partial[:rest])))
                key = (rest * (len(partial) - rest), places)
                best = key if best is None or key < best else best
    assert best is not None, f"{count} of {groups}"
    return needed, *best


# --- by search


@lru_cache(maxsize=REMEMBERED_MAX)
def _search(
    board: _Board, free: _Places, count: int, is_numa_first: bool, must: int | None
) -> _Places:
    """Return the set with the least key."""
    scale = _Scale(board, free, is_numa_first)
    if len(board.links) > SEARCHED_MAX:
        return min(_some_sets(board, free, count, must), key=scale.key)
    best: tuple[tuple[int, ...], _Places] | None = None
    twins = _elder_twins(board, free, must)

    def visit(chosen: _Places, at: int) -> None:
        nonlocal best
        if best is not None and scale.cannot_beat(chosen, count, best[0]):
            return
        if len(chosen) == count:
            if must is None or must in chosen:
                key = scale.key(chosen)
                best = (key, chosen) if best is None or key < best[0] else best
            return
        for next_at in range(at, len(free) - (count - len(chosen)) + 1):
            place = free[next_at]
            if all(elder in chosen for elder in twins[place]):
                visit((*chosen, place), next_at + 1)

    visit((), 0)
    assert best is not None, f"{count} of {free} with {must}"
    return best[1]


class _Scale:
    """The key of a set of free GPUs: the lesser the better."""

    def __init__(self, board: _Board, free: _Places, is_numa_first: bool) -> None:
        self._links = board.links
        self._numa = board.numa
        self._free = free
        self._is_numa_first = is_numa_first
        self._links_max = max(max(row) for row in board.links)
        is_free = set(free)
        whole = [clique for clique in _cliques(board) if clique <= is_free]
        by_size: dict[int, list[frozenset[int]]] = {}
        for clique in whole:
            by_size.setdefault(len(clique), []).append(clique)
        self._whole = [by_size[size] for size in sorted(by_size, reverse=True)]

    def key(self, chosen: _Places) -> tuple[int, ...]:
        """Return the key of a set."""
        rest = [place for place in self._free if place not in chosen]
        broken = (
            sum(not clique.isdisjoint(chosen) and not clique <= set(chosen) for clique in cliques)
            for cliques in self._whole
        )
        cut = sum(self._links[one][other] for one in chosen for other in rest)
        parted = sum(self._numa[one] == self._numa[other] for one in chosen for other in rest)
        return (*self._lead(chosen, 0, 0), *broken, cut, parted, *chosen)

    def cannot_beat(self, chosen: _Places, count: int, best: tuple[int, ...]) -> bool:
        """Whether no set of `count` that begins with `chosen` has a lesser key than `best`."""
        left = count * (count - 1) // 2 - len(chosen) * (len(chosen) - 1) // 2
        return self._lead(chosen, left, self._links_max) > best[:3]

    def _lead(self, chosen: _Places, more_pairs: int, links_each: int) -> tuple[int, ...]:
        """Return the first of the key for the set, and as many pairs more with so many links."""
        links = [self._links[one][other] for one, other in combinations(chosen, 2)]
        worst = min(links, default=self._links_max)
        total = sum(links) + more_pairs * links_each
        nodes = len({self._numa[place] for place in chosen})
        return (nodes, -worst, -total) if self._is_numa_first else (-worst, -total, nodes)


def _elder_twins(board: _Board, free: _Places, must: int | None) -> dict[int, _Places]:
    """Return for each free GPU those before it that are exchangeable with it.

    Of such only the first few are ever chosen: the key of any other choice is greater.
    """

    def are_twins(one: int, other: int) -> bool:
        return board.numa[one] == board.numa[other] and all(
            board.links[one][third] == board.links[other][third]
            for third in range(len(board.links))
            if third not in (one, other)
        )

    return {
        place: tuple(
            elder
            for elder in free
            if elder < place and must not in (elder, place) and are_twins(elder, place)
        )
        for place in free
    }


@lru_cache(maxsize=REMEMBERED_MAX)
def _cliques(board: _Board) -> tuple[frozenset[int], ...]:
    """Return the largest sets of two and more GPUs that are all linked to each other.

    After Bron and Kerbosch (1973), with a pivot.
    """
    near = [{other for other, links in enumerate(row) if links > 0} for row in board.links]
    found: list[frozenset[int]] = []

    def grow(clique: frozenset[int], may: set[int], seen: set[int]) -> None:
        if not may and not seen:
            if len(clique) > 1:
                found.append(clique)
            return
        pivot = max(may | seen, key=lambda place: (len(near[place] & may), -place))
        for place in sorted(may - near[pivot]):
            grow(clique | {place}, may & near[place], seen & near[place])
            may = may - {place}
            seen = seen | {place}

    grow(frozenset(), set(range(len(near))), set())
    return tuple(found)


def _some_sets(board: _Board, free: _Places, count: int, must: int | None) -> Iterator[_Places]:
    """Yield good sets: grown from each GPU, and such as lie on one NUMA node or are all linked."""
    for start in free if must is None else (must,):
        yield _grow(board, free, count, start)
    by_node: dict[int, list[int]] = {}
    for place in free:
        by_node.setdefault(board.numa[place], []).append(place)
    for group in by_node.values():
        if len(group) >= count and (must is None or must in group):
            yield _grow(board, group, count, group[0] if must is None else must)
    clique = _first_clique(board, free, count, must)
    if clique is not None:
        yield clique


def _first_clique(board: _Board, free: _Places, count: int, must: int | None) -> _Places | None:
    """Return a set in which all are linked to each other; None: there is none."""

    def extend(chosen: _Places, among: Sequence[int]) -> _Places | None:
        if len(chosen) == count:
            return tuple(sorted(chosen))
        for at in range(len(among) - (count - len(chosen)) + 1):
            linked = [other for other in among[at + 1 :] if board.links[among[at]][other] > 0]
            found = extend((*chosen, among[at]), linked)
            if found is not None:
                return found
        return None

    if must is None:
        return extend((), free)
    return extend((must,), [place for place in free if board.links[must][place] > 0])


def _grow(board: _Board, free: Sequence[int], count: int, start: int) -> _Places:
    """Return a set with `start` in it to which always the best linked GPU was added."""
    chosen = [start]
    while len(chosen) < count:
        links = {
            place: [board.links[place][each] for each in chosen]
            for place in free
            if place not in chosen
        }
        chosen.append(max(links, key=lambda place: (min(links[place]), sum(links[place]), -place)))
    return tuple(sorted(chosen))
