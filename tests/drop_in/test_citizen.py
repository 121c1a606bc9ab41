"""What a package owes those who use it in a notebook or an editor."""

import inspect
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import transformer_lens
from transformer_lens import TransformerBridge


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
