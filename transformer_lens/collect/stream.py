"""`ActivationStream`: the activations of a data set in mixed batches, computed as they are taken, for a trainer."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from transformer_lens.asking import place_name
from transformer_lens.checks import device_of, in_words, is_one_of, refuse_unknown, whole
from transformer_lens.collect.files import ABOUT_TOKENS
from transformer_lens.collect.manifest import differences
from transformer_lens.collect.mixing import Mixer, Rows, count
from transformer_lens.collect.plan import Cursor, Options, Reading, ShardPlan, TokenStream, plan_shard, special_tokens
from transformer_lens.collect.run import capture, probe
from transformer_lens.hook_points import HookedRootModule

if TYPE_CHECKING:
    from transformer_lens import TransformerBridge

READ = ("context_size", "packing", "prepend_bos", "append_eos", "drop_bos", "drop_first", "max_tokens", "text_key")
"""The options of `collect` that say what is read."""
Place = str | int
"""A hook, a layer (the stream that leaves it), or a column of `ABOUT_TOKENS`."""


class ActivationStream(IterableDataset[Tensor | Rows]):
    """An iterator over batches of activations, mixed in a bounded buffer; `bridge.activation_stream` makes it.

    >>> from transformer_lens.collect import ActivationStream
    >>> stream = ActivationStream(bridge, ["Mary and John", "went to the store"], at=1, batch_size=4, buffer=8)
    >>> next(stream).shape, sum(len(batch) for batch in stream)
    (torch.Size([4, 128]), 5)

    `texts` is all that `collect` takes: texts, token rows, files, a Hugging Face data set, also a streamed one. `at` is
    a hook or a layer, whose batches are tensors [token, ...], or several, whose batches are dictionaries of them; one
    may be `token_ids`, or another column of an `ActivationStore`. No layer above them runs.

    - `batch_size` tokens are a batch; `buffer` tokens are mixed and bound memory; `seed` alone chooses the order.
    - `shuffle=False` gives the tokens in the order of the texts, and needs no buffer.
    - `dtype` to hold floats in (default: as computed); `device` of buffer and batches (default: the model's first).
    - `epochs` passes over the data (`None`: without end); `drop_last` leaves out a batch that is too small.
    - `contexts` are computed together; `context_size`, `packing`, `prepend_bos`, `append_eos`, `drop_first`,
      `max_tokens` and `text_key` as in `collect`.
    - `drop_bos` (default: where the model has one) leaves BOS out of the batches. Padding is never in them: a pad token
      of its own at either end of a token row is cut off, unless `drop_padding=False`.

    `state_dict()` is all that is needed to go on with the next batch, bit for bit, in a stream made by the same call.
    Raises `ValueError` for a model in training mode, for hooks without a value for each token, and for no tokens.
    """

    def __init__(
        self,
        bridge: "TransformerBridge",
        texts: Any,
        at: Place | Sequence[Place],
        *,
        batch_size: int = 4096,
        buffer: int = 65536,
        shuffle: bool = True,
        seed: int = 0,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        epochs: int | None = 1,
        drop_last: bool = False,
        contexts: int = 8,
        drop_padding: bool = True,
        **reading: Any,
    ) -> None:
        super().__init__()
        has_bos = isinstance(bridge, HookedRootModule) and special_tokens(bridge)[0] is not None
        # What is computed at a time is a shard of one batch.
        fixed = {"batch_size": whole("contexts", contexts, 1), "shard_tokens": 1, "dtype": dtype}
        refuse_unknown("activation_stream", reading, READ)
        options = Options(**{"drop_bos": has_bos, **reading, **fixed})
        self.bridge, self.reading = bridge, Reading.of("activation_stream", bridge, texts, options, drop_padding)
        self.batch_size, self.drop_last = whole("batch_size", batch_size, 1), drop_last
        self.epochs = None if epochs is None else whole("epochs", epochs, 1)
        self.device = bridge.input_device() if device is None else device_of("device", device)
        self.single = not isinstance(at, (list, tuple))
        places: list[Any] = list(at) if isinstance(at, (list, tuple)) else [at]
        if not places:
            raise ValueError(f"at: got {in_words(at)}, expected a hook or a layer, or several")
        self.names = [one if is_one_of(one, ABOUT_TOKENS) else place_name(bridge, one) for one in places]
        self.hooks = probe(bridge, [name for name in self.names if name not in ABOUT_TOKENS], dtype)
        self.buffer, seed = whole("buffer", buffer, 1), whole("seed", seed, 0)
        if shuffle and self.buffer < self.batch_size:
            raise ValueError(f"buffer: got {self.buffer}, expected at least the batch_size, {self.batch_size}")
        self.shuffle = shuffle
        self._asked = {
            "names": self.names,
            "hooks": {name: hook.to_dict() for name, hook in self.hooks.items()},
            "data": dict(self.reading.source.about),
            "layout": asdict(self.reading.layout),
            **{"batch_size": self.batch_size, "buffer": self.buffer, "shuffle": shuffle, "seed": seed},
            "epochs": self.epochs,
        }
        self._epoch = 0
        self._plan: ShardPlan | None = None
        self._mixer = self._mixed(np.random.default_rng(seed), None, {})

    def __iter__(self) -> Self:
        if get_worker_info() is not None:
            raise ValueError("activation_stream: it runs the model, which is in the main process; pass num_workers=0")
        return self

    def __next__(self) -> Any:
        """The next batch."""
        # Ordinary tensors, whatever mode a trainer asks in: the buffer outlives it.
        with torch.inference_mode(False), torch.no_grad():
            batch = self._mixer.take()
        if not batch or (self.drop_last and count(batch) < self.batch_size):
            raise StopIteration
        return batch[self.names[0]] if self.single else batch

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, and its buffer: what `torch.save` keeps and `torch.load` reads with `weights_only`.

        >>> stream = bridge.activation_stream(["Mary and John", "went to the store"], at=1, batch_size=2, buffer=4)
        >>> again = bridge.activation_stream(["Mary and John", "went to the store"], at=1, batch_size=2, buffer=4)
        >>> first, state = next(stream), stream.state_dict()
        >>> again.load_state_dict(state)
        >>> torch.equal(next(again), next(stream))
        True
        """
        mixer, plan = self._mixer, self._plan
        return {
            "asked": self._asked,
            "epoch": self._epoch,
            "read": None if plan is None else [*astuple(plan.begin), plan.digest()],
            "random": json.dumps(mixer.random.bit_generator.state),
            "coming": {name: values.clone() for name, values in mixer.rest.items()},
            "buffer": {name: values[: mixer.filled].clone() for name, values in mixer.buffer.items()},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on after the batch that `state_dict()` followed. Raises `ValueError` for another call's or other texts."""
        if not isinstance(state_dict, Mapping) or set(state_dict) != set(self.state_dict()):
            raise TypeError(f"state_dict: got {in_words(state_dict)}, expected what state_dict() of a stream gave")
        if changed := differences(state_dict["asked"], self._asked):
            raise ValueError(f"state_dict: it is of a stream that was made otherwise: {'; '.join(changed)}")
        self._epoch, self._plan, tokens = state_dict["epoch"], None, None
        if state_dict["read"] is not None:
            *begin, digest = state_dict["read"]
            tokens = self.reading.tokens(begin[0])
            self._plan = plan_shard(tokens, 0, Cursor(*begin), self.reading.layout)
            if self._plan is None or self._plan.digest() != digest:
                raise ValueError("state_dict: it was made from other tokens; pass the same texts in the same order")
        random = np.random.default_rng()
        random.bit_generator.state = json.loads(state_dict["random"])
        coming, buffer = (
            {name: values.to(self.device) for name, values in state_dict[part].items()} for part in ("coming", "buffer")
        )
        self._mixer = self._mixed(random, tokens, coming)
        self._mixer.put(buffer)

    def _mixed(self, random: np.random.Generator, tokens: TokenStream | None, rest: Rows) -> Mixer:
        return Mixer(self._runs(tokens), self.buffer, self.batch_size, random, self.shuffle, rest)

    def _runs(self, tokens: TokenStream | None) -> Iterator[Rows]:
        """What is computed of one batch of contexts after the other; `tokens` go on behind the last one."""
        while self.epochs is None or self._epoch < self.epochs:
            if tokens is None:
                tokens = self.reading.tokens(0)
            cursor = Cursor() if self._plan is None else self._plan.end
            while plan := plan_shard(tokens, 0, cursor, self.reading.layout):
                self._plan, cursor = plan, plan.end
                (batch,) = plan.batches(len(plan.ids))
                known = plan.columns() | capture(self.bridge, self.hooks, batch)
                yield {name: known[name].to(self.device) for name in self.names}
            if self._plan is None:
                again = " when read once more: pass what can be read again, such as a list" if self._epoch else ""
                raise ValueError(f"data: got no tokens at all{again}")
            self._epoch, self._plan, tokens = self._epoch + 1, None, None
