"""The program `transformer-lens`: `python -m transformer_lens`, where `--help` and the TAB key do not wait for torch.

Python runs a package's `__init__` before any of its modules, and that of `transformer_lens` imports torch. Here it
waits until a command needs it (`transformer_lens.cli.running.load_package`).
"""

import sys
from importlib.util import find_spec, module_from_spec


def main() -> None:
    """Run the command line."""
    spec = find_spec("transformer_lens")
    assert spec is not None
    sys.modules.setdefault(spec.name, module_from_spec(spec))
    from transformer_lens.cli import main as run

    run()


if __name__ == "__main__":
    main()
