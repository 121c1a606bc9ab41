"""How a distributed model comes to its servers, and leaves them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformer_lens.distributed.client.route import Route
from transformer_lens.distributed.client.spans import Span, SpanSource


class ConnectMethods:
    """Methods of a distributed causal model. It is a context manager that closes itself.

    >>> from transformer_lens.distributed import AutoDistributedModelForCausalLM, LocalSpan
    >>> spans = [LocalSpan("tiny-falcon", range(0, 4))]
    >>> with AutoDistributedModelForCausalLM.from_pretrained("tiny-falcon", spans=spans) as model:
    ...     TransformerBridge(model)(torch.tensor([[1, 5, 7]])).shape
    torch.Size([1, 3, 735])
    """

    config: Any
    base_model: Any
    _swarm: SpanSource | None = None
    """What `from_pretrained` made of `initial_peers`, to be closed with the model."""

    @property
    def route(self) -> Route:
        """Where the blocks run; `route.recoveries` lists the failures that were repaired.

        >>> from transformer_lens.distributed import AutoDistributedModelForCausalLM, LocalSpan
        >>> model = AutoDistributedModelForCausalLM.from_pretrained("tiny-falcon")
        >>> model.connect([LocalSpan("tiny-falcon", range(0, 4))])
        >>> list(model.route.recoveries)
        []
        """
        found: Route = self.base_model.route
        return found

    def connect(self, spans: Sequence[Span] | SpanSource) -> None:
        """Run the blocks on these spans, or on those that a source finds.

        >>> from transformer_lens.distributed import AutoDistributedModelForCausalLM, LocalSpan
        >>> model = AutoDistributedModelForCausalLM.from_pretrained("tiny-falcon")
        >>> model.connect([LocalSpan("tiny-falcon", range(0, 4))])

        Raises `ValueError` if a block is missing, or if a server of a list has another model (its prefix, number of
        blocks, width, dtype or attention); then what was connected stays. A source's servers that do not fit are
        logged and never used. Spans and sources belong to the caller, who closes them.
        """
        here: Any = self
        expected = {
            "dht_prefix": here.config.dht_prefix,
            "model_type": here.config.model_type,
            "n_layers": here.config.num_hidden_layers,
            "d_model": here.config.hidden_size,
            "dtype": str(here.dtype).removeprefix("torch."),
            "attn_implementation": str(here.config._attn_implementation),
        }
        self.route.connect(spans, expected)

    def connect_as_given(self, spans: Sequence[Span] | SpanSource) -> None:
        """What `from_pretrained` does: use its `spans`, else the swarm that `initial_peers` lead to, if any."""
        if not isinstance(spans, Sequence) or spans:
            self.connect(spans)
        elif self.config.initial_peers:
            from transformer_lens.distributed.client.swarm import Swarm

            swarm = Swarm(self.config)
            try:
                self.connect(swarm)
                self._swarm = swarm
            finally:
                if self._swarm is not swarm:
                    swarm.close()

    def close(self) -> None:
        """Close the sessions of texts that are gone and leave the swarm of `initial_peers`; `connect` begins anew.

        >>> from transformer_lens.distributed import AutoDistributedModelForCausalLM
        >>> model = AutoDistributedModelForCausalLM.from_pretrained("tiny-falcon")
        >>> model.close()
        """
        self.route.close()
        if self._swarm is not None:
            self._swarm.close()
            self._swarm = None

    def __enter__(self) -> Any:
        """This model."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()
