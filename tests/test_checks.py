"""`checks` and `analysis.arguments`: what a value is taken for, and arguments that are held to their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from transformer_lens.analysis.arguments import checked
from transformer_lens.checks import (
    MOST_WHOLE,
    a_number,
    a_path,
    a_tensor,
    device_of,
    directory_to_write,
    file_to_write,
    in_words,
    is_one_of,
    is_several,
    is_tensor,
    is_whole,
    nearest,
    whole,
    whole_numbers,
)

WHOLE = [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor(3, dtype=torch.uint8)]
NOT_WHOLE = [
    True,
    np.True_,
    torch.tensor(True),
    3.0,
    np.float64(3),
    torch.tensor(3.0),
    "3",
    None,
    [3],
    np.array([3]),
    3j,
]


@pytest.mark.parametrize("value", WHOLE, ids=repr)
def test_a_whole_number_is_one_whatever_made_it(value: Any) -> None:
    assert is_whole(value) and whole("n", value) == 3 and type(whole("n", value)) is int
    assert whole_numbers("n", value) == [3] and whole("n", value, 3, 3) == 3
    with pytest.raises(ValueError, match="n: got 3, expected 0 to 2 in all"):
        whole("n", value, 0, 2, " in all")
    with pytest.raises(ValueError, match="n: got 3, expected 4 or more"):
        whole("n", value, 4)


@pytest.mark.parametrize("value", NOT_WHOLE, ids=repr)
def test_nothing_else_is_a_whole_number(value: Any) -> None:
    assert not is_whole(value)
    with pytest.raises(TypeError, match="n: got .*, expected a whole number"):
        whole("n", value)


def test_several_whole_numbers() -> None:
    for several in ([1, 2], (1, 2), range(1, 3), np.array([1, 2]), torch.tensor([1, 2]), [np.int8(1), torch.tensor(2)]):
        assert whole_numbers("n", several, 0, 2) == [1, 2]
    for wrong in ("12", b"12", {1: 2}, 1.5, None, np.ones((2, 2)), [[1]], [True]):
        with pytest.raises(TypeError, match="n: got .*, expected 0 to 2"):
            whole_numbers("n", wrong, 0, 2)


def test_whole_numbers_are_those_that_a_tensor_holds() -> None:
    assert whole("n", MOST_WHOLE) == MOST_WHOLE and whole("n", -MOST_WHOLE) == -MOST_WHOLE
    for beyond in (MOST_WHOLE + 1, 10**30, -(10**30)):
        with pytest.raises(ValueError, match=f"n: got {beyond}, expected at most {MOST_WHOLE} in all"):
            whole("n", beyond, where=" in all")


@pytest.mark.filterwarnings("ignore")  # torch says of some kinds that they are new, of others that they are old
@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("meta", lambda: torch.ones(2, device="meta")),
        ("sparse", lambda: torch.ones(2).to_sparse()),
        ("sparse", lambda: torch.eye(2).to_sparse_csr()),
        ("quantised", lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)),
        ("nested", lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])),
    ],
)
def test_a_tensor_is_one_that_can_be_computed_with(kind: str, make: Any) -> None:
    made = make()
    assert in_words(made).startswith(f"a {kind} torch.") and not is_tensor(made) and not is_several(made)
    for check in (a_tensor, whole, whole_numbers, a_number):
        with pytest.raises(TypeError, match=f"x: got a {kind} torch"):
            check("x", made)
    with pytest.raises(TypeError, match="expected a tensor, dense and on a device that holds numbers"):
        a_tensor("x", made)
    assert a_tensor("x", torch.ones(2).T) is not None and is_tensor(torch.ones(2, dtype=torch.bfloat16))


def test_paths_that_nothing_can_have_and_places_that_are_taken(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("here")
    folder.mkdir()
    assert file_to_write("path", file) == file and file_to_write("path", str(folder / "new")) == folder / "new"
    assert directory_to_write("path", folder) == folder and directory_to_write("path", tmp_path / "a" / "b").name == "b"
    for taken in (folder, ".", "/"):
        with pytest.raises(ValueError, match="path: '.*' is a directory, expected the name of a file"):
            file_to_write("path", taken)
    for nowhere in (file / "new", tmp_path / "a" / "new"):
        with pytest.raises(ValueError, match="path: '.*' is no directory, expected one to write 'new' in"):
            file_to_write("path", nowhere)
    for taken in (file, file / "below" / "it", "/dev/null"):
        with pytest.raises(ValueError, match="path: '.*' is a file, expected a directory"):
            directory_to_write("path", taken)
    for none in ("", "a\0b", "a" * 256, "é" * 128, "\ud800"):
        with pytest.raises(ValueError, match="path: got .*, expected the name of a file or directory"):
            a_path("path", none)
    for wrong in (b"bytes", 5, None, ["a"]):
        with pytest.raises(TypeError, match="path: got .*, expected a path"):
            a_path("path", wrong)
    assert a_path("path", "a" * 255) and a_path("path", "é" * 127)


def test_numbers_within_bounds() -> None:
    for value in (0.5, np.float32(0.5), torch.tensor(0.5)):
        assert a_number("x", value, least=0.0, most=1.0) == 0.5
    assert a_number("x", 2) == 2.0
    for wrong in (float("nan"), float("inf"), 1.5, -0.5):
        with pytest.raises(ValueError, match=r"x: got .*, expected a finite number from 0 to 1"):
            a_number("x", wrong, least=0.0, most=1.0)
    with pytest.raises(ValueError, match="x: got 0, expected a finite number above 0"):
        a_number("x", 0, least=0.0, above=True)
    for wrong in (True, "1", [1.0], None, 1j):
        with pytest.raises(TypeError, match="expected a finite number"):
            a_number("x", wrong)


def test_one_of_a_few_is_asked_of_anything() -> None:
    assert is_one_of("a", ("a", None)) and is_one_of(None, ("a", None))
    for other in (["a"], np.array(["a"]), torch.ones(2), {"a": 1}, 1, True):
        assert not is_one_of(other, ("a", None, 1.0))


def test_the_nearest_names_never_hold_the_name_itself() -> None:
    assert nearest("verbose", ["verbose", "verbos", "top_k"]) == "'verbos', 'top_k'"
    assert nearest("anything", []) == ""


def test_what_was_got_is_told_shortly() -> None:
    assert in_words(torch.ones(2, 3)) == "a torch.float32 tensor of shape [2, 3]"
    assert in_words([1, 2]) == "[1, 2]" and in_words("x" * 99) == "a str"
    assert in_words(object()) == "a object" and in_words(lambda: 1) == "a function"


def test_a_device_has_to_be_there() -> None:
    assert (
        device_of("device", "cpu") == torch.device("cpu") and device_of("device", torch.device("meta")).type == "meta"
    )
    for wrong in ("nowhere", 5.5, object(), "cuda:99"):
        with pytest.raises(ValueError, match="device: got .*, expected a device that is here"):
            device_of("device", wrong)


@checked
def sweep(bridge: Any, samples: int = -1, *, seed: int = 0, other: Any = None) -> tuple[Any, ...]:
    return bridge, samples, seed, other


def test_arguments_are_held_to_their_names_wherever_they_stand() -> None:
    for call in (lambda: sweep("x"), lambda: sweep(bridge="x")):
        with pytest.raises(TypeError, match="bridge: got a str, expected a TransformerBridge"):
            call()
    for call in (lambda: sweep(samples=0, bridge=None), lambda: sweep(samples=2.5, bridge=None)):
        with pytest.raises((TypeError, ValueError), match="bridge|samples"):
            call()
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'bridge'"):
        sweep()
    with pytest.raises(TypeError, match="unexpected keyword argument 'sample'"):
        sweep(sample=1)
    assert sweep.__name__ == "sweep"


def test_a_function_gets_what_was_meant_and_further_keywords_as_they_are() -> None:
    @checked
    def passing(samples: Any, **options: Any) -> tuple[Any, ...]:
        return samples, options

    found, options = passing(np.int64(3), folds="three")
    assert type(found) is int and found == 3 and options == {"folds": "three"}


def test_a_default_is_always_right() -> None:
    from transformer_lens import TransformerBridge

    bridge = TransformerBridge.boot_transformers("tiny-falcon")
    assert sweep(bridge) == (bridge, -1, 0, None) and sweep(bridge, -1, other="anything") == (bridge, -1, 0, "anything")
    with pytest.raises(ValueError, match="samples: got -2, expected 1 or more"):
        sweep(bridge, -2)
    with pytest.raises(TypeError, match="seed: got 'x', expected a whole number"):
        sweep(bridge, seed="x")
