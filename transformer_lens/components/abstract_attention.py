"""`AbstractAttention` under its known import path."""

from transformer_lens.components import AbstractAttention as AbstractAttention
