"""`Branch`es of a block, from the residual stream and back, in parallel or in sequence.

They determine a block's hooks, what each norm feeds, and what is added to the residual stream.
"""

from dataclasses import dataclass

READERS = {"attn": "attention", "mlp": "the MLP", "mixer": "the mixer"}
"""The roles that read and write the residual stream, in words."""


@dataclass(frozen=True)
class Branch:
    """One path from the residual stream and back, its parts by role.

    It adds `scale * post_norm(mixer(scale_in * norm(stream)))`. The mixer is "attn", "mlp" or "mixer"; `norm=""` and
    `post_norm=""` mean that there is no such norm. `adds` is the role of what is added if the mixer's module adds the
    stream to that itself (Bloom).

    >>> Branch("ln2", "mlp").receives, Branch("", "attn", post_norm="ln1_post").returns
    ('ln2', 'ln1_post')
    """

    norm: str
    mixer: str
    post_norm: str = ""
    scale: float = 1.0
    scale_in: float = 1.0
    adds: str = ""

    def __post_init__(self) -> None:
        if self.mixer not in READERS:
            raise ValueError(f"Branch: got mixer={self.mixer!r}, expected one of {', '.join(map(repr, READERS))}")

    @property
    def receives(self) -> str:
        """The role that the residual stream enters."""
        return self.norm or self.mixer

    @property
    def returns(self) -> str:
        """The role whose output, times `scale`, is added to the residual stream."""
        return self.post_norm or self.adds or self.mixer

    @property
    def direct(self) -> bool:
        """Whether the mixer's output is added as it is."""
        return not self.post_norm and self.scale == 1.0

    @property
    def roles(self) -> tuple[str, ...]:
        """The parts of the block on this path."""
        return tuple(role for role in (self.norm, self.mixer, self.post_norm) if role)


Stages = tuple[tuple[Branch, ...], ...]
"""Branches of one stage read the same stream, in the order of their calls; stages follow one another."""

SEQUENTIAL: Stages = ((Branch("ln1", "attn"),), (Branch("ln2", "mlp"),))
"""Attention, then the MLP, each after a norm."""
PARALLEL: Stages = ((Branch("ln1", "attn"), Branch("ln2", "mlp")),)
"""Attention and MLP in parallel, each after a norm."""
PARALLEL_ONE_NORM: Stages = ((Branch("ln1", "attn"), Branch("ln1", "mlp")),)
"""Attention and MLP in parallel after one norm."""
