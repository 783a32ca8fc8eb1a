"""DCGM as a source: connected to, watched, paused, lost and found again, over real sockets."""

import itertools
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from tests.support.dcgm import importable_bindings
from tests.support.waiting import PATIENCE_SECONDS

from stoker.agent.dcgm.bindings import load_bindings
from stoker.agent.dcgm.fields import FIELDS, WHOLE_GPU_FIELDS
from stoker.agent.dcgm.merge import Question, Told
from stoker.agent.dcgm.source import RETRY_SECONDS_MAX, SETTLE_SECONDS_MIN, DcgmSource
from stoker.agent.driver import LibraryMissing, NotInitialized
from stoker.agent.facts import Fact
from stoker.testing.dcgm_engine import (
    DOUBLE_BLANK,
    GROUPS_MAX,
    T4_GROUPS,
    EngineGpu,
    FakeHostengine,
    write_bindings,
)

ALL = {fact: field / 10_000 for field, fact in FIELDS.items()}
OF_INSTANCE = {
    fact: field / 10_000 for field, fact in FIELDS.items() if field not in WHOLE_GPU_FIELDS
}
# Traffic comes in whole bytes.
TRAFFIC = {FIELDS[field]: 0.0 for field in WHOLE_GPU_FIELDS}
EVERYTHING = {**ALL, **TRAFFIC}

BOTH = {"g0": frozenset[int](), "g1": frozenset[int]()}


@pytest.fixture
def bindings(tmp_path: Path) -> Iterator[Path]:
    """A folder of bindings, of which nothing is left in this process afterwards."""
    with importable_bindings(tmp_path) as folder:
        yield folder


class Stage:
    """A hostengine with two GPUs, and a source that asks it by a clock of its own."""

    def __init__(self, engine: FakeHostengine, bindings: Path) -> None:
        self.engine = engine
        self.now = 1000.0
        self.log: list[str] = []
        self.source = DcgmSource(
            engine.address,
            1.0,
            lambda: load_bindings(bindings),
            log=self.log.append,
            monotonic=lambda: self.now,
        )

    def ask(
        self,
        gpus: Mapping[str, frozenset[int]] = BOTH,
        *,
        profiling: bool = True,
        later: float = 0.0,
    ) -> Told:
        self.now += later
        return self.source.ask(Question(gpus, profiling))

    def until_unwatched(self) -> None:
        """Return once the engine watches nothing; it hears of a line that was hung up later."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.engine.watched:
            assert time.monotonic() < deadline, f"still watched: {self.engine.watched}"
            time.sleep(0.01)


@pytest.fixture
def engine() -> Iterator[FakeHostengine]:
    engine = FakeHostengine([EngineGpu("g0"), EngineGpu("g1")])
    # Ratios by field; bytes are whole numbers.
    engine.value = lambda number, field: 0 if field in WHOLE_GPU_FIELDS else field / 10_000
    with engine:
        yield engine


@pytest.fixture
def stage(engine: FakeHostengine, bindings: Path) -> Iterator[Stage]:
    stage = Stage(engine, bindings)
    yield stage
    stage.source.close()


def kinds(told: Told) -> dict[str, str]:
    return {uuid: failure.error_kind for uuid, failure in told.failures.items()}


def why(told: Told, uuid: str = "g0") -> str:
    assert told.failures[uuid].fact == "dcgm"
    return told.failures[uuid].message


def test_a_hostengine_tells_the_facts_of_the_gpus_asked_about(stage: Stage) -> None:
    assert stage.ask() == Told({"g0": EVERYTHING, "g1": EVERYTHING})
    assert stage.engine.watched == {(1, gpu, field) for gpu in (0, 1) for field in FIELDS}
    assert stage.ask({"g1": frozenset()}) == Told({"g1": EVERYTHING})
    assert stage.engine.watched == {(1, 1, field) for field in FIELDS}
    assert stage.log == []


def test_a_reading_is_one_call(stage: Stage) -> None:
    stage.ask()
    stage.engine.calls.clear()
    stage.ask()
    assert stage.engine.calls == ["values"]


def test_over_a_unix_socket(tmp_path: Path, bindings: Path) -> None:
    with FakeHostengine([EngineGpu("g0")], tmp_path / "hostengine.sock") as engine:
        engine.value = lambda number, field: 0
        stage = Stage(engine, bindings)
        assert engine.address.startswith("/")
        assert stage.ask({"g0": frozenset()}).failures == {}
        stage.source.close()


def test_what_does_not_fit_is_left_out_and_said_once(stage: Stage) -> None:
    stage.engine.gpus[0].groups = T4_GROUPS
    told = stage.ask()
    assert EVERYTHING.keys() - told.facts["g0"].keys() == {
        *(Fact.FP64_ACTIVE_RATIO, Fact.FP16_ACTIVE_RATIO),
        *(Fact.NVLINK_TRANSMIT_BYTES_PER_SECOND, Fact.NVLINK_RECEIVE_BYTES_PER_SECOND),
        *(Fact.TENSOR_HALF_ACTIVE_RATIO, Fact.TENSOR_INTEGER_ACTIVE_RATIO),
        *(Fact.TENSOR_DOUBLE_ACTIVE_RATIO, Fact.INTEGER_ACTIVE_RATIO),
    }
    assert told.facts["g1"] == EVERYTHING
    assert told.failures == {}
    stage.ask({})
    stage.ask()
    (line,) = stage.log
    assert line == (
        "g0: not watched, because the hardware would count them in turns with what is watched: "
        "1006 fp64_active_ratio, 1008 fp16_active_ratio"
    )


def test_instances_of_a_divided_gpu(stage: Stage) -> None:
    stage.engine.gpus[0].instances = (1, 2)
    told = stage.ask({"g0": frozenset({1, 2}), "g1": frozenset()})
    assert told.instances == {("g0", 1): OF_INSTANCE, ("g0", 2): OF_INSTANCE}
    assert told.facts == {"g0": EVERYTHING, "g1": EVERYTHING}
    assert told.failures == {}


def test_instances_come_and_go(stage: Stage) -> None:
    engine, g0 = stage.engine, stage.engine.gpus[0]
    g0.instances = (1,)
    told = stage.ask({"g0": frozenset({1, 2})})
    assert told.instances.keys() == {("g0", 1)}
    assert "DCGM does not know GPU instance 2" in why(told)
    # What is told already goes on undisturbed, while the other is looked for.
    engine.calls.clear()
    told = stage.ask({"g0": frozenset({1, 2})}, later=1.0)
    assert told.instances.keys() == {("g0", 1)}
    assert "unwatch" not in engine.calls
    g0.instances = (1, 2)
    told = stage.ask({"g0": frozenset({1, 2})}, later=RETRY_SECONDS_MAX)
    assert told.instances.keys() == {("g0", 1), ("g0", 2)}
    assert told.failures == {}
    g0.instances = ()
    assert stage.ask({"g0": frozenset()}) == Told({"g0": EVERYTHING})
    assert engine.groups_count == 1


def test_an_instance_that_was_made_anew_is_watched_anew(stage: Stage) -> None:
    g0, wanted = stage.engine.gpus[0], {"g0": frozenset({1})}
    g0.instances = (1,)
    stage.ask(wanted)
    g0.instances = ()
    told = stage.ask(wanted)
    assert told.facts == {"g0": EVERYTHING}
    assert "stopped to measure" in why(told)
    g0.instances = (1,)
    assert stage.ask(wanted, later=RETRY_SECONDS_MAX).instances == {("g0", 1): OF_INSTANCE}


@pytest.mark.parametrize("blank", [DOUBLE_BLANK, DOUBLE_BLANK + 2])
def test_blanks_are_absent(stage: Stage, blank: float) -> None:
    stage.engine.value = lambda number, field: blank if field == 1002 else 0
    facts = stage.ask().facts["g0"]
    assert Fact.SM_ACTIVE_RATIO not in facts
    assert facts[Fact.SM_OCCUPANCY_RATIO] == 0.0


def test_a_value_older_than_three_intervals_is_absent(stage: Stage) -> None:
    stage.engine.age_seconds = 2.0
    assert stage.ask().facts["g0"] == EVERYTHING
    stage.engine.age_seconds = 3600.0
    told = stage.ask(later=SETTLE_SECONDS_MIN + 1)
    assert told.facts == {}
    assert "newest value is 3600" in why(told)


def test_the_time_until_the_first_value_is_no_failure(stage: Stage) -> None:
    stage.engine.is_measuring = False
    assert stage.ask() == Told()
    assert stage.ask(later=SETTLE_SECONDS_MIN) == Told()
    told = stage.ask(later=1.0)
    assert kinds(told) == {"g0": "not_available", "g1": "not_available"}
    assert "DCGM has no values" in why(told)
    stage.engine.is_measuring = True
    assert stage.ask().failures == {}


def test_a_pause_is_asked_for_once_and_undone(stage: Stage) -> None:
    engine = stage.engine
    stage.ask()
    for _ in range(3):
        assert stage.ask(profiling=False) == Told()
        assert engine.is_paused
    assert stage.ask().facts == {"g0": EVERYTHING, "g1": EVERYTHING}
    assert not engine.is_paused
    assert [call for call in engine.calls if call in ("pause", "resume")] == ["pause", "resume"]


def test_a_pause_that_nothing_came_before_takes_no_counters(stage: Stage) -> None:
    assert stage.ask(profiling=False) == Told()
    assert stage.engine.is_paused
    assert stage.engine.watched == set()


def test_closing_undoes_the_pause(stage: Stage) -> None:
    stage.ask(profiling=False)
    stage.source.close()
    assert not stage.engine.is_paused


def test_a_gpu_lost_during_the_pause_does_not_end_it(stage: Stage) -> None:
    stage.ask(profiling=False)
    assert stage.ask({}, profiling=False) == Told()
    assert stage.engine.is_paused


def test_a_pause_outlives_the_connection_and_is_undone_over_the_next(stage: Stage) -> None:
    stage.ask()
    stage.ask(profiling=False)
    stage.engine.lose_connections()
    stage.ask()
    assert stage.engine.is_paused
    told = stage.ask(later=RETRY_SECONDS_MAX)
    assert not stage.engine.is_paused
    assert told.facts["g0"] == EVERYTHING


def test_a_pause_by_somebody_else_is_theirs(stage: Stage) -> None:
    stage.ask()
    stage.engine.is_paused = True
    told = stage.ask(later=SETTLE_SECONDS_MIN + 1)
    assert told.facts == {}
    assert "dcgmi profile --resume" in why(told)
    assert stage.engine.is_paused


def test_a_hostengine_without_profiling_module(stage: Stage) -> None:
    stage.engine.has_profiling_module = False
    told = stage.ask()
    assert kinds(told) == {"g0": "not_supported", "g1": "not_supported"}
    assert "no profiling module" in why(told)
    # It holds no counters, so a profiler may have them.
    assert stage.ask(profiling=False) == Told()


@pytest.mark.parametrize(
    ("obstacle", "kind", "text"),
    [
        ({"has_other_profiler": True}, "not_available", "another profiler has them"),
        ({"runs_as_root": False}, "no_permission", "must run as root"),
    ],
)
def test_who_else_has_the_counters(
    stage: Stage, obstacle: dict[str, bool], kind: str, text: str
) -> None:
    for name, value in obstacle.items():
        setattr(stage.engine, name, value)
    told = stage.ask()
    assert told.facts == {}
    assert kinds(told) == {"g0": kind, "g1": kind}
    assert text in why(told)
    assert stage.engine.groups_count == 0
    for name, value in obstacle.items():
        setattr(stage.engine, name, not value)
    stage.engine.calls.clear()
    assert kinds(stage.ask()) == {"g0": kind, "g1": kind}
    assert "watch" not in stage.engine.calls  # not yet again
    assert stage.ask(later=RETRY_SECONDS_MAX).facts == {"g0": EVERYTHING, "g1": EVERYTHING}


def test_the_failure_of_one_gpu_is_not_that_of_the_others(stage: Stage) -> None:
    stage.engine.gpus[0].groups = ()
    told = stage.ask({**BOTH, "g7": frozenset()})
    assert told.facts == {"g1": EVERYTHING}
    assert kinds(told) == {"g0": "not_supported", "g7": "not_found"}
    assert "DCGM does not have this GPU" in why(told, "g7")


def test_a_gpu_that_fails_leaves_no_groups_behind(stage: Stage) -> None:
    stage.engine.has_other_profiler = True
    for _ in range(GROUPS_MAX + 1):
        stage.ask(later=RETRY_SECONDS_MAX)
    stage.engine.has_other_profiler = False
    assert stage.ask(later=RETRY_SECONDS_MAX).facts["g0"] == EVERYTHING
    assert stage.engine.groups_count == 2


def test_watches_that_were_dropped_are_made_again(stage: Stage) -> None:
    stage.ask()
    stage.engine.forget_watches()
    told = stage.ask()
    assert told.facts == {}
    assert "stopped to measure" in why(told)
    assert stage.ask(later=RETRY_SECONDS_MAX).facts["g0"] == EVERYTHING
    assert stage.engine.groups_count == 2


def test_a_hostengine_that_is_restarted_is_found_again(stage: Stage) -> None:
    stage.ask()
    stage.engine.stop()
    told = stage.ask()
    assert told.facts == {}
    assert kinds(told) == {"g0": "not_initialized", "g1": "not_initialized"}
    stage.engine.start()
    stage.engine.calls.clear()
    assert kinds(stage.ask()) == {"g0": "not_initialized", "g1": "not_initialized"}
    assert stage.engine.calls == []  # not yet
    assert stage.ask(later=1.0).facts == {"g0": EVERYTHING, "g1": EVERYTHING}
    assert stage.log[-1] == f"{stage.engine.address} answers again"
    assert len(stage.log) == 2


def test_a_hostengine_that_is_not_there_is_tried_ever_more_rarely(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.engine.stop()
    tries: list[float] = []

    def connect(bindings: object, address: str, announce: object) -> object:
        tries.append(stage.now)
        raise NotInitialized("refused", function="dcgmConnect_v2")

    monkeypatch.setattr("stoker.agent.dcgm.source.Hostengine", connect)
    for _ in range(400):
        assert kinds(stage.ask(later=1.0)) == {"g0": "not_initialized", "g1": "not_initialized"}
    pauses = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert pauses[:7] == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0]
    assert set(pauses[7:]) == {60.0}
    assert len(stage.log) == 1


def test_what_the_connection_says_when_it_is_refused(
    engine: FakeHostengine, bindings: Path
) -> None:
    engine.stop()
    told = Stage(engine, bindings).ask()
    assert "dcgmConnect_v2: The connection to the host engine is not valid" in why(told)
    assert "is nv-hostengine running there?" in why(told)


def test_a_folder_without_bindings(engine: FakeHostengine, tmp_path: Path) -> None:
    stage = Stage(engine, tmp_path / "nothing")
    told = stage.ask()
    assert kinds(told) == {"g0": LibraryMissing.kind, "g1": LibraryMissing.kind}
    (line,) = stage.log
    assert line == (
        f"dcgm.bindings: {tmp_path}/nothing has no dcgm_agent.py; "
        "datacenter-gpu-manager-4-core installs it"
    )


def test_the_folder_is_on_the_path_only_while_it_is_imported(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Whatever else has such a name does not stand in the way.
    (tmp_path / "dcgm_agent.py").write_text("raise SystemExit\n")
    before = [str(tmp_path), *sys.path]
    monkeypatch.setattr(sys, "path", list(before))
    assert stage.ask().failures == {}
    assert sys.path == before


def test_bindings_that_cannot_be_run(
    engine: FakeHostengine, bindings: Path, tmp_path: Path
) -> None:
    del bindings  # for what it undoes
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "dcgm_agent.py").write_text("import a_module_that_is_nowhere\n")
    told = Stage(engine, folder).ask()
    assert "cannot be imported: ModuleNotFoundError" in why(told)


def test_bindings_without_the_library(
    engine: FakeHostengine, tmp_path: Path, bindings: Path
) -> None:
    del bindings  # for what it undoes
    folder = write_bindings(tmp_path / "alone", library_is_there=False)
    told = Stage(engine, folder).ask()
    assert kinds(told)["g0"] == LibraryMissing.kind
    assert "libdcgm.so.4 comes with datacenter-gpu-manager-4-core" in why(told)


def test_bindings_of_another_kind_cost_dcgm_only(engine: FakeHostengine, bindings: Path) -> None:
    (bindings / "dcgm_agent.py").write_text("")
    told = Stage(engine, bindings).ask()
    assert kinds(told) == {"g0": "unknown", "g1": "unknown"}
    assert "dcgmInit" in why(told)


def test_nobody_is_asked_when_there_is_nothing_to_ask(stage: Stage) -> None:
    assert stage.ask({}) == Told()
    assert stage.engine.calls == []
    stage.ask()
    stage.ask({})
    stage.until_unwatched()
