"""`project_output_onto`: the stack of the parts, each read by some vectors, without the parts."""

import pytest
import torch

from tests.families.models import build
from transformer_lens import TransformerBridge

TOKENS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
FAMILIES = ("llama", "gpt2", "gemma2", "gpt_neox", "qwen3_moe", "mixtral")


@pytest.fixture(scope="module", params=FAMILIES)
def cache(request):
    if request.param == "mixtral":
        return TransformerBridge.boot_transformers("tiny-mixtral").run_with_cache(TOKENS)[1]
    return TransformerBridge(build(request.param)).run_with_cache(TOKENS)[1]


def vectors(cache, *outputs):
    return torch.randn(cache.model.cfg.d_model, *outputs, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("outputs", [(), (3,)])
@pytest.mark.parametrize("apply_ln", [False, True])
def test_of_every_part(cache, outputs, apply_ln):
    onto = vectors(cache, *outputs)
    options = {"apply_ln": apply_ln, "pos_slice": (1, 3), "return_labels": True}
    for stack, more in (
        (cache.get_full_resid_decomposition, {"layer": 1}),
        (cache.get_full_resid_decomposition, {"expand_neurons": False}),
        (cache.stack_neuron_results, {"layer": None, "incl_remainder": True, "neuron_slice": (0, 5)}),
    ):
        whole, labels = stack(**options, **more)
        read, same = stack(**options, **more, project_output_onto=onto)
        assert labels == same and read.shape == (*whole.shape[:-1], *outputs)
        torch.testing.assert_close(read, whole @ onto, atol=1e-4, rtol=1e-3)


def test_of_the_neurons_of_a_layer(cache):
    onto = vectors(cache, 2)
    whole = cache.get_neuron_results(1, neuron_slice=(0, 4), pos_slice=-1)
    torch.testing.assert_close(
        cache.get_neuron_results(1, (0, 4), -1, project_output_onto=onto), whole @ onto, atol=1e-4, rtol=1e-3
    )
    with pytest.raises(ValueError, match="project_output_onto: got"):
        cache.get_neuron_results(1, project_output_onto=onto.T)


def test_neurons_below_what_an_mlp_reads(cache):
    model = cache.model
    stack, labels = cache.stack_neuron_results(1, mlp_input=True, incl_remainder=True, return_labels=True)
    read = cache["mlp_in", 1]
    torch.testing.assert_close(stack.sum(0), read, atol=1e-4, rtol=1e-3)
    assert labels[-1] == "remainder" and all(label.startswith("L0") for label in labels[:-1])
    assert model.cfg.n_layers >= 2


def test_nothing_as_large_as_the_parts_is_made():
    bridge = TransformerBridge.boot_transformers("tiny-mixtral")
    _, cache = bridge.run_with_cache(TOKENS)
    onto = vectors(cache)
    made = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            made.append(result.numel() if isinstance(result, torch.Tensor) and not result._is_view() else 0)
            return result

    with Sizes():
        cache.get_full_resid_decomposition(project_output_onto=onto)
    experts, d_mlp, d_model = bridge.blocks[0].mlp.W_out.shape
    assert max(made) < TOKENS.numel() * experts * d_mlp * d_model / 4
