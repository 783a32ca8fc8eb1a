"""Requirements on how a person names a GPU: its number on its node, or its UUID."""

from dataclasses import replace

import pytest
from tests.unit.cli.test_render import gpu, node

from stoker.cli.gpus import checked_gpu, uuid_of
from stoker.client import MissingGpu, Nodes, NotFound
from stoker.core.errors import BadInput

FLEET = Nodes((node("gpu-1", gpu(0), gpu(3)), node("gpu-2", gpu(1))), 1, "0.1.0")


def nobody_asks() -> Nodes:
    raise AssertionError("a UUID needs no list")


@pytest.mark.parametrize("text", ["0", "7", "999999", "GPU-8f1c", "GPU-"])
def test_what_may_name_a_gpu(text: str) -> None:
    assert checked_gpu(text, "--gpu") == text


@pytest.mark.parametrize(
    "text", ["", " 0", "-1", "first", "MIG-1", "gpu-1", "1.0", "²", "9" * 5000]
)
def test_what_names_none_is_told_with_what_is_wanted(text: str) -> None:
    with pytest.raises(BadInput, match=r"--gpu: wanted a GPU's number .* found") as caught:
        uuid_of(text, "gpu-1", nobody_asks)
    assert len(str(caught.value)) < 200


def test_uuid_is_taken_as_it_is() -> None:
    assert uuid_of("GPU-gone", "gpu-1", nobody_asks) == "GPU-gone"


def test_number_is_that_of_the_node() -> None:
    assert uuid_of("3", "gpu-1", lambda: FLEET) == "GPU-00000003"
    assert uuid_of("1", "gpu-2", lambda: FLEET) == "GPU-00000001"


def test_number_of_a_gpu_that_is_out_of_use() -> None:
    missing = (MissingGpu(5, "GPU-out", "gpu_lost", "r"), MissingGpu(6, "", "driver_timeout", "r"))
    fleet = replace(FLEET, nodes=(replace(FLEET.nodes[0], missing_gpus=missing),))
    assert uuid_of("5", "gpu-1", lambda: fleet) == "GPU-out"
    with pytest.raises(NotFound, match="GPU 6 of gpu-1 was never read"):
        uuid_of("6", "gpu-1", lambda: fleet)


def test_what_is_not_there_is_told_with_what_is() -> None:
    with pytest.raises(NotFound, match="GPU 1 is not known on gpu-1; its GPUs: 0, 3"):
        uuid_of("1", "gpu-1", lambda: FLEET)
    with pytest.raises(NotFound, match="node 'gpu-9' is not known"):
        uuid_of("1", "gpu-9", lambda: FLEET)
    with pytest.raises(NotFound, match="its GPUs: none"):
        uuid_of("0", "gpu-3", lambda: Nodes((node("gpu-3"),), 1, "0.1.0"))
