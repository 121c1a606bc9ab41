"""`bridge.collect`: activations of whole data sets, written by `transformer_lens.collect`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from transformer_lens.collect import ActivationStore
    from transformer_lens.model_bridge.bridge import TransformerBridge


class CollectMethods:
    def collect(
        self,
        dataset: Any,
        names: str | Callable[[str], bool] | Sequence[str] | None,
        out_dir: str | Path,
        **options: Any,
    ) -> ActivationStore:
        """Write the activations of a data set at some hooks to disk, and open them.

        >>> import tempfile
        >>> store = bridge.collect(["Mary and John"], "blocks.1.attn.hook_z", tempfile.mkdtemp(), progress=False)
        >>> store["z", 1].shape
        (5, 4, 32)

        The data set is files, texts or token ids; `transformer_lens.collect.collect` lists the options and errors.
        """
        # Loaded only when needed.
        from transformer_lens.collect import collect

        return collect(cast("TransformerBridge", self), dataset, names, out_dir, **options)
