"""What health goes by: which checks count, their limits, and what each fault means."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from stoker.agent.health.checks import row_of
from stoker.agent.health.meanings import BY_ACTION, IGNORED, Ends, Meaning
from stoker.agent.health.options import HealthConfig
from stoker.agent.health.xids import xid_meaning
from stoker.agent.verdicts import Check, RepairAction, Verdict
from stoker.core.errors import BadInput, shown

IGNORE = "ignore"
_XID_MAX = 99_999


@dataclass(frozen=True, slots=True)
class Policy:
    """A configuration of health, checked."""

    limits: HealthConfig = field(default_factory=HealthConfig)
    disabled: frozenset[Check] = frozenset()
    xids: Mapping[int, Meaning] = field(default_factory=dict[int, Meaning])

    def meaning(self, check: Check, code: str) -> Meaning:
        """Return what such a fault means; one of a check that is off is ignored."""
        if check in self.disabled:
            return IGNORED
        if check is Check.XID:
            own = self.xids.get(int(code.partition(".")[0])) if self.xids else None
            return own or xid_meaning(code)
        row = row_of(check, code)
        return row.meaning if row else IGNORED

    def quiet_seconds(self, meaning: Meaning) -> float | None:
        """Return after which time without it such a fault is over; None: not by time."""
        if meaning.ends is not Ends.QUIET:
            return None
        if meaning.verdict is Verdict.HEALTHY:
            return self.limits.xid_quiet_seconds
        return self.limits.xid_doubt_seconds


def policy_of(config: HealthConfig) -> Policy:
    """Check a configuration; raises BadInput that names the option."""
    for name in ("thermal", "hw_slowdown", "power_brake"):
        begins: float = getattr(config, f"{name}_share_max")
        ends: float = getattr(config, f"{name}_share_end")
        if ends > begins:
            raise BadInput(
                f"health.{name}_share_end: wanted at most {name}_share_max, which is {begins:g}, "
                f"found {ends:g}"
            )
    disabled = frozenset(
        Check(_known(name, [check.value for check in Check], "health.disabled", "check"))
        for name in config.disabled
    )
    xids = {_number(key): _meaning(key, word) for key, word in config.xids.items()}
    return Policy(config, disabled, xids)


def _number(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) > _XID_MAX:
        raise BadInput(f"health.xids: wanted the number of an Xid, found {shown(text)}")
    return int(text)


def _meaning(number: str, word: str) -> Meaning:
    actions = [action.value for action in RepairAction]
    known = _known(word, [IGNORE, *actions], f"health.xids: {number}", "action")
    return IGNORED if known == IGNORE else BY_ACTION[RepairAction(known)]


def _known(word: str, words: Iterable[str], where: str, what: str) -> str:
    known = list(words)
    if word in known:
        return word
    near = difflib.get_close_matches(word[:60], known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
    raise BadInput(f"{where}: unknown {what} {shown(word)}; {hint}")
