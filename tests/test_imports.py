"""The shape of the package, read from its source: who imports whom, what is not used, how long things are."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import transformer_lens
from transformer_lens.analysis.patching.sweeps import PatchSweep

PACKAGE = Path(transformer_lens.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
BRIDGE = "transformer_lens.model_bridge"

# Who stands below whom. A file may import from its own rank and from the ranks below it; the first match counts.
RANKS: list[tuple[str, ...]] = [
    (
        *("transformer_lens.checks", "transformer_lens.asking", "transformer_lens.text_table"),
        *("transformer_lens.factored_matrix", f"{BRIDGE}.supported_versions", f"{BRIDGE}.upstream"),
        *(f"transformer_lens.hooks.{name}" for name in ("edits", "names", "point", "slicing")),
    ),
    ("transformer_lens.hooks.root", "transformer_lens.hook_points"),
    (f"{BRIDGE}.config", f"{BRIDGE}.access"),
    (f"{BRIDGE}.generalized_components",),
    (f"{BRIDGE}.architecture_adapter", f"{BRIDGE}.wrapped_model"),
    (f"{BRIDGE}.supported_architectures",),
    (f"{BRIDGE}.attaching",),
]
"""Everything else stands above these."""

GUESTS = ("analysis", "collect", "dictionaries", "distributed", "viz", "cli")
"""They use the public API alone."""
METHODS_OF_GUESTS = (f"{BRIDGE}.bridge", f"{BRIDGE}.steering")
"""Its methods import what they are a spelling of when they are called."""
PUBLIC = {
    "transformer_lens",
    "transformer_lens.asking",
    "transformer_lens.checks",
    "transformer_lens.text_table",
    "transformer_lens.hook_points",
    "transformer_lens.cache.activation_cache",
    "transformer_lens.factored_matrix",
    "transformer_lens.utilities",
    "transformer_lens.model_bridge",
    "transformer_lens.model_bridge.upstream",
}


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


@cache
def nodes(file: Path) -> dict[type[ast.AST], list[Any]]:
    """All nodes of a file by their kind."""
    found: dict[type[ast.AST], list[Any]] = {}
    for node in ast.walk(tree(file)):
        found.setdefault(type(node), []).append(node)
    return found


def found(file: Path, *kinds: type[ast.AST]) -> list[Any]:
    return [node for kind in kinds for node in nodes(file).get(kind, ())]


def for_types_only(file: Path) -> set[ast.AST]:
    """What stands under `if TYPE_CHECKING:`."""
    blocks = [n for n in found(file, ast.If) if ast.unparse(n.test) == "TYPE_CHECKING"]
    return {inner for block in blocks for statement in block.body for inner in ast.walk(statement)}


@cache
def imports(file: Path, types_too: bool = True) -> tuple[str, ...]:
    """The modules of this package that a file imports, relative ones resolved."""
    left_out = set() if types_too else for_types_only(file)
    names = []
    for node in found(file, ast.Import, ast.ImportFrom):
        if node in left_out:
            continue
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            base = module_name(file).split(".")
            base = base if file.name == "__init__.py" else base[:-1]
            parents = base[: len(base) - node.level + 1] if node.level else []
            names.append(".".join([*parents, *([node.module] if node.module else [])]))
    return tuple(name for name in names if name.split(".")[0] == "transformer_lens")


def rank(name: str) -> int:
    for place, members in enumerate(RANKS):
        if any(name == member or name.startswith(member + ".") for member in members):
            return place
    return len(RANKS)


def every_file(ask: Callable[[Path], None]) -> Callable[[], None]:
    """A test that asks this of each file, and names all that fail."""

    def test() -> None:
        wrong = []
        for file in FILES:
            try:
                ask(file)
            except AssertionError as error:
                wrong.append(f"{file.relative_to(PACKAGE)}: {error}")
        assert not wrong, "\n".join(wrong)

    test.__name__, test.__doc__ = ask.__name__, ask.__doc__
    return test


def test_the_ranks_name_modules_that_exist():
    names = {module_name(file) for file in FILES}
    assert {member for members in RANKS for member in members} <= names


@every_file
def test_nobody_imports_from_above(file):
    name = module_name(file)
    above = [other for other in imports(file, types_too=False) if rank(other) > rank(name)]
    assert above == [], f"{name} stands below {above}: see section 4 of the design"


@every_file
def test_guests_use_the_public_api(file):
    area = file.relative_to(PACKAGE).parts[0]
    if area in GUESTS:
        others = [name for name in imports(file) if not name.startswith(f"transformer_lens.{area}")]
        inner = [n for n in others if n not in PUBLIC and n.split(".")[1] not in (*GUESTS, "data")]
        assert inner == [], f"{module_name(file)} reaches into {inner}"
        for node in found(file, ast.ImportFrom):
            private = [a.name for a in node.names if a.name.startswith("_")]
            assert not private, f"{module_name(file)} imports the private names {private}"
    else:
        guests = [n for n in imports(file) if len(n.split(".")) > 1 and n.split(".")[1] in GUESTS]
        allowed = name_of_entry(file)
        assert guests == [] or allowed, f"{module_name(file)} depends on {guests}"


ROOMS = {"protocol": (), "network": ("protocol",), "server": ("network", "protocol"), "client": ("network", "protocol")}
"""The rooms of `distributed`, and whom each may use beside itself."""


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_of_distributed_use_those_below(room):
    files = sorted((PACKAGE / "distributed" / room).glob("*.py"))
    assert len(files) > 3
    for file in files:
        used = {name.split(".")[2] for name in imports(file) if name.startswith("transformer_lens.distributed.")}
        assert used <= {room, *ROOMS[room]}, f"{module_name(file)} uses {used}"
        assert "transformer_lens.distributed" not in imports(file), f"{module_name(file)} uses the face of all rooms"


def name_of_entry(file: Path) -> bool:
    """`python -m transformer_lens`, and modules that only pass names on, such as `transformer_lens.patching`."""
    if file.name == "__main__.py" or module_name(file) in METHODS_OF_GUESTS:
        return True
    kinds = (ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.Expr)
    return file.parent == PACKAGE and file.name != "__init__.py" and all(isinstance(n, kinds) for n in tree(file).body)


def test_no_circle():
    graph = {module_name(file): set(imports(file, types_too=False)) for file in FILES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"imports in a circle: {' -> '.join([*path, name])}"
        if name not in done:
            for other in graph.get(name, set()):
                if other != name:
                    visit(other, (*path, name))
            done.add(name)

    # A package's __init__ collects its parts, which is no circle: parts do not import it.
    for name in graph:
        visit(name, ())


@every_file
def test_nothing_hides_in_a_getattr(file):
    functions = found(file, ast.FunctionDef, ast.AsyncFunctionDef)
    magic = [f"line {f.lineno}" for f in functions if f.name in ("__getattr__", "__getattribute__")]
    assert magic == []


@every_file
def test_no_blanket_except(file):
    for handler in found(file, ast.ExceptHandler):
        assert handler.type is not None, f"line {handler.lineno}: bare except"
        caught = {n.id for n in ast.walk(handler.type) if isinstance(n, ast.Name)}
        assert not caught & {"Exception", "BaseException"}, f"line {handler.lineno}: except {caught}"


@every_file
def test_an_import_error_names_what_is_missing(file):
    """Packages look at `error.name` to see which extra to offer."""
    calls = [n for n in found(file, ast.Call) if ast.unparse(n.func) == "ImportError"]
    assert [f"line {c.lineno}" for c in calls if "name" not in {k.arg for k in c.keywords}] == []


@every_file
def test_no_source_is_inspected_and_nothing_is_printed(file):
    for call in found(file, ast.Call):
        name = ast.unparse(call.func)
        assert name not in ("inspect.getsource", "getsource"), f"line {call.lineno}"
        assert name not in ("print", "builtins.print"), f"line {call.lineno}: use a logger, or return the text"


@every_file
def test_files_and_functions_fit_in_a_head(file):
    lines = len(file.read_text().splitlines())
    assert lines <= 450, f"{lines} lines; is it still one idea?"
    for node in found(file, ast.FunctionDef, ast.AsyncFunctionDef):
        length = (node.end_lineno or node.lineno) - node.lineno + 1
        assert length <= 60, f"{node.name}, line {node.lineno}: {length} lines"


@every_file
def test_module_docstrings_are_short(file):
    docstring = ast.get_docstring(tree(file))
    # The only file that may say nothing is the one that holds nothing.
    assert docstring or not tree(file).body
    assert len((docstring or "").splitlines()) <= 5


HEAVY = ("pandas", "datasets", "plotly", "matplotlib", "typer", "rich", "accelerate", "wandb", "hivemind", "IPython")


@pytest.mark.core
def test_importing_the_package_stays_light():
    # In one fresh process: first what torch and transformers' model classes load by themselves, then the package.
    program = (
        "import sys, torch, transformers\n"
        "from transformers import FalconForCausalLM, MixtralForCausalLM, AutoTokenizer, AutoModelForCausalLM\n"
        "before = set(sys.modules)\n"
        "import transformer_lens\n"
        "tops = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "sys.stdout.write(' '.join(sorted(tops)))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(result.stdout.split())
    assert "transformer_lens" in loaded
    assert not loaded & set(HEAVY)


def test_public_names_are_there():
    for name in transformer_lens.__all__:
        assert getattr(transformer_lens, name) is not None
    from transformer_lens import hook_points, model_bridge, utilities, utils

    assert model_bridge.TransformerBridge is transformer_lens.TransformerBridge
    assert hook_points.HookPoint is transformer_lens.HookPoint
    assert hook_points.HookedRootModule is transformer_lens.HookedRootModule
    assert all(getattr(utils, name) is getattr(utilities, name) for name in utilities.__all__)


PATHS = {
    "analysis.attribution": ("EdgeGraph", "attribution_patching", "direct_logit_attribution", "path_patching"),
    "analysis.experts": ("ablate_expert", "expert_view", "logit_attribution", "routing", "routing_statistics"),
    "analysis.lenses": ("Patchscope", "TunedLens", "identity_prompt"),
    "analysis.patching": ("generic_activation_patch", "get_act_patch_resid_pre", "run_interventions"),
    "analysis.patchscope": ("Patchscope", "identity_prompt"),
    "analysis.tuned_lens": ("TunedLens",),
    "distributed.node": ("Node", "peer_of"),
    "distributed.swarm": ("Swarm",),
    "head_detector": ("detect_head",),
    "patching": ("get_act_patch_expert_out", "get_act_patch_resid_pre", "make_df_from_ranges", "noised_embeddings"),
}
"""Paths that stay, wherever the code is. The other modules of `analysis` are where they are imported from."""


@pytest.mark.parametrize("path", PATHS)
def test_known_paths_hand_on_the_thing_itself(path):
    for name in PATHS[path]:
        found = getattr(importlib.import_module(f"transformer_lens.{path}"), name)
        assert callable(found)
        home = importlib.import_module(type(found).__module__ if isinstance(found, PatchSweep) else found.__module__)
        assert getattr(home, name) is found
