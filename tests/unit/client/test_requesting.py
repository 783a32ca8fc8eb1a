"""Requirements on requests: what callers' words mean, and which of them are refused at once."""

import pytest

from stoker.client import GpuTopology, InvalidRequest, Request, Wish
from stoker.client.requesting import as_seconds, build_request
from stoker.core.errors import ExitCode

GIB = 2**30


def built(wish: Wish) -> Request:
    return build_request(wish, holder="me@here", ttl_seconds=60.0)


MEANINGS: dict[str, tuple[Wish, Request]] = {
    "nothing said is one GPU": ({}, Request(1, "me@here", 60.0)),
    "memory is a share of one GPU": (
        {"memory": "20GiB"},
        Request(1, "me@here", 60.0, memory_bytes=20 * GIB),
    ),
    "memory in bytes": ({"memory": 5}, Request(1, "me@here", 60.0, memory_bytes=5)),
    "a share of compute": (
        {"compute": 0.25},
        Request(1, "me@here", 60.0, compute_milli=250),
    ),
    "a MIG device": ({"mig": "1g.10gb"}, Request(1, "me@here", 60.0, mig_profile="1g.10gb")),
    "several MIG devices": (
        {"mig": "1g.10gb", "gpus": 3},
        Request(3, "me@here", 60.0, mig_profile="1g.10gb"),
    ),
    "MIG devices by what they must have": (
        {"mig": "any", "gpus": 2, "memory": "20GiB", "compute": 0.25},
        Request(*(2, "me@here", 60.0), mig_profile="any", memory_bytes=20 * GIB, compute_milli=250),
    ),
    "any of two models": (
        {"model": ["A100", "H100"]},
        Request(1, "me@here", 60.0, models=("A100", "H100")),
    ),
    "several GPUs": ({"gpus": 4}, Request(4, "me@here", 60.0)),
    "a TTL in words": ({"ttl": "1h30m"}, Request(1, "me@here", 5400.0)),
    "a TTL in seconds": ({"ttl": 5}, Request(1, "me@here", 5.0)),
    "None is as good as unsaid": (
        {"memory": None, "model": None, "pool": None, "node": None, "holder": None},
        Request(1, "me@here", 60.0),
    ),
    "everything": (
        {
            "gpus": 2,
            "nodes": 3,
            "cpus": 8.5,
            "host_memory": "1GiB",
            "model": "H100",
            "gpu_memory": "40GiB",
            "compute_capability": "8.0",
            "driver": "570",
            "node_labels": {"rack": "r1"},
            "topology": "nvlink",
            "require_topology": True,
            "same_label": "zone",
            "require_same_label": True,
            "service": "llm",
            "anti_affinity": "node",
            "spread": "rack",
            "near": "cache",
            "prefer_gpu": "GPU-1",
            "duration": "1h",
            "movable": True,
            "pool": "train",
            "node": "n1",
            "host_boot_id": "b",
            "holder": "ci",
            "labels": {"job": "7"},
            "priority": -3,
        },
        Request(
            gpus=2,
            holder="ci",
            ttl_seconds=60.0,
            nodes=3,
            cpu_milli=8500,
            host_memory_bytes=GIB,
            models=("H100",),
            gpu_memory_min_bytes=40 * GIB,
            compute_capability_min="8.0",
            driver_version_min="570",
            pool="train",
            node="n1",
            host_boot_id="b",
            node_labels={"rack": "r1"},
            gpu_topology=GpuTopology.NVLINK,
            gpu_topology_required=True,
            same_label="zone",
            same_label_required=True,
            service="llm",
            anti_affinity="node",
            spread="rack",
            near_service="cache",
            preferred_gpu_uuid="GPU-1",
            duration_seconds=3600.0,
            movable=True,
            labels={"job": "7"},
            priority=-3,
        ),
    ),
}


@pytest.mark.parametrize("name", MEANINGS)
def test_words_mean(name: str) -> None:
    wish, expected = MEANINGS[name]
    assert built(wish) == expected


REFUSED: dict[str, tuple[Wish, str]] = {
    "no GPU": ({"gpus": 0}, "gpus: wanted at least 1, found 0"),
    "a share of several": ({"gpus": 2, "memory": "1GiB"}, "a share of one GPU, found 2"),
    "a share of nothing": ({"memory": 0}, "memory: wanted at least 1 byte, found 0"),
    "no node": ({"nodes": 0}, "nodes: wanted at least 1, found 0"),
    "a share of no compute": ({"compute": 0.0}, "compute: wanted at least 0.001, found 0"),
    "a topology that is none": ({"topology": "ring"}, "topology: wanted one of any, numa, nvlink"),
    "not a size": ({"memory": "20G"}, "memory: '20G' is not a size"),
    "not a duration": ({"ttl": "soon"}, "ttl: 'soon' is not a duration"),
    "a negative duration": ({"ttl": -1.0}, "ttl: wanted seconds, zero or more, found -1.0"),
    "a duration that is no number": ({"ttl": float("nan")}, "ttl: wanted seconds"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_once(name: str) -> None:
    wish, text = REFUSED[name]
    with pytest.raises(InvalidRequest, match=text) as caught:
        built(wish)
    assert caught.value.exit_code is ExitCode.USAGE


def test_waiting_forever_is_no_duration() -> None:
    with pytest.raises(InvalidRequest, match="wait: wanted seconds"):
        as_seconds(float("inf"), "wait")
