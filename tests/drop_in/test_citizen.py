"""What a package owes those who use it in a notebook or an editor."""

import inspect
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

import transformer_lens
from transformer_lens import TransformerBridge

ROOT = Path(__file__).resolve().parents[2]


def test_a_signature_says_what_can_be_passed():
    names = list(inspect.signature(TransformerBridge.run_with_cache).parameters)
    assert names[:3] == ["self", "input", "names_filter"]
    assert {"pos_slice", "incl_bwd", "stop_at_layer", "attention_mask", "return_cache_object"} <= set(names)


def test_short_representations_and_completions():
    bridge = TransformerBridge.boot_transformers("tiny-mixtral")
    text = repr(bridge)
    assert text.startswith(
        "TransformerBridge(tiny-mixtral: MixtralForCausalLM, 3 layers, d_model 128, 4 heads on 2 keys"
    )
    assert len(text) < 200 and f"{len(bridge.hook_dict)} hooks" in text
    _, cache = bridge.run_with_cache("Mary and")
    assert len(repr(cache)) < 200
    offered = cache._ipython_key_completions_()
    assert "blocks.0.attn.hook_pattern" in offered and "pattern" in offered
    for short in set(offered) - {*cache.cache_dict}:
        assert cache[short, 0] is not None


def test_it_is_typed_and_knows_its_version():
    assert (Path(transformer_lens.__file__).parent / "py.typed").exists()
    assert transformer_lens.__version__ == version("transformer-lens-bridge")


def test_files_of_the_other_package_are_noticed(tmp_path):
    here = Path(transformer_lens.__file__)
    (tmp_path / "transformer_lens").mkdir()
    (tmp_path / "transformer_lens" / "__init__.py").write_text(here.read_text())
    (tmp_path / "transformer_lens" / "HookedEncoder.py").touch()
    run = [sys.executable, "-c", "import transformer_lens"]
    found = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 1 and "pip uninstall both" in found.stderr


# -- what is said, and where -------------------------------------------------------------------------------


def test_loggers_have_one_name_above_them():
    for file in (ROOT / "transformer_lens").rglob("*.py"):
        for name in re.findall(r"getLogger\((.*?)\)", file.read_text()):
            assert name in ("__name__", '"transformer_lens"'), (file, name)


def said_by(code: str) -> tuple[str, list[str]]:
    """What importing prints, without times and numbers of processes."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = [re.sub(r"^W\d+ [\d:.]+ \d+ ", "", line) for line in run.stderr.splitlines()]
    return run.stdout, [line for line in lines if line.strip()]


@pytest.mark.slow
def test_importing_says_no_more_than_transformers_does():
    """torchao, where it is installed, speaks when transformers' models are imported, also without this package."""
    ours = said_by("import transformer_lens")
    assert ours == said_by("from transformers import PreTrainedModel") and ours[0] == ""


# -- the distribution --------------------------------------------------------------------------------------


def metadata():
    spec = spec_from_file_location("metadata", ROOT / "packaging" / "metadata.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_metadata_is_complete():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"authors", "license", "keywords", "classifiers", "requires-python", "description"} <= set(project)
    assert {"readme", "urls", "version"} == set(project["dynamic"])
    assert "Typing :: Typed" in project["classifiers"]
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {transformer_lens.__version__}" in citation and "authors:" in citation


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / "README.md").read_text())
    assert len(links) > 30 and [link for link in links if not (ROOT / link).exists()] == []


def test_links_become_absolute_where_the_repository_is_known(monkeypatch, tmp_path):
    pytest.importorskip("hatchling")
    hook = metadata()
    monkeypatch.setenv("REPOSITORY_URL", "git@example.org:us/lens.git")
    assert hook.address(tmp_path) == "https://example.org/us/lens"
    text = hook.absolute("![a](x/y.png) [b](docs/c.md#d) [e](https://f.g) [h](#i)", "https://example.org/us/lens")
    assert text == (
        "![a](https://example.org/us/lens/raw/main/x/y.png) [b](https://example.org/us/lens/blob/main/docs/c.md#d) "
        "[e](https://f.g) [h](#i)"
    )
    monkeypatch.delenv("REPOSITORY_URL")
    assert hook.address(tmp_path) == "", "a folder that is no repository"


def test_templates_of_issues_can_be_read():
    yaml = pytest.importorskip("yaml")
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert len(forms) == 5
    for form in forms:
        content = yaml.safe_load(form.read_text())
        if form.stem != "config":
            ids = [part["id"] for part in content["body"]]
            assert content["name"] and content["description"] and len(set(ids)) == len(ids) > 1
