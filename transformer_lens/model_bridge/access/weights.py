"""Reading a weight wherever it is (in the module, offloaded by accelerate, sharded over processes) and however it is
held (quantised, or under PEFT's adapters), with `read_weight`; and quantising the layers that loading skips.

bitsandbytes, torchao and PEFT are optional, and only looked up if they are imported already.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized, register_parametrization

from transformer_lens.checks import in_words
from transformer_lens.model_bridge.upstream import attribute


def read_weight(module: nn.Module, name: str = "weight", *, shard: bool = False) -> Tensor:
    """A weight of a module, as its forward computes with it.

    >>> read_weight(model.lm_head).shape
    torch.Size([735, 128])

    An offloaded weight is brought to the device where its module runs, for the caller alone. A sharded weight is
    gathered, a collective call; `shard=True` gives this process's shard instead. A quantised weight is dequantised, and
    an adapter is added to it: both are copies. Raises `ValueError` for a weight on the meta device that nothing can
    bring back.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: got {in_words(module)}, expected a module of a model")
    if is_adapted(module):
        return adapted_weight(module, name, partial(read_weight, shard=shard))
    if rounds(module):
        raise ValueError(
            f"the {name} of {type(module).__name__}: BitNet's layers round what they multiply to 8 bits in each call, "
            "so no weight is what they compute with; hooks show what enters and leaves them"
        )
    if not isinstance(name, str) or not hasattr(module, name):
        raise ValueError(f"name: got {in_words(name)}, expected the name of a weight of {type(module).__name__}")
    weight: Tensor = getattr(module, name)
    if weight.is_meta and offloading_hook(module) is not None:
        from accelerate.utils import align_module_device

        with align_module_device(module):
            weight = getattr(module, name)
    if weight.is_meta:
        raise ValueError(
            f"the {name} of {type(module).__name__} is on the meta device: it has a shape and no numbers; load the "
            "model with weights, or offload it with accelerate (device_map, dispatch_model, cpu_offload or "
            "disk_offload), which brings a weight back when it is read"
        )
    if isinstance(weight, DTensor):
        return weight.to_local() if shard else weight.full_tensor()
    return dequantised(module, weight)


def offloading_hook(module: nn.Module) -> Any | None:
    """The hook of accelerate that offloads this module's own weights between forward passes, or `None`."""
    hook: Any = module.__dict__.get("_hf_hook")
    several = getattr(hook, "hooks", (hook,))  # a sequence of hooks is one hook
    return next((one for one in several if getattr(one, "offload", False)), None)


def execution_device(module: nn.Module) -> torch.device:
    """The device on which a module's weights are, or where accelerate brings them."""
    device = next(module.parameters()).device
    hook = offloading_hook(module)
    if device.type != "meta" or hook is None:
        return device
    found = hook.execution_device
    return torch.device("cuda", found) if isinstance(found, int) else torch.device(found)


def rounds(module: nn.Module) -> bool:
    """Whether a layer of BitNet's, which rounds what it multiplies, computes with no weight that it has."""
    bitnet = sys.modules.get("transformers.integrations.bitnet")
    return bitnet is not None and isinstance(module, (bitnet.BitLinear, bitnet.AutoBitLinear))


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is held as something else than its numbers."""
    return _is_torchaos(weight) or not weight.is_floating_point()


def _is_torchaos(weight: Any) -> bool:
    torchao = sys.modules.get("torchao.utils")
    return torchao is not None and isinstance(weight, torchao.TorchAOBaseTensor)


def dequantised(module: nn.Module, weight: Tensor) -> Tensor:
    """The numbers of a quantised weight, in memory of their own.

    Raises `ValueError` for a format that only its own kernel can read.
    """
    if not is_quantised(weight):
        return weight
    if _is_torchaos(weight):
        return weight.dequantize()
    bnb = sys.modules.get("bitsandbytes")
    if bnb is not None and isinstance(weight, bnb.nn.Params4bit):
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            raise ValueError(
                "bitsandbytes packed this 4-bit weight for its CPU kernel, which alone reads it and has no gradient; "
                "load the model with TransformerBridge.boot_transformers, which keeps it from doing so"
            )
        return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[no-any-return]
    if bnb is not None and isinstance(weight, bnb.nn.Int8Params):
        state: Any = module.state
        scales = weight.SCB if weight.SCB is not None else state.SCB  # a forward moves them
        return bnb.functional.int8_vectorwise_dequant(weight.data, scales)  # type: ignore[no-any-return]
    raise ValueError(
        f"the weight of {type(module).__name__} holds {weight.dtype}, in a format that is not known here; known are "
        "those of bitsandbytes (4-bit, 8-bit) and torchao"
    )


def complete_quantisation(model: nn.Module) -> list[str]:
    """Complete what loading in 8 or 4 bits leaves undone; returns the paths of the layers quantised here.

    >>> complete_quantisation(model)  # not loaded by bitsandbytes
    []

    transformers replaces `torch.nn.Linear` by bitsandbytes' layers but skips subclasses such as `FalconLinear`, so a
    Falcon loaded "in 4 bits" has no 4-bit weight; their formula is a linear layer's, so bitsandbytes' layers replace
    them here. It skips stacked experts too, which are 3-D parameters: each gets a parametrization that dequantises it
    while it is read. On some CPUs a 4-bit layer packs its weight at the first forward for a kernel without gradients;
    that is switched off. Raises `ValueError` for layers that torchao quantised and cannot run.
    """
    for path, module in model.named_modules():  # FalconLinear multiplies by a transposed weight
        transposes = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
        if transposes and _is_torchaos(module._parameters.get("weight")):
            raise ValueError(
                f"torchao quantised {path}, a {type(module).__name__}, which multiplies in a way that torchao's "
                "tensors do not support; load this model with a BitsAndBytesConfig instead"
            )
    config: Any = model.config
    if getattr(config, "quantization_config", None) is None:
        return []
    quantizer: Any = attribute(model, "hf_quantizer")
    method = attribute(attribute(quantizer, "quantization_config"), "quant_method")
    if getattr(method, "value", method) != "bitsandbytes":
        return []
    import bitsandbytes as bnb

    paths = _quantise_skipped(model, quantizer.quantization_config, quantizer.modules_to_not_convert)
    paths += _quantise_stacked(model, quantizer.quantization_config, quantizer.modules_to_not_convert)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return paths


def other_linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The linear layers of a subclass of torch's own, which transformers does not quantise."""
    return [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear) and type(m) is not nn.Linear]


@contextmanager
def state_in_numbers(model: nn.Module) -> Iterator[None]:
    """While open, the model's state has quantised experts as numbers; loading quantises them to the same bits again."""

    def numbers(module: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
        names: Any = module._modules["parametrizations"]
        read = {prefix + name: getattr(module, name).detach() for name in names}
        for key in [key for key in state if key.startswith((f"{prefix}parametrizations.", *read))]:
            del state[key]
        state.update(read)

    with ExitStack() as stack:
        for module in filter(is_parametrized, model.modules()):
            stack.callback(module.register_state_dict_post_hook(numbers).remove)
        yield


def _quantise_skipped(model: nn.Module, config: Any, skip: list[str]) -> list[str]:
    from transformers.quantizers.quantizers_utils import should_convert_module

    linears = other_linears(model)
    found = [(p, m) for p, m in linears if m.weight.is_floating_point() and should_convert_module(p, skip)]
    for path, linear in found:
        model.set_submodule(path, _bitsandbytes_layer(linear, config))
    return [path for path, _ in found]


def _quantise_stacked(model: nn.Module, config: Any, skip: list[str]) -> list[str]:
    from bitsandbytes.functional import int8_vectorwise_quant
    from bitsandbytes.nn.parametrize import replace_parameter_4bit
    from transformers.quantizers.quantizers_utils import should_convert_module

    found = [(p, m) for p, m in model.named_modules() if not isinstance(m, _ConvNd) and should_convert_module(p, skip)]
    stacked = [(p, m, name) for p, m in found for name, w in m._parameters.items() if w is not None and w.ndim == 3]
    for _, module, name in stacked:
        if config.quantization_method() != "llm_int8":
            options = (config.bnb_4bit_use_double_quant, config.bnb_4bit_quant_type)
            replace_parameter_4bit(module, name, *options)
        elif not config.llm_int8_has_fp16_weight:
            weight = module._parameters[name]
            assert weight is not None
            numbers, scales, _ = int8_vectorwise_quant(weight.data.flatten(0, 1))
            module._parameters[name] = nn.Parameter(numbers.view(weight.shape), requires_grad=False)
            register_parametrization(module, name, _EightBits(scales, weight), unsafe=True)
    return [f"{path}.{name}" for path, _, name in stacked]


class _EightBits(nn.Module):
    """Reads 8-bit rows as numbers: bitsandbytes' own format, one scale for each row."""

    scales: Tensor

    def __init__(self, scales: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("scales", scales)
        self.dtype = weight.dtype

    def forward(self, numbers: Tensor) -> Tensor:
        from bitsandbytes.functional import int8_vectorwise_dequant

        rows: Tensor = int8_vectorwise_dequant(numbers.flatten(0, 1), self.scales)
        return rows.view(numbers.shape).to(self.dtype)


def _bitsandbytes_layer(linear: nn.Linear, config: Any) -> nn.Module:
    """The layer that transformers would have made of this one."""
    import bitsandbytes as bnb

    sizes, weight = (linear.in_features, linear.out_features, linear.bias is not None), linear.weight
    new: Any
    if config.quantization_method() == "llm_int8":
        kept = config.llm_int8_has_fp16_weight
        new = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=kept, threshold=config.llm_int8_threshold)
        new.weight = bnb.nn.Int8Params(weight.data, requires_grad=False, has_fp16_weights=kept)
    else:
        options = {
            "compress_statistics": config.bnb_4bit_use_double_quant,
            "quant_type": config.bnb_4bit_quant_type,
            "quant_storage": config.bnb_4bit_quant_storage,
        }
        new = bnb.nn.Linear4bit(*sizes, config.bnb_4bit_compute_dtype, **options)
        new.weight = bnb.nn.Params4bit(weight.data, requires_grad=False, module=new, **options)
    new.bias = linear.bias
    new.train(linear.training)
    new.requires_grad_(False)
    return new.to(weight.device)  # type: ignore[no-any-return]  # which quantises


def inner_model(model: nn.Module) -> tuple[str, nn.Module]:
    """The Hugging Face model inside a `PeftModel`, and its path there; ("", model) for any other model.

    >>> inner_model(model)[0]
    ''

    Raises `ValueError` for adapters that lengthen the prompt, whose positions are not the caller's.
    """
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(model, peft.PeftModel):
        return "", model
    wrapped: Any = model
    for name, config in wrapped.peft_config.items():
        if config.is_prompt_learning:
            raise ValueError(
                f"adapter {name!r} ({config.peft_type.value}) adds positions of its own to every call, so hooks would "
                "not show the positions of the tokens given; bridge the model without it"
            )
    return "base_model.model", wrapped.get_base_model()


def computing_module(module: nn.Module) -> nn.Module:
    """The module inside PEFT's wrappers, which change its stacked parameters during a call."""
    lora = sys.modules.get("peft.tuners.lora.layer")
    while lora is not None and isinstance(module, lora.ParamWrapper):
        module = module.base_layer
    return module


def is_adapted(module: nn.Module) -> bool:
    """Whether PEFT wraps a module."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    return tuners is not None and isinstance(module, tuners.BaseTunerLayer)


def adapted_weight(layer: Any, name: str, read: Callable[[nn.Module, str], Tensor]) -> Tensor:
    """The weight of an adapted layer: the base layer's plus `scaling * B @ A` of each active adapter.

    Source: Hu et al. 2021 (LoRA), and PEFT's `get_delta_weight`. Raises `ValueError` for other kinds of adapters.
    """
    weight = read(layer.base_layer, name)
    if name != getattr(layer, "parameter_name", "weight"):  # a wrapper of another parameter, or a bias
        return weight
    if layer.merged and layer.disable_adapters:
        raise ValueError("this adapter is merged and disabled; unmerge it, PEFT does so at the next forward")
    if layer.merged or layer.disable_adapters:
        return weight
    active = [adapter for adapter in layer.active_adapters if adapter in getattr(layer, "lora_A", ())]
    if not active and not any(adapter in layer._get_available_adapters() for adapter in layer.active_adapters):
        return weight
    kind = type(layer).__name__
    if not active or any(adapter in layer.lora_variant or layer.lora_bias[adapter] for adapter in active):
        raise ValueError(
            f"the {name} under a {kind} of {type(layer).__module__} cannot be read: only plain LoRA is a matrix added "
            "to a weight; merge the adapter (merge_adapter()), or disable it, to read this weight"
        )
    total = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for adapter in active:
        total = total + layer.get_delta_weight(adapter).to(total.dtype)
    return total.to(weight.dtype)
