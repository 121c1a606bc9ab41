"""Trained prompts: embeddings before the text, and additions to each block's input at their positions.

Only they are trained. Servers receive them as `add` edits and need not know of them. They go in front while no cache
holds positions; outside the model only the text's positions count.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from transformer_lens.distributed.client.remote_cache import RemoteText
from transformer_lens.hook_points import Edit
from transformer_lens.model_bridge import BlockElsewhere
from transformer_lens.model_bridge.upstream import EMBEDDINGS, MASK, POSITIONS, TOKENS, Arguments, Word

FORMAT = "transformer_lens.trained_prompts.1"


@dataclass(frozen=True)
class PromptFacts:
    """What trained prompts are, and for which model; prompts that differ here are incompatible."""

    dht_prefix: str
    model_type: str
    tuning_mode: str
    pre_seq_len: int
    d_model: int
    n_layers: int

    @classmethod
    def of(cls, config: Any) -> Self:
        """The facts of a config's prompts. Raises `ValueError` if the model has too few positions for them."""
        longest = config.max_position_embeddings
        if config.pre_seq_len >= longest:
            raise ValueError(
                f"pre_seq_len: got {config.pre_seq_len}, and this model has {longest} positions for prompts and text; "
                f"expected at most {longest - 1}"
            )
        sizes = (config.pre_seq_len, config.hidden_size, config.num_hidden_layers)
        return cls(str(config.dht_prefix), config.model_type, config.tuning_mode, *sizes)


class TrainedPrompts(nn.Module):
    """The parameters of prompt tuning: `embeddings`, and with `deep_ptune` also `deep`.

    >>> from transformer_lens.distributed import AutoDistributedConfig
    >>> config = AutoDistributedConfig.from_pretrained("tiny-falcon", tuning_mode="deep_ptune", pre_seq_len=3)
    >>> prompts = TrainedPrompts(PromptFacts.of(config))
    >>> prompts.embeddings.shape, prompts.deep.shape
    (torch.Size([3, 128]), torch.Size([4, 3, 128]))

    `ptune` is prompt tuning (Lester et al. 2021, arXiv:2104.08691): the embeddings go before the text's own.
    `deep_ptune` also adds `deep[i]` to the stream at their positions where it enters block `i`, as in Petals; in
    P-tuning v2 (Liu et al. 2022, arXiv:2110.07602) each layer's prompts replace it instead. Embeddings are initialised
    normally with `initializer_range`, deep values with zero. Both are float32, and cast when used.
    """

    def __init__(self, facts: PromptFacts, std: float = 0.02) -> None:
        super().__init__()
        self.facts = facts
        self.std = std
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)  # a step of AdamW is lost in 16 bits
        self.embeddings = nn.Parameter(torch.empty(facts.pre_seq_len, facts.d_model, dtype=dtype))
        deep = torch.empty(facts.n_layers, facts.pre_seq_len, facts.d_model, dtype=dtype)
        self.deep = nn.Parameter(deep) if facts.tuning_mode == "deep_ptune" else None
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        self.embeddings.normal_(0, self.std)
        if self.deep is not None:
            self.deep.zero_()

    def extra_repr(self) -> str:
        return f"{self.facts.tuning_mode}, {self.facts.pre_seq_len} in front of {self.facts.dht_prefix}"

    def in_front(
        self, embeddings: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pre_seq_len+pos d_model"]:
        """A text's embeddings with the trained ones in front of every row."""
        mine = self.embeddings.to(device=embeddings.device, dtype=embeddings.dtype)
        return torch.cat([mine.expand(len(embeddings), -1, -1), embeddings], dim=1)

    def edits(self, dtype: torch.dtype | None = None) -> list[Edit]:
        """The edit of each block's input, in order of the blocks; none with `ptune`."""
        if self.deep is None:
            return []
        positions = range(self.facts.pre_seq_len)
        return [Edit("add", value, positions=positions) for value in self.deep.to(dtype or self.deep.dtype).unbind()]

    def hooks(self, dtype: torch.dtype | None = None) -> list[tuple[str, Edit]]:
        """`edits` with their hook names: hooks that run these prompts on a local bridge."""
        return [(f"blocks.{layer}.hook_resid_pre", edit) for layer, edit in enumerate(self.edits(dtype))]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the prompts to a safetensors file, with their facts."""
        values = {name: value.detach().cpu().contiguous() for name, value in self.named_parameters()}
        facts = {name: str(fact) for name, fact in asdict(self.facts).items()}
        save_file(values, path, metadata={"format": FORMAT, **facts})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Load prompts without their model. Raises `ValueError` for any other file."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file; expected one that save_prompts wrote")
        try:
            with safe_open(path, framework="pt") as opened:
                values = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no dictionary
                found = opened.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{path}: is not a safetensors file, and prompts are read from nothing else") from error
        if found.get("format") != FORMAT or set(found) - {"format"} != set(PromptFacts.__dataclass_fields__):
            raise ValueError(f"{path}: holds no trained prompts; expected a file that save_prompts wrote")
        sizes = [found[name] for name in ("pre_seq_len", "d_model", "n_layers")]
        whole = all(size.isascii() and size.isdigit() for size in sizes)
        if not whole or found["tuning_mode"] not in ("ptune", "deep_ptune"):
            raise ValueError(f"{path}: says of its prompts {found}, which are no sizes and no tuning_mode")
        pre_seq_len, d_model, n_layers = map(int, sizes)
        shapes = {"embeddings": [pre_seq_len, d_model], "deep": [n_layers, pre_seq_len, d_model]}
        if found["tuning_mode"] == "ptune":
            del shapes["deep"]
        held = {name: list(value.shape) for name, value in values.items()}
        if held != shapes:
            raise ValueError(f"{path}: holds {held}, and says it holds {shapes}")
        bad = [n for n, value in values.items() if not value.is_floating_point() or not value.isfinite().all()]
        if bad:
            raise ValueError(f"{path}: {', '.join(bad)} holds values that are not finite numbers; train them again")
        names = (found["dht_prefix"], found["model_type"], found["tuning_mode"])
        prompts = cls(PromptFacts(*names, pre_seq_len, d_model, n_layers))
        prompts.load_state_dict(values)
        return prompts

    def take(self, other: Self, path: str | os.PathLike[str]) -> None:
        """Copy another's values. Raises `ValueError`, changing nothing, if they are for another model."""
        mine, theirs = asdict(self.facts), asdict(other.facts)
        differing = [f"{name} {theirs[name]!r}, here {mine[name]!r}" for name in mine if mine[name] != theirs[name]]
        if differing:
            raise ValueError(
                f"{path}: these prompts were trained on something else: {'; '.join(differing)}; load the model that "
                "they belong to, with their tuning_mode, pre_seq_len and dht_prefix"
            )
        self.load_state_dict(other.state_dict())  # in place: what an optimizer holds stays the same tensors


def mask_in_front(mask: Tensor | None, count: int) -> Tensor | None:
    """A mask of the text with `count` columns of ones in front: prompts are attended to, even before left padding."""
    return None if mask is None else torch.cat([mask.new_ones(len(mask), count), mask], dim=1)


def positions_in_front(positions: Tensor | None, mask: Tensor | None, count: int, first: bool) -> Tensor | None:
    """Positions of the text shifted behind the prompts, which come before them in the `first` call.

    They match what transformers and the bridge derive from a mask with the prompts; padding between prompts and text,
    which nobody attends to, keeps its position.
    """
    if positions is None:
        return None
    real = 1 if mask is None else mask[:, -positions.shape[-1] :] != 0
    after = positions + count * real
    if not first:
        return after
    ahead = torch.arange(count).to(positions)
    return torch.cat([ahead.expand(len(after), -1), after], dim=-1)


@dataclass(frozen=True)
class ModelCall:
    """One forward of a base model: the arguments of its own code, after the first by name, and what is sent."""

    arguments: Arguments
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    mask: Tensor | None = None
    position_ids: Tensor | None = None
    ahead: int = 0  # positions before the text's, in the arguments and in the output
    edits: Sequence[Edit] = ()

    def __getitem__(self, word: Word) -> Any:
        return self.arguments.value(word, self.args, self.kwargs)

    def check(self, given: Tensor, held: int) -> None:
        """Raise `ValueError` if mask or positions do not fit the text."""
        if given.ndim < 2:
            raise ValueError(f"input_ids: got shape {list(given.shape)}, expected [batch, pos]")
        rows, new = given.shape[:2]
        expected = {MASK: [[rows, held + new]], POSITIONS: [[rows, new], [1, new]]}
        for word, shapes in expected.items():
            passed = self[word]
            if passed is not None and list(passed.shape) not in shapes:
                raise ValueError(
                    f"{self.arguments.name(word)}: got shape {list(passed.shape)}, expected {shapes[0]}, of the text "
                    "alone; what trained prompts need is added"
                )


def with_prompts(model: Any, call: ModelCall, text: RemoteText | None) -> ModelCall:
    """The call of a base model with its prompts, if it has any: before the text, or already in the cache."""
    tokens, embeddings, mask, positions = (call[word] for word in (TOKENS, EMBEDDINGS, MASK, POSITIONS))
    call, prompts = replace(call, mask=mask, position_ids=positions), model.prompts
    if prompts is None or (tokens is None) == (embeddings is None):  # the latter is the family's to refuse
        return call
    given = tokens if embeddings is None else embeddings
    call.check(given, 0 if text is None else text.length - text.ahead)
    if text is not None and text.length:
        # The model's own code does not see the prompts: the positions it computes are not used.
        positions = positions_in_front(positions, mask, text.ahead, first=False)
        return replace(call, mask=mask_in_front(mask, text.ahead), position_ids=positions)
    count, new, longest = prompts.facts.pre_seq_len, given.shape[1], model.config.max_position_embeddings
    if not BlockElsewhere.begins_at_embedding():  # the stream at a later block, which holds their positions already
        if new <= count:
            raise ValueError(
                f"start_at_layer: got a stream of {new} positions, and with trained prompts it holds {count} for them "
                "and then those of the text, as stop_at_layer and hook_resid_pre give it"
            )
        return replace(call, ahead=count, edits=prompts.edits(model.dtype))
    if count + new > longest:
        raise ValueError(
            f"{count} trained prompts and {new} tokens are {count + new} positions, and this model has {longest}; "
            f"give it at most {longest - count} tokens"
        )
    embeddings = model.get_input_embeddings()(tokens) if embeddings is None else embeddings
    positions = positions_in_front(positions, mask, count, first=True)
    mask = mask_in_front(mask, count)
    named = {TOKENS: None, EMBEDDINGS: prompts.in_front(embeddings), MASK: mask, POSITIONS: positions}
    kwargs = {**call.kwargs, **call.arguments.named(named)}
    return ModelCall(call.arguments, (), kwargs, mask, positions, count, prompts.edits(embeddings.dtype))
