"""`bridge.verify()` on CUDA: every family, attention and half precision."""

import pytest
import torch

from tests.gpu.test_cuda import ALIBI_TWICE, DEVICE, DTYPES, IMPLEMENTATIONS, model_on_device, pytestmark  # noqa: F401
from tests.support import FAMILIES
from transformer_lens import TransformerBridge


@ALIBI_TWICE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("attn", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_passes(name: str, attn: str, dtype: torch.dtype) -> None:
    report = TransformerBridge(model_on_device(name, attn, dtype)).verify()
    assert report.passed, report
    assert report.device.startswith(DEVICE.type)
