"""Notebooks: what is stored is what the sources say, the model is one line, no cell knows the small models' sizes."""

import ast
import json
import re
from pathlib import Path

import nbformat
import pytest
import torch
from transformers import AutoTokenizer, FalconConfig, FalconForCausalLM, MixtralConfig, MixtralForCausalLM

from demos import build_notebooks
from transformer_lens.data import tiny_model_path
from transformer_lens.viz import Picture

NAMES = build_notebooks.NAMES
SUBJECTS = [
    "main_demo",
    "indirect_object",
    "patching",
    "steering",
    "experts",
    "generation",
    "lora",
    "graph",
    "dictionar",
]
every_notebook = pytest.mark.parametrize("name", NAMES)


def code(name: str) -> list[str]:
    return [cell.source for cell in build_notebooks.notebook(name).cells if cell.cell_type == "code"]


def test_there_are_nine():
    assert [any(subject in name for name in NAMES) for subject in SUBJECTS] == [True] * 9 and len(NAMES) == 9
    assert sorted(path.stem for path in build_notebooks.DEMOS.glob("*.ipynb")) == NAMES


@every_notebook
def test_what_is_stored_is_what_the_source_says(name):
    stored, made = build_notebooks.stored(name), build_notebooks.notebook(name)
    nbformat.validate(stored)
    assert [(cell.cell_type, cell.source) for cell in stored.cells] == [
        (cell.cell_type, cell.source) for cell in made.cells
    ], f"run: python demos/build_notebooks.py write {name}"


@every_notebook
def test_what_is_stored_ran_and_is_light(name):
    cells = [cell for cell in build_notebooks.stored(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert kinds == {"image/png", "text/plain"}
    assert (build_notebooks.DEMOS / f"{name}.ipynb").stat().st_size < 400_000


@every_notebook
def test_the_model_is_one_line(name):
    first, *rest = code(name)
    assert re.fullmatch(r'MODEL = "tiny-(falcon|mixtral)"  # or "[^"\n]+/[^"\n]+"(, "[^"\n]+/[^"\n]+")?', first)
    assert "mistralai/Mixtral-8x7B-v0.1" in first and ("tiny-mixtral" in first or "tiiuae/falcon-7b" in first)
    assert not [cell for cell in rest if "tiny-" in cell or re.search(r"\bMODEL\s*=[^=]", cell)]
    assert sum(len(re.findall(r"\bMODEL\b", cell)) for cell in rest) == 1


@every_notebook
def test_no_cell_names_a_layer_or_head_by_its_number(name):
    for cell in code(name):
        assert not re.search(r"blocks\.\d", cell), cell
        assert not re.search(r"n_(layers|heads|experts)\s*=\s*\d", cell), cell
        assert not re.search(r"cache\[\"[a-z_]+\", \d", cell), cell


@every_notebook
def test_a_finding_is_asserted_in_plain_sight(name):
    cells = build_notebooks.notebook(name).cells
    said = next(place for place, cell in enumerate(cells) if "**Finding.**" in cell.source)
    after = [cell.source for cell in cells[said + 1 :] if cell.cell_type == "code"]
    assert any(isinstance(node, ast.Assert) for cell in after for node in ast.parse(cell).body)


# -- another model ------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["falcon", "mixtral"])
def another_model(request, tmp_path_factory) -> Path:
    """Random weights in bfloat16, in a layout and of sizes that neither small model has."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path("tiny-falcon"))
    special = {kind: getattr(tokenizer, kind) for kind in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if request.param == "falcon":  # that of falcon-7b: one key for all heads, one norm
        model = FalconForCausalLM(
            FalconConfig(
                vocab_size=len(tokenizer),
                hidden_size=48,
                num_hidden_layers=5,
                num_attention_heads=6,
                multi_query=True,
                new_decoder_architecture=False,
                parallel_attn=True,
                alibi=False,
                bias=False,
                **special,
            )
        )
    else:
        model = MixtralForCausalLM(
            MixtralConfig(
                vocab_size=len(tokenizer),
                hidden_size=48,
                intermediate_size=32,
                num_hidden_layers=5,
                num_attention_heads=6,
                num_key_value_heads=3,
                num_local_experts=5,
                num_experts_per_tok=3,
                **special,
            )
        )
    path = tmp_path_factory.mktemp(request.param)
    model.to(torch.bfloat16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@every_notebook
def test_another_model_runs_to_the_end(name, another_model, monkeypatch, tmp_path):
    """All but the findings, which are those of the small models."""
    if "experts" in name and "mixtral" not in another_model.name:
        pytest.skip("this notebook is about experts, and Falcon has none")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    first, *rest = code(name)
    alternative = first.split('"')[1]
    try:
        for cell in [first.replace(alternative, str(another_model)), *rest]:
            body = [node for node in ast.parse(cell).body if not isinstance(node, ast.Assert)]
            shown = body.pop() if body and isinstance(body[-1], ast.Expr) else None
            exec(compile(ast.Module(body, []), name, "exec"), namespace)
            if shown is not None:
                found = eval(compile(ast.Expression(shown.value), name, "eval"), namespace)
                if isinstance(found, Picture):
                    found.drawing()
    finally:
        torch.set_grad_enabled(True)


# -- what runs them -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source, complaint",
    [
        ("1 / 0", "ZeroDivisionError"),
        ("import warnings\nwarnings.warn('mind the gap')", "mind the gap"),
        ("import sys\nprint('oh', file=sys.stderr)", "oh"),
        ("assert False, 'the finding is gone'", "the finding is gone"),
    ],
)
def test_a_notebook_that_fails_or_warns_is_an_error(source, complaint):
    made = nbformat.v4.new_notebook(cells=list(build_notebooks.cells(f"# %%\n{source}\n")))
    with pytest.raises(build_notebooks.NotebookError, match=complaint):
        build_notebooks.execute(made, "made up")


def test_a_quiet_notebook_passes_and_is_stored_light():
    source = "# %% [markdown]\n# # Title\n#\n# prose\n\n# %%\nprint(1 + 1)\n"
    made = nbformat.v4.new_notebook(cells=list(build_notebooks.cells(source)))
    assert [cell.source for cell in made.cells] == ["# Title\n\nprose", "print(1 + 1)"]
    assert build_notebooks.execute(made, "made up") > 0
    build_notebooks.lighten(made)
    assert made.cells[1].outputs[0].text == "2\n"
    json.dumps(made)
