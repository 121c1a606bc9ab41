"""Generated English and the two small models trained on it, shipped with the package."""

from pathlib import Path

TINY_MODELS: tuple[str, ...] = ("tiny-falcon", "tiny-mixtral")


def tiny_model_path(name: str) -> Path:
    """The folder of a shipped model, in Hugging Face format: pass it to `from_pretrained`.

    >>> tiny_model_path("tiny-falcon").name
    'tiny-falcon'
    """
    if name not in TINY_MODELS:
        raise ValueError(f"tiny model: got {name!r}, expected one of {', '.join(TINY_MODELS)}")
    return Path(__file__).parent / name
