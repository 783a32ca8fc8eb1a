"""The inner loops of placement: compiled by numba where it is installed, else interpreted.

Both give the same decisions to the last bit: there are integers, and sums, products, quotients and
roots of floats, which IEEE 754 leaves no choice about. A row is the GPUs of one model on one node,
a slot is one of them, a score is that of one shape of request on one row. What is in which column
stands here, beside the loops; what the numbers mean, in `losses` and `fragmentation`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Keys = npt.NDArray[np.int32]
Slots = npt.NDArray[np.int8]
Flags = npt.NDArray[np.uint8]

IDLE = 1000  # thousandths left of a GPU that nobody uses; of any other there are fewer
NO_FIT = -1  # the key of a row that the shape does not fit
TIE_BITS = 10  # a key is the score, and below it so many bits that decide between equal scores
TIE_MAX = (1 << TIE_BITS) - 1
SCORE_MAX = (1 << 20) - 1

# `rows`: what stays while the node's inventory does, ...
ROW_CLASS = 0  # of nodes that the same requests may use
ROW_CARD = 1  # of the first slot; -1: no GPUs
ROW_SLOTS = 2
ROW_MIXED = 3  # 1: slots of several cards
ROW_FIRST = 4  # 1: the first row of its node, which stands for it where no GPU is wanted
# ... and what changes with every grant.
ROW_OPEN = 5  # 0: nothing is placed there
ROW_CPU = 6
ROW_MEMORY = 7
ROW_FREE = 8  # slots that are idle
ROW_LEFT = 9  # of all slots together
ROW_POWER = 10  # 0..1023, more is better: see `columns`
ROW_KINDS = 11  # bit k: something of kind k is on the node
ROW_VERSION = 12  # rises with every change
ROW_COLUMNS = 13

# `slots`, of each slot of a row.
SLOT_CARD = 0
SLOT_LEFT = 1  # thousandths; IDLE: a whole-GPU request can take it
SLOT_ROOM = 2  # bytes that a share can take
SLOT_COMPUTE = 3  # thousandths that a share can be promised
SLOT_USABLE = 4  # bytes that the driver leaves
SLOT_COLUMNS = 5

# `ask`: what a shape wants of a node.
ASK_TAKE = 0  # shapes.Take
ASK_GPUS = 1
ASK_CPU = 2
ASK_MEMORY = 3
ASK_KIND = 4  # what kind of task it is, for policy CLUSTERING
ASK_COLUMNS = 5
TAKE_CPU, TAKE_SHARE, TAKE_WHOLE, TAKE_MIG = range(4)

# `needs`: what a shape takes of one GPU of each card.
NEED_FITS = 0
NEED_ROOM = 1  # 0: the same part of what the driver leaves as of the compute
NEED_COMPUTE = 2
NEED_MILLI = 3  # for scores
NEED_COLUMNS = 4

# `rule`: how a score comes about.
RULE_MODE = 0
RULE_TIE = 1
RULE_COLUMNS = 2
LOSS, FGD, BESTFIT, DOTPROD, CLUSTERING, PACKING, RANDOM, BINPACK, SPREAD = range(9)
TIE_ORDER, TIE_FULLEST, TIE_POWER = range(3)

# LOSS: `drains`, of each card. What the requests for it take of the host for each GPU, and how
# much that varies.
DRAIN_CPU, DRAIN_CPU_SPREAD, DRAIN_MEMORY, DRAIN_MEMORY_SPREAD = range(4)
# `jobs`: requests for several GPUs at once, for which places are kept.
JOB_GPUS, JOB_CPU, JOB_MEMORY = range(3)
# Losses less than so many GPUs apart are equal, and the tie decides.
STEP = 0.04
FRAGMENTS = 0.1  # so much of what FGD counts is lost as well
ORIGIN = 1 << 19  # points of a place where nothing is lost
# The shortfall of a normal variable is tabled for so many standard deviations to both sides.
DEVIATIONS = 4
PER_DEVIATION = 100

# The largest machine of the published policies: 128 CPUs, 8 GPUs.
CPU_SPEC = 128_000
GPU_SPEC = 8_000
MILLION = 1_000_000
MILLI_WORTH = 1_000  # a thousandth of a GPU in millionths
NOTHING = 1e-9


def worth_of(
    card: int,
    cpu: int,
    memory: int,
    usable: float,
    free: int,
    drains: Floats,
    shortfalls: Floats,
    jobs: Ints,
    job_prices: Floats,
) -> float:
    """Return what a node is worth, in GPUs, as it is or would be; see `losses`.

    That is what can be used of its GPUs, less what will want for CPU or memory of the host, and the
    places for jobs of several GPUs.
    """
    wanting = 0.0
    if usable > NOTHING:
        for kind in range(2):
            want = drains[card, 2 * kind]
            if want < 1.0:
                continue  # nobody asks for as much as a thousandth of a core, or a byte
            deviation = drains[card, 2 * kind + 1] * sqrt(usable)
            lacking = want * usable - (cpu if kind == 0 else memory)
            if lacking >= DEVIATIONS * deviation:
                wanting = max(wanting, lacking / want)
            elif lacking > -DEVIATIONS * deviation:
                place = (lacking / deviation + DEVIATIONS) * PER_DEVIATION
                below = int(place)
                part = place - below
                shortfall = shortfalls[below] * (1.0 - part) + shortfalls[below + 1] * part
                wanting = max(wanting, deviation * shortfall / want)
    kept = 0.0
    if free >= 2:
        for job in range(jobs.shape[0]):
            price = job_prices[job, card]
            if price > 0.0 and free >= jobs[job, JOB_GPUS]:
                fitting = free // jobs[job, JOB_GPUS]
                if jobs[job, JOB_CPU] > 0:
                    fitting = min(fitting, cpu // jobs[job, JOB_CPU])
                if jobs[job, JOB_MEMORY] > 0:
                    fitting = min(fitting, memory // jobs[job, JOB_MEMORY])
                kept = max(kept, fitting * price)
    return usable - wanting + kept


def refresh(
    rows: Ints,
    slots: Ints,
    migs: Ints,
    class_fits: Flags,
    needs: Ints,
    mig_ranks: Ints,
    ask: Ints,
    rule: Ints,
    worth_left: Ints,
    worth_free: Ints,
    levels: Ints,
    points: Ints,
    rests: Floats,
    drains: Floats,
    shortfalls: Floats,
    jobs: Ints,
    job_prices: Floats,
    gains: Floats,
    worths: Floats,
    versions: Ints,
    log: Ints,
    last: Ints,
    start: int,
    end: int,
    keys: Keys,
    best: Slots,
) -> int:
    """Score again the rows that `log` names from `start` to `end`; all rows for a `start` below 0.

    `last` is where in `log` a row is named last. `keys` gets a key per row, `best` the slot that a
    share would take there. `worths` are those of rows as they are (usable GPUs, and all in all), at
    the `versions` of the rows. Returns how many rows were scored.
    """
    count = rows.shape[0] if start < 0 else end - start
    take, gpus, cpu, memory = ask[ASK_TAKE], ask[ASK_GPUS], ask[ASK_CPU], ask[ASK_MEMORY]
    mode, tie_by = rule[RULE_MODE], rule[RULE_TIE]
    goes_by_mix = mode <= FGD
    scored = 0
    for position in range(count):
        row = position
        if start >= 0:
            row = log[start + position]
            if last[row] != start + position:
                continue  # it is named again later
        scored += 1
        keys[row] = NO_FIT
        best[row] = -1
        cpu_left = rows[row, ROW_CPU] - cpu
        if (
            rows[row, ROW_OPEN] == 0
            or cpu_left < 0
            or rows[row, ROW_MEMORY] < memory
            or class_fits[rows[row, ROW_CLASS]] == 0
        ):
            continue
        card = rows[row, ROW_CARD]
        count_slots = rows[row, ROW_SLOTS]
        free = rows[row, ROW_FREE]

        # Does it fit?
        if take == TAKE_CPU:
            if rows[row, ROW_FIRST] == 0:
                continue
        elif take == TAKE_WHOLE:
            if rows[row, ROW_MIXED] == 0:
                if free < gpus or needs[card, NEED_FITS] == 0:
                    continue
            else:
                found = 0
                for slot in range(count_slots):
                    if slots[row, slot, SLOT_LEFT] == IDLE:
                        found += needs[slots[row, slot, SLOT_CARD], NEED_FITS]
                if found < gpus:
                    continue
        elif take == TAKE_MIG:
            rank, devices, matching = -1, 0, 0
            for kind in range(migs.shape[1]):
                if migs[row, kind] > 0:
                    devices += migs[row, kind]
                    if mig_ranks[kind] >= 0:
                        matching += migs[row, kind]
                        if rank < 0 or mig_ranks[kind] < rank:
                            rank = mig_ranks[kind]
            if matching >= gpus and rank >= 0:
                # The smallest device that will do, on the node with the fewest left.
                keys[row] = ((SCORE_MAX - rank) << TIE_BITS) + TIE_MAX - min(devices, TIE_MAX)
            continue

        # What is the place worth? First by what it was and would be as a whole.
        milli = gpus * IDLE if take == TAKE_WHOLE else 0
        if take == TAKE_SHARE:
            if count_slots == 0:
                continue
            milli = needs[card, NEED_MILLI]
        base, score, level_after = 0, 0, 0
        usable, worth_before = 0.0, 0.0
        if goes_by_mix and card >= 0:
            while level_after < levels.shape[0] and levels[level_after] <= cpu_left:
                level_after += 1
            level_before = level_after
            while level_before < levels.shape[0] and levels[level_before] <= rows[row, ROW_CPU]:
                level_before += 1
            base = MILLI_WORTH * milli - worth_free[card, level_before, free]
            if level_before != level_after:
                for slot in range(count_slots):
                    left = slots[row, slot, SLOT_LEFT]
                    base += worth_left[card, level_after, left]
                    base -= worth_left[card, level_before, left]
            if mode == LOSS:
                if versions[row] != rows[row, ROW_VERSION]:
                    for slot in range(count_slots):
                        usable += float(rests[card, slots[row, slot, SLOT_LEFT]])
                    worths[row, 0] = usable
                    worths[row, 1] = worth_of(
                        card,
                        rows[row, ROW_CPU],
                        rows[row, ROW_MEMORY],
                        usable,
                        free,
                        drains,
                        shortfalls,
                        jobs,
                        job_prices,
                    )
                    versions[row] = rows[row, ROW_VERSION]
                usable, worth_before = float(worths[row, 0]), float(worths[row, 1])
        elif mode == LOSS:
            score = ORIGIN + 1  # where no GPU can lose its CPUs
        elif mode == BESTFIT:
            idle = cpu_left * GPU_SPEC + (rows[row, ROW_LEFT] - milli) * CPU_SPEC
            score = 100 + -100 * idle // (2 * CPU_SPEC * GPU_SPEC)
        elif mode == DOTPROD:
            dot = MILLION * rows[row, ROW_CPU] * cpu // (CPU_SPEC * CPU_SPEC)
            dot += MILLION * rows[row, ROW_LEFT] * milli // (GPU_SPEC * GPU_SPEC)
            score = 100 + -100 * dot // (2 * MILLION)
        elif mode == CLUSTERING and take != TAKE_CPU:
            score = 25 * (GPU_SPEC - rows[row, ROW_LEFT]) // GPU_SPEC
            kinds = rows[row, ROW_KINDS]
            if kinds == 0:
                score += 25
            elif (kinds >> ask[ASK_KIND]) & 1 == 1:
                score += 75 if kinds == 1 << ask[ASK_KIND] else 50
        elif mode == PACKING and take != TAKE_CPU:
            score = max(33 - free, free) if free == count_slots else max(50 - gpus, 33)
        elif mode == BINPACK:
            score = SCORE_MAX - (free << 7) - min(cpu_left // 8_000, 127)
            if take == TAKE_CPU and card >= 0:
                score -= 1 << 18  # GPUs are for those that want them
        elif mode == SPREAD:
            score = (free << 7) + min(cpu_left // 8_000, 127)
            if take == TAKE_CPU and card < 0:
                score += 1 << 18

        # Then by the device: of a share each one that it fits on, of others all alike. The fullest
        # one goes where the score leaves it open, also with the published policies; but with FGD,
        # which scores devices, the first of equal ones, and with DOTPROD the first that fits.
        is_share = take == TAKE_SHARE
        best_key, best_left, left_before = -1, IDLE + 1, -1
        for slot in range(count_slots if is_share else 1):
            left, after, free_after = 0, 0, free - gpus
            if is_share:
                kind = slots[row, slot, SLOT_CARD]
                room = needs[kind, NEED_ROOM]
                if room == 0:
                    room = slots[row, slot, SLOT_USABLE] * needs[kind, NEED_COMPUTE] // 1000
                if (
                    needs[kind, NEED_FITS] == 0
                    or slots[row, slot, SLOT_ROOM] <= 0
                    or slots[row, slot, SLOT_ROOM] < room
                    or slots[row, slot, SLOT_COMPUTE] < needs[kind, NEED_COMPUTE]
                ):
                    continue
                left = slots[row, slot, SLOT_LEFT]
                if left == left_before:
                    continue  # as good as that before it
                left_before = left
                after = max(0, left - milli)
                free_after = free - 1 if left == IDLE else free
            if goes_by_mix and card >= 0:
                change = base + worth_free[card, level_after, free_after]
                if is_share:
                    change += worth_left[card, level_after, after]
                    change -= worth_left[card, level_after, left]
                else:
                    change -= gpus * worth_left[card, level_after, IDLE]
                if mode == LOSS:
                    usable_after = usable - float(gpus)
                    if is_share:
                        usable_after = usable - float(rests[card, left]) + float(rests[card, after])
                    memory_left = rows[row, ROW_MEMORY] - memory
                    worth = worth_of(
                        card,
                        cpu_left,
                        memory_left,
                        usable_after,
                        free_after,
                        drains,
                        shortfalls,
                        jobs,
                        job_prices,
                    )
                    lost = worth_before - worth - gains[card]
                    if take != TAKE_CPU:
                        lost -= FRAGMENTS * change / MILLION
                    score = int(ORIGIN + NOTHING - lost / STEP)
                else:
                    score = points.shape[0] // 2
                    while score < points.shape[0] and points[score] <= change:
                        score += 1
                    while score > 0 and points[score - 1] > change:
                        score -= 1
            elif is_share and mode == PACKING and free < count_slots:
                score = 49 if left == IDLE else max(100 - left * 100 // IDLE // 10, 50)
            elif is_share and mode == BINPACK:
                score = SCORE_MAX - left if left < IDLE else SCORE_MAX - IDLE - free
            elif is_share and mode == SPREAD:
                score = left * 256 + min(rows[row, ROW_LEFT] // 256, 255)
            tie = 0
            if tie_by == TIE_POWER:
                tie = rows[row, ROW_POWER]
            elif tie_by == TIE_FULLEST and is_share:
                tie = IDLE - left
            key = (max(0, min(SCORE_MAX, score)) << TIE_BITS) + tie
            is_fuller = left < best_left and mode != FGD and mode != DOTPROD
            if key > best_key or (key == best_key and is_fuller):
                best_key, best_left = key, left
                if is_share:
                    best[row] = slot
        keys[row] = best_key
    return scored


def pick(keys: Keys, order: Ints, excluded: Flags) -> int:
    """Return the row with the highest key, the first in `order` of equal ones; -1: none fits.

    `excluded` are rows that are passed by; an empty array: none are.
    """
    highest = NO_FIT
    if excluded.shape[0] == 0:
        for row in range(keys.shape[0]):
            highest = max(highest, keys[row])
    else:
        for row in range(keys.shape[0]):
            if excluded[row] == 0:
                highest = max(highest, keys[row])
    if highest == NO_FIT:
        return -1
    found = -1
    for row in range(keys.shape[0]):
        if keys[row] != highest or (excluded.shape[0] > 0 and excluded[row] != 0):
            continue
        if found < 0 or order[row] < order[found]:
            found = row
    return found


Refresh = Callable[..., int]  # as `refresh`
Pick = Callable[[Keys, Ints, Flags], int]


@dataclass(frozen=True, slots=True)
class Kernels:
    """The loops, compiled or not."""

    refresh: Refresh
    pick: Pick
    is_compiled: bool


def pick_plainly(keys: Keys, order: Ints, excluded: Flags) -> int:
    """Return what `pick` returns, by numpy's own loops: those are fast without a compiler."""
    if excluded.shape[0]:
        keys = np.where(excluded == 0, keys, NO_FIT).astype(np.int32)
    if keys.shape[0] == 0:
        return -1
    highest = keys.max()
    if highest == NO_FIT:
        return -1
    (equal,) = np.nonzero(keys == highest)
    return int(equal[order[equal].argmin()])


INTERPRETED = Kernels(refresh, pick_plainly, is_compiled=False)
