"""What `make build` asks of the environment into which it installed the wheel: is all there, and nothing else?"""

import sys
from importlib.metadata import distribution
from pathlib import Path

import transformer_lens

TREE = Path(__file__).resolve().parents[1]
NAME = "transformer-lens-bridge"


def main() -> None:
    found = distribution(NAME)
    files = {str(file) for file in found.files or ()}
    tree = {
        str(path.relative_to(TREE))
        for path in (TREE / "transformer_lens").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    installed = Path(transformer_lens.__file__).resolve()
    assert installed.is_relative_to(sys.prefix), f"{installed} is not what was installed"
    assert tree <= files, f"the wheel lacks {sorted(tree - files)}"
    assert "transformer_lens/py.typed" in files
    tops = {file.split("/")[0] for file in files} - {f"transformer_lens_bridge-{found.version}.dist-info", ".."}
    assert tops <= {"transformer_lens", "transformer_lens_command.py", "__pycache__"}, tops
    assert transformer_lens.__version__ == found.version
    sys.stdout.write(f"{NAME} {found.version}: {len(tree)} files of the package, in {installed.parent}\n")


if __name__ == "__main__":
    main()
