"""How the program behaves in a shell: exit codes, streams, broken pipes, Ctrl-C, help without torch, completion."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import transformer_lens
from transformer_lens.cli import MISSING, running
from transformer_lens.cli.app import app
from transformer_lens.cli.hooks import complete_hook
from transformer_lens.cli.options import PUBLISHED, complete_model, quiet
from transformer_lens.cli.running import Commands, Debug
from transformer_lens.data import TINY_MODELS, tiny_model_path
from transformer_lens.model_bridge.supported_architectures import published

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, "-m", "transformer_lens_command"]


def invoke(*arguments: str, **options: str):
    return CliRunner().invoke(app, list(arguments), **options)


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "80", **more}


def start(*arguments: str, **options) -> subprocess.Popen[str]:
    # A test runner in the background may itself ignore SIGINT, and children inherit that.
    return subprocess.Popen(
        [*PROGRAM, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **options,
    )


# -- one process -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("hooks", "tiny-falcon", "hook_z"), 0, ""),
        (("hooks", "tiny-falcon", "no_such_name"), 1, "error: no hook of this model matches 'no_such_name'"),
        (("hooks", "tiny-falcn"), 1, "error: 'tiny-falcn' is no directory here"),
        (("verify", "tiny-falcon", "--dtype", "float31"), 2, "got 'float31', expected the name of a torch dtype"),
        (("verify", "tiny-falcon", "--dtype", "nn"), 2, "got 'nn', expected the name of a torch dtype"),
        (("generate", "tiny-falcon", "hi", "--device", "cdua"), 2, "got 'cdua', expected a device such as cpu, cuda"),
        (("demo", "--device", "cuda:x"), 2, "got 'cuda:x', expected a device"),
        (("verify", "tiny-falcon", "--device", "xla"), 1, "error: --device: xla cannot be used here: "),
        (("demo", "--device", "xla"), 1, "error: --device: xla cannot be used here: "),
        ((), 2, ""),
        (("hooks",), 2, "Missing argument"),
        (("hoks", "tiny-falcon"), 2, "No such command"),
        (("hooks", "tiny-falcon", "--jsn"), 2, "No such option"),
        (("generate", "tiny-falcon", "hi", "-n", "none"), 2, "Invalid value"),
    ],
)
def test_exit_codes(arguments: tuple[str, ...], code: int, says: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    # What was not understood comes in a box, which breaks lines.
    assert says in " ".join(result.stderr.replace("│", " ").split())
    assert (result.stdout == "") == (code != 0 and arguments != ())
    assert "Traceback" not in result.output


def faulty(error: BaseException) -> Commands:
    """A program with one command that fails."""
    program = Commands()

    @program.callback()
    def _global(debug: Debug = False) -> None:
        pass

    @program.command()
    def fail(debug: Debug = False) -> None:
        typer.echo("a result")
        raise error

    return program


@pytest.mark.parametrize("error", [ValueError("it [b]failed[/b]"), TypeError("it"), OSError("it"), ImportError("it")])
def test_what_a_user_can_put_right_is_a_sentence(error: Exception) -> None:
    result = CliRunner().invoke(faulty(error), ["fail"])
    assert (result.exit_code, result.stdout, result.stderr) == (1, "a result\n", f"error: {error}\n")


@pytest.mark.parametrize("arguments", [["--debug", "fail"], ["fail", "--debug"]])
def test_debug_before_or_after_the_command_keeps_the_error(arguments: list[str]) -> None:
    error = KeyError("here")
    assert CliRunner().invoke(faulty(error), arguments).exception is error


def test_a_key_error_is_not_quoted_and_an_empty_one_has_its_kind() -> None:
    assert CliRunner().invoke(faulty(KeyError("no 'x'")), ["fail"]).stderr == "error: no 'x'\n"
    assert CliRunner().invoke(faulty(RuntimeError()), ["fail"]).stderr == "error: RuntimeError\n"


def test_a_long_error_stays_one_line_in_a_file() -> None:
    assert CliRunner().invoke(faulty(ValueError("word " * 100)), ["fail"]).stderr.count("\n") == 1


def test_ctrl_c_is_130_and_an_exit_code_stays_itself() -> None:
    result = CliRunner().invoke(faulty(KeyboardInterrupt()), ["fail"])
    assert (result.exit_code, result.stderr) == (130, "\ninterrupted\n")
    assert CliRunner().invoke(faulty(typer.Exit(7)), ["fail"]).exit_code == 7
    assert CliRunner().invoke(faulty(typer.BadParameter("no")), ["fail"]).exit_code == 2


def test_an_unexpected_error_says_that_it_is_ours(capsys: pytest.CaptureFixture[str]) -> None:
    running.explain(IndexError, IndexError("list index"), None)
    assert capsys.readouterr().err == (
        "error: IndexError: list index\nThis is a fault of transformer_lens; --debug shows where.\n"
    )
    running.explain(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("debug", [True, False])
def test_debug_leaves_unexpected_errors_to_python(debug: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sys.excepthook
    monkeypatch.setattr(sys, "excepthook", before)
    monkeypatch.setattr(sys, "argv", ["transformer-lens", *(["--debug"] if debug else []), "fail"])
    with pytest.raises(IndexError):
        running.run(faulty(IndexError("list index")))
    assert sys.excepthook is (before if debug else running.explain)


def test_the_installed_program_is_this_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["scripts"] == {"transformer-lens": "transformer_lens_command:main"}
    shipped = project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    assert shipped == ["transformer_lens", "transformer_lens_command.py"]
    assert all((ROOT / name).exists() for name in shipped)
    result = invoke("--version")
    assert project["project"]["dynamic"] == ["version", "readme", "urls"]
    assert result.stdout == f"transformer-lens-bridge {transformer_lens.__version__}\n"


def test_warnings_are_sentences_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    before = warnings.showwarning
    with running.warnings_in_a_line():
        warnings.simplefilter("always")
        warnings.warn("mind [this]", stacklevel=1)
    assert capsys.readouterr().err == "warning: mind [this]\n"
    assert warnings.showwarning is before


def test_transformers_is_quiet_while_nobody_watches_and_as_before_afterwards() -> None:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    with quiet():
        assert not logging.is_progress_bar_enabled()
        assert logging.get_verbosity() == logging.ERROR
    assert logging.is_progress_bar_enabled()
    assert logging.get_verbosity() == logging.INFO
    logging.set_verbosity(level)
    logging.disable_progress_bar()
    with quiet():
        pass
    assert not logging.is_progress_bar_enabled()
    logging.enable_progress_bar()


def test_the_names_for_completion_are_those_there_are() -> None:
    assert set(PUBLISHED) == set(published.PUBLISHED)


def test_models_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "more" / "inner").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    (tmp_path / ".hidden").mkdir()
    assert complete_model("") == [*TINY_MODELS, "model", "more/"]
    assert complete_model("tiny-f") == ["tiny-falcon"]
    assert complete_model("more/") == ["more/inner/"]
    assert complete_model(f"{tmp_path}/mod") == [f"{tmp_path}/model"]
    assert complete_model("nowhere/at") == []


def test_hooks_are_completed_where_nothing_has_to_be_fetched() -> None:
    class Context:
        def __init__(self, model: str | None, *arguments: str) -> None:
            self.params, self.args = {"model": model}, list(arguments)

    found = complete_hook(Context("tiny-falcon"), "blocks.0.attn.hook_rot")
    assert found == ["blocks.0.attn.hook_rot_q", "blocks.0.attn.hook_rot_k"]
    assert complete_hook(Context(str(tiny_model_path("tiny-mixtral"))), "blocks.0.mlp.hook_expert_o")
    assert complete_hook(Context("somebody/a-model"), "") == []
    assert complete_hook(Context(None), "") == []
    assert complete_hook(Context(None, "tiny-falcon"), "hook_e") == ["hook_embed"]


# -- real processes --------------------------------------------------------------------------------


def test_help_does_not_wait_for_torch() -> None:
    program = (
        "import sys, transformer_lens_command\n"
        "sys.argv = ['transformer-lens', *sys.argv[1:]]\n"
        "try:\n    transformer_lens_command.main()\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "sys.stderr.write(','.join({'torch', 'transformers', 'plotly', 'numpy'} & set(sys.modules)))\n"
    )
    for arguments in (["--help"], ["generate", "--help"], ["patch", "--help"]):
        command = [sys.executable, "-c", program, *arguments]
        result = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True, cwd="/")
        assert "transformer-lens" in result.stdout
        assert result.stderr == ""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("transformer-lens ", {"demo", "info", "hooks", "verify", "generate", "patch"}),
        ("transformer-lens generate tiny-", {"tiny-falcon", "tiny-mixtral"}),
        ("transformer-lens info falcon-1", {"falcon-11b", "falcon-180b"}),
        ("transformer-lens patch tiny-falcon --what head_", {f"head_{x}" for x in ("out", "q", "k", "v", "pattern")}),
        ("transformer-lens generate x --dtype bf", {"bfloat16"}),
        (
            "transformer-lens generate tiny-falcon --steer-at blocks.0.attn.hook_rot_",
            {"blocks.0.attn.hook_rot_q", "blocks.0.attn.hook_rot_k"},
        ),
    ],
)
def test_the_tab_key(words: str, expected: set[str]) -> None:
    asked = {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}
    result = subprocess.run(
        PROGRAM,
        capture_output=True,
        text=True,
        env=environment(_TRANSFORMER_LENS_COMPLETE="complete_bash", **asked),
        check=False,
        cwd="/",
    )
    found = set(result.stdout.split())
    assert found == expected or (words == "transformer-lens " and found >= expected), result.stderr


def test_json_alone_is_on_stdout_and_remarks_are_on_stderr(tmp_path: Path) -> None:
    command = [*PROGRAM, "generate", "tiny-falcon", "Mary and", "-n", "1", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["results"][0]["prompt"] == "Mary and"
    assert result.stderr == ""
    command[2] = "transformer_lens"
    command[4] = str(tmp_path / "nothing")
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert "error: " in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("arguments", [("hooks", "tiny-falcon"), ("hooks", "tiny-falcon", "--json")])
def test_a_reader_that_goes_away_is_no_error(arguments: tuple[str, ...]) -> None:
    with start(*arguments) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(60) == 141


ENDLESS = (
    "generate",
    "tiny-falcon",
    "Mary and John",
    "--stream",
    "-n",
    "1000000",
    "--no-stop-at-eos",
    "--no-prepend-bos",
)


def test_ctrl_c_in_the_middle() -> None:
    with start(*ENDLESS) as process:
        assert process.stdout.read(20).startswith("Mary and John")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
        assert (process.returncode, said) == (130, "\ninterrupted\n")


def test_a_stream_ends_with_its_reader() -> None:
    with start(*ENDLESS) as process:
        assert process.stdout.read(20).startswith("Mary and John")
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == ""


def test_without_the_extra() -> None:
    program = "import sys; sys.modules['typer'] = None\nimport transformer_lens_command as c; c.main()"
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False, cwd="/")
    assert (result.returncode, result.stdout, result.stderr) == (2, "", MISSING)
