"""The house rules that a reader relies on, checked on the syntax trees (README, Files)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(ROOT.glob("*.py"))
OTHERS = sorted([*ROOT.glob("tests/*.py"), *ROOT.glob("benchmarks/*.py")])
FLOORS = [
    "data",
    "ranks",
    "models",
    "runs",
    "prepare",
    "sandbox",
    "common",
    "predictions",
    "intervals",
    "lm_tasks",
    "judge",
    "plots",
    "baselines",
    "sftmix",
    "dynamix_sft",
    "dynamics",
    "eval",
]
LONGEST_FUNCTION, MOST_PARAMETERS, LONGEST_CLOSURE = 60, 6, 4
# The loops, and functions that do nothing but declare flags.
MAY_BE_LONG = {"train", "add_shared_flags", "parse_args"}
# People copy these; their parameters are the paper's quantities.
PUBLIC_EQUATIONS = {"sftmix_loss", "sftmix_loss_reference", "solve_mixture"}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def parameters(function):
    arguments = function.args
    return [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


def lines(node):
    return node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("path", [*SOURCES, *OTHERS], ids=lambda path: path.name)
def test_functions_are_short(path):
    long = [f"{f.name} {lines(f)}" for f in functions(tree_of(path)) if lines(f) > LONGEST_FUNCTION]
    assert not [text for text in long if text.split()[0] not in MAY_BE_LONG]


@pytest.mark.parametrize("path", [*SOURCES, *OTHERS], ids=lambda path: path.name)
def test_parameters_are_few(path):
    found = []
    for function in functions(tree_of(path)):
        if function.name.startswith("test_"):
            continue  # fixtures and parametrised values
        own = [name for name in parameters(function) if name not in ("self", "ctx", "cls")]
        if len(own) > MOST_PARAMETERS and function.name not in PUBLIC_EQUATIONS:
            found.append(f"{function.name} {len(own)}")
    assert not found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_closures_are_small(path):
    for function in functions(tree_of(path)):
        inner = [node for node in functions(function) if node is not function]
        assert all(lines(node) <= LONGEST_CLOSURE + 1 for node in inner), function.name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_expressions_are_simple(path):
    """No conditional expression inside another, one comprehension a statement."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.IfExp):
            nested = [n for n in ast.walk(node) if isinstance(n, ast.IfExp) and n is not node]
            assert not nested, f"{path.name}:{node.lineno}"
        if isinstance(node, ast.stmt) and not hasattr(node, "body"):
            count = sum(isinstance(n, COMPREHENSIONS) for n in ast.walk(node))
            assert count <= 1, f"{path.name}:{node.lineno}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_public_functions_have_type_hints(path):
    bare = []
    for node in tree_of(path).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            hinted = node.returns is not None or any(a.annotation for a in node.args.args)
            bare += [] if hinted or node.name == "main" else [node.name]
    assert not [name for name in bare if name not in PUBLIC_EQUATIONS]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_imports_run_one_way(path):
    """data <- common <- the scripts; plots and baselines beside them. Heavy libraries are imported
    where they are used, so that --help answers as soon as torch is there."""
    imported = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    own = {name for name in imported if name in FLOORS}
    floor = FLOORS.index(path.stem)
    assert all(FLOORS.index(name) < floor for name in own)
    assert not own & {"sftmix", "dynamix_sft", "dynamics", "eval"}
    assert path.stem != "plots" or own <= {"data"}
    top = {n for node in tree_of(path).body for n in names_imported(node)}
    assert not top & {"transformers", "datasets", "peft", "matplotlib", "lm_eval", "scipy"}


def names_imported(node):
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    return [node.module.split(".")[0]] if isinstance(node, ast.ImportFrom) else []


def test_nothing_cites_what_is_not_here():
    text = "".join(path.read_text(encoding="utf-8") for path in SOURCES)
    text += "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))
    assert "METHODS.md" not in text
