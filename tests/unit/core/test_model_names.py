"""Which names of a GPU model name which card."""

import pytest

from stoker.core.gpu_models import MODELS
from stoker.core.model_names import names_match

H100 = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
    ("asked", "driver_name", "match"),
    [
        ("H100", H100, True),
        ("h100", H100, True),
        ("H100-80GB", H100, True),
        ("h100_80gb hbm3", H100, True),
        ("NVIDIA H100 80GB HBM3", H100, True),
        ("H100", "NVIDIA H100 PCIe", True),
        ("H100-80GB", "NVIDIA H100 PCIe", False),
        ("H100-40GB", H100, False),
        ("H10", H100, False),
        ("H1000", H100, False),
        ("A100", H100, False),
        ("A100-40GB", "NVIDIA A100-SXM4-40GB", True),
        ("A100-40GB", "NVIDIA A100-PCIE-40GB", True),
        ("A100-40GB", "NVIDIA A100-SXM4-80GB", False),
        ("A10", "NVIDIA A100-SXM4-40GB", False),
        ("H200-141GB", "NVIDIA H200", True),
        ("h200-141gb", "NVIDIA H200", True),
        ("H200-141GB", H100, False),
        ("T4", "Tesla T4", True),
        ("L40", "NVIDIA L40S", False),
        ("", H100, False),
        ("---", H100, False),
        ("é", H100, False),
    ],
)
def test_names_match(asked: str, driver_name: str, match: bool) -> None:
    assert names_match(asked, driver_name) is match


@pytest.mark.parametrize("name", MODELS)
def test_name_of_the_catalogue_names_its_card_and_no_other(name: str) -> None:
    assert [other for other, m in MODELS.items() if names_match(name, m.driver_name)] == [name]
