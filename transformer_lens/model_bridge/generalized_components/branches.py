"""What a block is made of: `Branch`es from the residual stream and back, side by side or one after the other.

Which hooks a block has, what each norm feeds and what is added to the stream all follow from this list.
"""

from __future__ import annotations

from dataclasses import dataclass

READERS = {"attn": "attention", "mlp": "the MLP", "mixer": "the mixer"}
"""The roles that read and write the stream, in words."""


@dataclass(frozen=True)
class Branch:
    """One way from the residual stream and back, its parts by role.

    What it adds to a stream is `scale * post_norm(mixer(scale_in * norm(stream)))`.

    >>> Branch("ln2", "mlp").receives, Branch("", "attn", post_norm="ln1_post").returns
    ('ln2', 'ln1_post')

    `norm=""`: the mixer reads the stream as it is. `post_norm=""`: what it returns is added without a norm of its own.
    The mixer is "attn", "mlp" or "mixer".
    """

    norm: str
    mixer: str
    post_norm: str = ""
    scale: float = 1.0
    scale_in: float = 1.0

    def __post_init__(self) -> None:
        if self.mixer not in READERS:
            raise ValueError(f"Branch: got mixer={self.mixer!r}, expected one of {', '.join(map(repr, READERS))}")

    @property
    def receives(self) -> str:
        """The role that the stream enters."""
        return self.norm or self.mixer

    @property
    def returns(self) -> str:
        """The role whose output, times `scale`, is added to the stream."""
        return self.post_norm or self.mixer

    @property
    def direct(self) -> bool:
        """Whether what the mixer returns is added as it is."""
        return not self.post_norm and self.scale == 1.0

    @property
    def roles(self) -> tuple[str, ...]:
        """The parts of the block that it goes through."""
        return tuple(role for role in (self.norm, self.mixer, self.post_norm) if role)


Stages = tuple[tuple[Branch, ...], ...]
"""Branches of one stage read the same stream, in the order in which the block calls them; stages follow one another."""

SEQUENTIAL: Stages = ((Branch("ln1", "attn"),), (Branch("ln2", "mlp"),))
"""Attention, then the MLP, each with a norm in front."""
PARALLEL: Stages = ((Branch("ln1", "attn"), Branch("ln2", "mlp")),)
"""Attention and the MLP side by side, each with a norm in front."""
PARALLEL_ONE_NORM: Stages = ((Branch("ln1", "attn"), Branch("ln1", "mlp")),)
"""Attention and the MLP side by side behind one norm."""
