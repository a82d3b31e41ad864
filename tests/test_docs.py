"""README.md and docs/ name functions, files, figures and flags that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "docs/sftmix.md", "docs/dynamix_sft.md", "docs/dynamics.md"]
SCRIPTS = ["sftmix.py", "dynamix_sft.py", "dynamics.py", "eval.py", "plots.py"]
MODULES = "common|data|plots|sftmix|dynamix_sft|dynamics"


def read(path):
    return (ROOT / path).read_text(encoding="utf-8")


def names_in(path):
    """Functions, methods, classes and constants that a file defines."""
    tree = ast.parse(read(path))
    kinds = ast.FunctionDef, ast.ClassDef
    names = {node.name for node in ast.walk(tree) if isinstance(node, kinds)}
    for node in tree.body:
        for target in getattr(node, "targets", []):
            names |= {part.id for part in ast.walk(target) if isinstance(part, ast.Name)}
    return names


def named_functions(page):
    """-> [(file, name)] of `file.py: name` and `module.name`; and of names without a file in the
    brackets that follow a numbered item's title, where a file holds until the next is named.
    Constants are the page's own file's."""
    text, own = read(page), Path(page).stem + ".py"
    pairs = re.findall(r"`([\w/]+\.py): (\w+)`", text)
    pairs += [(f"{module}.py", name) for module, name in re.findall(rf"`({MODULES})\.(\w+)`", text)]
    pairs = [(file, name) for file, name in pairs if name != "py"]
    for brackets in re.findall(r"^\d+\. \*\*[^*]+\*\* \(([^)]*)\)", text, re.M):
        file = own
        for code in re.findall(r"`([^`]+)`", brackets):
            match = re.fullmatch(r"(?:([\w/]+\.py): )?(\w+)", code)
            if match:
                file = match[1] or file
                pairs.append((file, match[2]))
    pairs += [(own, constant) for constant in re.findall(r"`([A-Z]+_?[A-Z]+)`", text)]
    return sorted(set(pairs))


def flags_in(path):
    """Flags that a file gives a parser: first arguments "--name" of a call."""
    flags = set()
    for node in ast.walk(ast.parse(read(path))):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        flag = getattr(node.args[0], "value", None)
        if isinstance(flag, str) and re.fullmatch(r"--[a-z]\w*", flag):
            flags.add(flag)
            if "BooleanOptionalAction" in ast.unparse(node):
                flags.add(f"--no-{flag[2:]}")
    return flags


def flags_for(page):
    """Flags that a page may name: those of its method's script and benchmarks, and of plots.py; on
    README.md and docs/eval.md those of all scripts."""
    name = Path(page).stem + ".py"
    shared = ["common.py", "plots.py", "benchmarks/speed.py", "benchmarks/batches.py"]
    shared.append("benchmarks/real.py")
    paths = [*shared, name, f"benchmarks/{name}"]
    if name in ("README.py", "eval.py", "reliability.py", "distributed.py"):
        paths = ["common.py", *SCRIPTS]
    if name == "performance.py":
        paths = ["common.py", "benchmarks/speed.py", "dynamics.py"]
    return set().union(*map(flags_in, paths))


@pytest.mark.parametrize("page", PAGES[1:])
def test_named_functions_exist(page):
    pairs = named_functions(page)
    missing = [f"{file}: {name}" for file, name in pairs if name not in names_in(file)]
    assert not missing
    assert len(pairs) >= 12


def test_imports_in_readme_exist():
    found = re.findall(r"`?from (\w+) import ([\w, ]+)", read("README.md"))
    assert found
    for module, names in found:
        assert set(names.split(", ")) <= names_in(f"{module}.py")


@pytest.mark.parametrize("page", [*PAGES, "docs/performance.md"])
def test_named_files_exist(page):
    files = set(re.findall(r"`((?:benchmarks/|tests/)?\w+\.(?:py|sh))[`:]", read(page)))
    files |= set(re.findall(r"python ((?:benchmarks/)?\w+\.py)", read(page)))
    assert files
    in_benchmarks = {file for file in files if (ROOT / "benchmarks" / file).exists()}
    assert not [file for file in files - in_benchmarks if not (ROOT / file).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_shown_figures_are_there(page):
    """Pictures on a page are files of the repository, small ones."""
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", read(page)):
        assert (ROOT / page).parent.joinpath(path).stat().st_size < 100_000


@pytest.mark.parametrize("page", PAGES)
def test_named_figures_are_drawn(page):
    figures = re.findall(r"`(\w+)\.png`", read(page))
    assert not [name for name in figures if f"plot_{name}" not in names_in("plots.py")]


# of FastChat and alpaca_eval, pip, run.sh
OTHER_FLAGS = {"--first-n", "--reference_outputs", "--fn_metric", "--sort_by"}
OTHER_FLAGS |= {"--index-url", "--list"}
MORE_PAGES = ["docs/eval.md", "docs/reliability.md", "docs/distributed.md", "docs/performance.md"]


@pytest.mark.parametrize("page", [*PAGES, *MORE_PAGES])
def test_flags_exist(page):
    others = r"-m pytest .*|--standalone|--nproc_per_node \w+|-m fastchat.*|alpaca_eval --.*"
    text = re.sub(others + r"|lm_eval run --[^`\n]*", "", read(page))  # flags of other programs
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
    assert named
    assert not sorted(named - flags_for(page) - OTHER_FLAGS)


def test_github_runs_the_readmes_test_command():
    """The workflow takes the command out of README as .ci/run does."""
    cut = "command=$(sed -n '/^<!-- test command -->$/,/^```$/p' README.md | grep -v "
    for path in (".github/workflows/tests.yml", ".ci/run"):
        assert cut in read(path) and 'bash -euc "$command"' in read(path)


def test_citations_agree():
    """CITATION.cff and README's BibTeX name the same papers and authors."""
    readme = read("README.md").replace("{\\'e}", "é").replace("{", "").replace("}", "")
    for title in re.findall(r'^    title: "([^"]+)"', read("CITATION.cff"), re.M):
        assert title in readme
    authors = re.findall(r"family-names: (\w+), given-names: (\w+)", read("CITATION.cff"))
    assert len(authors) == 17
    for family, given in authors:
        assert f"{family}, {given}" in readme
