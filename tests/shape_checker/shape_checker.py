"""The type checker of `make shapes`: while tests run, every tensor has the shape its signature states.

Other annotations are mypy's to check; some of them (`Self`, protocols) beartype refuses.
"""

from collections.abc import Callable
from typing import Any

from beartype import beartype


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose arguments and result are checked where their annotation names axes."""
    function.__annotations__ = {
        name: hint for name, hint in function.__annotations__.items() if "[Tensor, " in str(hint)
    }
    return beartype(function)
