"""constraints.txt pins what pyproject.toml asks for, says nothing of a machine, and is held to what is installed."""

import re
import tomllib

import pytest
from packaging.requirements import Requirement

from benchmarks import pinned, versions
from transformer_lens.model_bridge import supported_versions

TEXT = pinned.CONSTRAINTS.read_text()
PROJECT = tomllib.loads(pinned.PROJECT.read_text())
PINNED = pinned.pins(TEXT)


def project(*dependencies, **extras):
    """A pyproject.toml with these requirements."""
    return {
        "project": {"name": "ours", "dependencies": list(dependencies), "optional-dependencies": extras},
        "build-system": {"requires": ["hatchling"]},
    }


def test_everything_that_is_asked_for_is_pinned_as_asked():
    # What is installed here may be another release (`make test-oldest`): only the file is looked at.
    asked = [each for each in pinned.declared(PROJECT) if each.name != PROJECT["project"]["name"]]
    assert len(asked) > 30
    for each in asked:
        assert each.specifier.contains(PINNED[pinned.canonicalize_name(each.name)])


def test_the_file_holds_on_every_machine():
    """Names, releases and markers: no path, no address, no second release for one name."""
    lines = [line for line in TEXT.splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9a-z.]+( ; \(?[a-z_]+ .*)?", line) for line in lines)
    names = [line.partition("==")[0] for line in lines]
    assert len(set(names)) == len(names)
    assert not re.search(r"//|\\|file:|--", TEXT)


def test_what_starts_the_resolve_is_in_the_result():
    started = (pinned.REPOSITORY / "constraints.in").read_text()
    for line in filter(None, (line.partition("#")[0].strip() for line in started.splitlines())):
        requirement = Requirement(line)
        assert requirement.specifier.contains(PINNED[requirement.name])


def test_file_range_and_the_releases_that_do_not_warn_agree():
    tested = range_of = versions.transformers_range().specifier
    assert supported_versions.minor(PINNED["transformers"]) == supported_versions.minor(supported_versions.NEWEST)
    assert tested.contains(supported_versions.OLDEST) and tested.contains(supported_versions.NEWEST)
    assert versions.oldest().transformers == supported_versions.OLDEST
    assert not range_of.contains("6.0.0")


def test_a_package_that_is_not_pinned_is_named_with_who_needs_it():
    without = {name: version for name, version in PINNED.items() if name not in ("pluggy", "hatchling")}
    assert pinned.problems(without, project("pytest")) == [
        "hatchling, which pyproject.toml needs, is not pinned: run `make constraints`",
        "pluggy, which pytest needs, is not pinned: run `make constraints`",
    ]


def test_an_extra_of_a_dependency_is_followed():
    """`coverage[toml]` of pytest-cov, and what is only installed for another system is not asked for."""
    asked = {f"{requirement.name}" for requirement, _ in pinned.needed([Requirement("pytest-xdist[psutil]")])}
    assert {"pytest-xdist", "psutil", "execnet", "pytest", "pluggy"} <= asked
    assert "setproctitle" not in asked and "colorama" not in asked


@pytest.mark.parametrize("where", ["dependencies", "an extra"])
def test_a_pin_outside_of_the_range_is_named(where):
    asked = project("pluggy>=99") if where == "dependencies" else project(some=["pluggy>=99"])
    assert pinned.problems(PINNED, asked) == [
        f"pluggy is pinned to {PINNED['pluggy']} and pyproject.toml asks for >=99: run `make constraints`"
    ]


def test_another_release_than_the_pinned_one_is_named():
    here = pinned.installed("pluggy")
    assert pinned.problems(PINNED | {"pluggy": "1.0"}, project("pluggy")) == [
        f"pluggy is pinned to 1.0 and {here} is installed: run `make setup`, or `make clean` first"
    ]


def test_a_pin_for_another_machine_does_not_count_here():
    assert pinned.pins("a==1 ; python_version < '3'\nB_c==2  # why\n# d==3\n") == {"b-c": "2"}


def test_a_build_for_one_kind_of_machine_is_the_same_release():
    import torch

    assert pinned.installed("torch") == torch.__version__.partition("+")[0]
    assert pinned.installed("no-such-package") is None


# -- other releases beside the pinned ones -------------------------------------------------------------


def test_only_what_moves_with_a_package_is_let_go():
    text = "cuda-x==1\nnvidia-y==1\ntokenizers==1\ntorch==2.13.0\ntorchao==1\ntransformers==5.24.0\ntriton==1\n"
    assert versions.loosened(text, ["torch"]) == "tokenizers==1\ntorchao==1\ntransformers==5.24.0\n"
    assert versions.loosened(text, ["transformers"]) == "cuda-x==1\nnvidia-y==1\ntorch==2.13.0\ntorchao==1\ntriton==1\n"
    assert versions.loosened(text, []) == text


def test_a_case_is_the_pinned_releases_but_for_what_it_names():
    case = versions.Case(".venv-x", python="3.12", torch="2.11.0")
    assert case.asked == {"python": "3.12", "torch": "2.11.0", "transformers": PINNED["transformers"]}
    assert case.moved == ["torch"]


def test_the_cases_of_the_matrix_differ():
    asked = [tuple(case.asked.values()) for case in (versions.Case(), versions.oldest(), *versions.MATRIX)]
    assert len(set(asked)) == len(asked)
    homes = {case.home for case in versions.MATRIX}
    assert ".venv" not in homes and all(home.startswith(".venv-") for home in homes)


def test_a_refusal_is_kept_in_the_words_of_what_refused():
    printed = """Collecting torch==2.15.0
    INFO: pip is looking at multiple versions of torch
    WARNING: The candidate selected for download is a yanked version
    The conflict is caused by:
        The user requested torch==2.15.0
        The user requested (constraint) torch<=2.14.1
        accelerate 1.15.0 depends on torch>=2.0.0
    ERROR: Cannot install torch==2.15.0 because these package versions have conflicting dependencies.
    ERROR: ResolutionImpossible: for help visit a page"""
    assert versions.refusal(printed).splitlines() == [
        "The user requested torch==2.15.0",
        "The user requested (constraint) torch<=2.14.1",
        "accelerate 1.15.0 depends on torch>=2.0.0",
        "ERROR: Cannot install torch==2.15.0 because these package versions have conflicting dependencies.",
    ]
    with pytest.raises(versions.NotInstalled, match="no python2.99 was found"):
        versions.interpreter("2.99")
    with pytest.raises(versions.NotInstalled, match="ERROR: .*no-such-file"):
        versions.pip(versions.Path(versions.sys.executable), "install", "--no-index", "./no-such-file.whl")
