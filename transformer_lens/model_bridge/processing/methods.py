"""`ProcessingMethods`: a bridge's methods that rewrite its model's weights, and restore them."""

from __future__ import annotations

import logging
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from transformer_lens.model_bridge.processing.changes import RECORD, Record, WeightChanges
from transformer_lens.model_bridge.processing.steps import STEPS, Draft, Step

if TYPE_CHECKING:
    from transformer_lens.model_bridge.bridge import TransformerBridge

logger = logging.getLogger(__name__)

DONE = "{steps}: already done on this model, so nothing is changed; bridge.undo_processing() puts the old weights back"


class ProcessingMethods:
    """Weights rewritten to be easier to read; log-probabilities do not change, and every change can be undone.

    Parameters keep their names and stay the same objects; the original values are kept beside them.
    """

    _processing: Record | None = None
    """What this bridge did; `processed` tells what any bridge did."""

    def fold_ln(self) -> WeightChanges:
        """Move each norm's weight and bias into the weights that read its output; the norm keeps ones and zeros.

        >>> with bridge.fold_ln():
        ...     norm = bridge.blocks[0].ln1.original_component
        ...     bool((norm.weight == 1).all()), bool((norm.bias == 0).all())
        (True, True)

        `ln1.hook_normalized` is then the input of `W_Q`, `W_K` and `W_V`. Linear layers without a bias get one where
        the norm had one. Raises `ValueError`, before any change, for weights that cannot be rewritten (quantised,
        offloaded, sharded, under an adapter).
        """
        return self._process(("fold_ln",), asked_for=True)

    fold_layer_norm = fold_ln

    def center_writing_weights(self) -> WeightChanges:
        """Subtract the mean over d_model from everything that is written to the residual stream.

        >>> with bridge.center_writing_weights():
        ...     _, cache = bridge.run_with_cache("Mary and John", names_filter="blocks.0.hook_attn_out")
        >>> bool(cache["attn_out", 0].mean(-1).abs().max() < 1e-6)
        True

        Raises `ValueError` for a model with RMSNorm, which reads that mean.
        """
        return self._process(("center_writing_weights",), asked_for=True)

    def center_unembed(self) -> WeightChanges:
        """Subtract the mean over the vocabulary from the unembedding, and so from the logits.

        >>> with bridge.center_unembed():
        ...     bool(bridge("Mary and John").mean(-1).abs().max() < 1e-5)
        True

        Raises `ValueError` for a model without an unembedding.
        """
        return self._process(("center_unembed",), asked_for=True)

    def fold_value_biases(self) -> WeightChanges:
        """Move the value biases into the output projection's bias (`b_O + W_O b_V`).

        >>> with bridge.fold_value_biases() as changes:
        ...     changes.steps
        ('fold_value_biases',)

        Rows of the pattern sum to one, so a constant in the values reaches z unchanged. `fold_ln` makes such biases, so
        fold norms first.
        """
        return self._process(("fold_value_biases",), asked_for=True)

    def process_weights(
        self,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
    ) -> WeightChanges:
        """Take all steps that apply to this model, or those that are named.

        >>> changes = bridge.process_weights()
        >>> bridge.processed
        ('fold_ln', 'center_writing_weights', 'center_unembed', 'fold_value_biases')
        >>> changes.undo()

        A step that does not apply (centred writing with RMSNorm), or was taken before, is left out with a warning.
        Raises `ValueError` where the weights cannot be rewritten.
        """
        return self._process(_named(fold_ln, center_writing_weights, center_unembed, fold_value_biases))

    def enable_compatibility_mode(
        self,
        disable_warnings: bool = False,
        no_processing: bool = False,
        fold_ln: bool = True,
        center_writing_weights: bool = True,
        center_unembed: bool = True,
        fold_value_biases: bool = True,
        refactor_factored_attn_matrices: bool = False,
    ) -> WeightChanges:
        """`process_weights` under the name that older scripts call before they read weights.

        >>> with bridge.enable_compatibility_mode(disable_warnings=True):
        ...     len(bridge.processed)
        4

        Hook names of older scripts always work here, so `no_processing=True` leaves nothing to do.
        """
        if refactor_factored_attn_matrices is not False:
            raise ValueError(
                "refactor_factored_attn_matrices is not supported; attn.QK and attn.OV have every head's circuits, and "
                "svd() their vectors"
            )
        names = _named(fold_ln, center_writing_weights, center_unembed, fold_value_biases)
        return self._process(() if no_processing else names, quiet=disable_warnings)

    @property
    def processed(self) -> tuple[str, ...]:
        """The steps that any bridge has taken on the model's weights; `()` for its own weights.

        >>> bridge.processed
        ()
        """
        record = self._record()
        return () if record is None or record.suspended else record.steps

    def undo_processing(self) -> None:
        """Restore the weights from before any processing, bit for bit, ties included.

        >>> changes = bridge.center_unembed()
        >>> bridge.undo_processing()
        >>> bridge.processed
        ()
        """
        record = self._record()
        if record is not None:
            record.undo_all()

    def unprocessed(self) -> AbstractContextManager[None]:
        """The model's own weights for the length of a `with` block, for example to save them; nothing is copied.

        >>> with bridge.fold_ln():
        ...     with bridge.unprocessed():
        ...         bridge.processed
        ()
        """
        record = self._record()
        return nullcontext() if record is None else record.lent_back()

    def _base(self) -> nn.Module:
        """The base model: what every bridge on these weights has in common, whatever head it sees."""
        return cast("TransformerBridge", self).root.in_place

    def _record(self) -> Record | None:
        """What was done to the weights, by any bridge."""
        return cast("Record | None", self._base().__dict__.get(RECORD))

    def _undo_own_processing(self) -> None:
        """Restore the weights, if this bridge changed them."""
        if self._processing is not None and self._processing is self._record():
            self._processing.undo_all()

    def _process(self, names: tuple[str, ...], asked_for: bool = False, quiet: bool = False) -> WeightChanges:
        """Collect new values for all steps, then exchange them at once."""
        record = self._writable_record(", ".join(names))
        steps, remarks = self._chosen(names, record.steps, asked_for)
        if not steps:
            _tell(remarks, [], quiet)
            return WeightChanges((), (), ())
        bridge = cast("TransformerBridge", self)
        draft = Draft(bridge)
        with torch.no_grad():
            for step in steps:
                step.run(bridge, draft)
        exchanges, notes = draft.exchanges()
        # Before anything changes, since a warning may be an error.
        _tell([*remarks, *draft.rounding()], notes, quiet)
        changes = WeightChanges([step.name for step in steps], exchanges, notes)
        record.add(changes)
        self._processing = record
        return changes

    def _writable_record(self, what: str) -> Record:
        bridge = cast("TransformerBridge", self)
        if bridge._detached:
            raise ValueError("this bridge was detached from its model; make a new TransformerBridge(model)")
        bridge.exchanged.refuse()
        record = self._record()
        if record is None:
            return Record(self._base())
        if record is not self._processing:
            raise ValueError(
                f"{what}: another bridge on these weights has already done {', '.join(record.steps)}; process them "
                "there, or call undo_processing() first"
            )
        record.refuse_while_suspended(what)
        return record

    def _chosen(self, names: tuple[str, ...], done: tuple[str, ...], asked_for: bool) -> tuple[list[Step], list[str]]:
        """The steps to take now, and a sentence for each one left out."""
        bridge = cast("TransformerBridge", self)
        chosen: list[Step] = []
        remarks: list[str] = []
        again = [name for name in names if name in done]
        for step in (step for step in STEPS if step.name in names and step.name not in again):
            late = [name for name in step.not_after if name in done]
            if late:
                raise ValueError(f"{step.name} has to come before {late[0]}; call bridge.undo_processing() first")
            why = step.inapplicable(bridge)
            if why is None:
                chosen.append(step)
            elif asked_for:
                raise ValueError(f"{step.name}: {why}. Nothing was changed")
            else:
                remarks.append(f"{step.name} is left out: {why}")
        return chosen, remarks + [DONE.format(steps=", ".join(again))] * bool(again)


def _named(*wanted: bool) -> tuple[str, ...]:
    return tuple(step.name for step, on in zip(STEPS, wanted, strict=True) if on)


def _tell(remarks: list[str], notes: list[str], quiet: bool) -> None:
    """Warn of what was left out or is less exact; log the rest."""
    if quiet:
        return
    for remark in remarks:
        warnings.warn(remark, stacklevel=4)
    for note in notes:
        logger.warning(note)
