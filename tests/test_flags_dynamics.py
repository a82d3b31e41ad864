"""DynaMiCS: what every flag changes, as numbers that are worked out here from what a short run was
seen to do, and float64 oracles of the slopes and of the solver."""

import copy
import json
import math
import time
from functools import partial
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.optimize
import torch
import transformers
from conftest import own_logits, plain, plain_text, read_json, records, same, weights

import common
import data
import dynamics
import plots
import runs

TOLERANCE = 1e-4


# ------------------------------------------------------------------------ the solver


def simplex_grid(parts):
    """All mixtures of three datasets in steps of 1 / parts -> (points, 3)"""
    points = [(i, j, parts - i - j) for i, j in product(range(parts + 1), repeat=2)]
    return np.array([point for point in points if point[2] >= 0]) / parts


def test_penalised_and_its_gradient():
    """g·w + λ Σ max(0, a w + b + ε)² over 1 + λ, term by term, and finite differences, where some
    constraints hold and some do not."""
    rng = np.random.default_rng(0)
    active = []
    for epsilon, lam in product((0.0, 0.3), (1.0, 100.0)):
        w, g = rng.dirichlet(np.ones(4)), rng.normal(size=4)
        a, b = rng.normal(size=(5, 4)), 0.5 * rng.normal(size=5)

        value, gradient = dynamics.penalised(w, g, a, b, epsilon, lam)
        total = sum(g[j] * w[j] for j in range(4))
        for i in range(5):
            above = sum(a[i, j] * w[j] for j in range(4)) + b[i] + epsilon
            active.append(above > 0)
            total += lam * (above**2 if above > 0 else 0)
        assert value == pytest.approx(total / (1 + lam))
        for j, step in enumerate(1e-6 * np.eye(4)):
            up = dynamics.penalised(w + step, g, a, b, epsilon, lam)[0]
            down = dynamics.penalised(w - step, g, a, b, epsilon, lam)[0]
            assert gradient[j] == pytest.approx((up - down) / 2e-6, rel=1e-5, abs=1e-7)
    assert 5 < sum(active) < 15


def hinges(rng):
    """A random penalised problem of three datasets -> function of w."""
    g, a, b = rng.normal(size=3), rng.normal(size=(2, 3)), 0.3 * rng.normal(size=2)
    return lambda w: dynamics.penalised(w, g, a, b, 0.0, 100.0)


def unreliable(solver, calls, function, start, **options):
    """SLSQP that first stays where it is, then returns NaN, then works."""
    calls.append(start)
    found = {1: start, 2: np.full(3, np.nan)}.get(len(calls) % 3)
    return solver(function, start, **options) if found is None else SimpleNamespace(x=found)


@pytest.mark.parametrize("stuck", [False, True])
def test_minimise_on_simplex(monkeypatch, stuck):
    """No point of a grid is lower; also where SLSQP stops too early and it takes another start."""
    rng, grid, solver = np.random.default_rng(1), simplex_grid(60), scipy.optimize.minimize
    if stuck:
        monkeypatch.setattr(scipy.optimize, "minimize", partial(unreliable, solver, []))
    for _ in range(12):
        function, start = hinges(rng), np.array([0.9, 0.1, 0.0])
        w = dynamics.minimise_on_simplex(function, start, 1e-4)
        assert w.min() >= 0
        assert w.sum() == pytest.approx(1, abs=1e-12)
        assert function(w)[0] <= min(function(point)[0] for point in grid) + 1e-6


def random_problem(rng, room):
    """Two targets, three constraints, three datasets. The levels leave `room` to a random mixture
    -> the arguments of solve_mixture."""
    slopes, horizon = 1e-2 * rng.normal(size=(5, 3)), int(rng.integers(5, 200))
    losses = rng.uniform(0.5, 3, 5)
    reference = losses + horizon * slopes @ rng.dirichlet(np.full(3, 0.5)) + room
    return losses, slopes, reference, [3, 0], [1, 4, 2], horizon


def on_grid(problem, w):
    """Σ_T (S w)_i and Σ_C max(0, L_i + H (S w)_i - L_ref_i)² of mixtures (points, 3), and their
    largest excess."""
    losses, slopes, reference, targets, constraints, horizon = problem
    objective, square, largest = 0.0, 0.0, -math.inf
    for i in targets:
        objective = objective + w @ slopes[i]
    for i in constraints:
        excess = losses[i] + horizon * (w @ slopes[i]) - reference[i]
        square = square + np.where(excess > 0, excess, 0) ** 2
        largest = np.maximum(largest, excess)
    return objective, square, largest


def test_the_mixture_against_a_grid():
    """Where a mixture of the grid keeps all levels the solution does, and no such mixture lowers
    the targets more; where none does, none is less above the levels, in squares."""
    rng, grid, outcomes = np.random.default_rng(2), simplex_grid(80), []
    for number in range(30):
        problem = random_problem(rng, [0.0, 0.02, -0.3][number % 3])
        w, info = dynamics.solve_mixture(*problem)
        objective, square, largest = on_grid(problem, grid)
        own, own_square, own_largest = on_grid(problem, w[None])
        assert info["objective"] == pytest.approx(own[0])
        assert (info["violation"] @ info["violation"]) == pytest.approx(own_square[0])
        losses, slopes, _, _, _, horizon = problem
        assert info["predicted"] == pytest.approx(losses + horizon * slopes @ w)
        assert info["feasible"] == (own_largest[0] <= TOLERANCE)
        outcomes.append(info["feasible"])
        if (largest <= 0).any():
            assert info["feasible"]
        if info["feasible"]:
            spread = np.ptp(slopes[[3, 0]].sum(0))
            allowed = objective[largest <= 0].min(initial=math.inf)
            assert own[0] <= allowed + 0.02 * spread
        else:
            assert own_square[0] <= 1.001 * square.min() + 1e-9
    assert 5 < sum(outcomes) < 25


def equation(problem, info, w):
    """The paper's penalised objective of mixtures (points, 3) with the λ and ε of info."""
    losses, slopes, reference, targets, constraints, horizon = problem
    value = 0.0
    for i in targets:
        value = value + w @ slopes[i]
    for i in constraints:
        excess = losses[i] + horizon * (w @ slopes[i]) - reference[i] + info["epsilon"]
        value = value + info["lambda"] * np.where(excess > 0, excess, 0) ** 2
    return value


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_lambda_and_epsilon_are_those_of_the_equation(scale):
    """w minimises Σ_T (S w)_i + λ Σ_C max(0, L^_i - L_ref_i + ε)² for the λ and ε of info: nothing
    is lower on the way to any point of a grid. Large losses need ε > 0."""
    rng, grid, epsilons = np.random.default_rng(3), simplex_grid(40), []
    for _ in range(10):
        losses, slopes, reference, *others = random_problem(rng, 0.0)
        problem = scale * losses, scale * slopes, scale * reference, *others
        w, info = dynamics.solve_mixture(*problem)
        own, spread = equation(problem, info, w[None])[0], np.ptp(problem[1][others[0]].sum(0))
        for part in np.logspace(-6, 0, 25):
            points = w + part * (grid - w)
            assert own <= equation(problem, info, points).min() + 0.01 * spread
        epsilons.append(info["epsilon"])
    assert (max(epsilons) > 0) == (scale > 1)


def test_the_scale_of_the_targets_does_not_matter():
    """Targets' slopes in any unit, and H against S: the same mixture."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        losses, slopes = rng.uniform(1, 3, 4), rng.normal(0, 0.01, (4, 3))
        own, info = dynamics.solve_mixture(losses, slopes, losses, [0, 1], [2, 3], 50)
        for scale in (1e-3, 1e3):
            other = np.concatenate([slopes[:2] * scale, slopes[2:]])
            found, more = dynamics.solve_mixture(losses, other, losses, [0, 1], [2, 3], 50)
            assert found == pytest.approx(own, abs=1e-9)
            assert more["feasible"] == info["feasible"]
        found, _ = dynamics.solve_mixture(losses, 10 * slopes, losses, [0, 1], [2, 3], 5)
        assert found == pytest.approx(own, abs=1e-9)


@pytest.mark.parametrize("k", [0.125, 64.0])
def test_units_do_not_matter(monkeypatch, k):
    """Losses, levels, slopes and the tolerance in other units, or slopes of k times the size for an
    interval of 1 / k of the steps, give the same mixture; bit for bit, since k is a power of 2."""
    rng, solve = np.random.default_rng(4), dynamics.solve_mixture
    epsilons = []
    for number in range(9):
        room, unit = [0.02, 0.0, -0.3][number % 3], [1.0, 1024.0][number % 2]
        losses, slopes, reference, *roles, horizon = random_problem(rng, room)
        losses, slopes, reference = unit * losses, unit / 64 * slopes, unit * reference
        horizon = 64 * horizon
        w, info = solve(losses, slopes, reference, *roles, horizon)
        epsilons.append(info["epsilon"])
        other, changed = solve(losses, k * slopes, reference, *roles, round(horizon / k))
        assert other.tolist() == w.tolist()
        assert changed["epsilon"] == info["epsilon"]
        assert changed["lambda"] == pytest.approx(k * info["lambda"])
        with monkeypatch.context() as patch:
            patch.setattr(dynamics, "FEASIBILITY_TOLERANCE", k * TOLERANCE)
            other, changed = solve(k * losses, k * slopes, k * reference, *roles, horizon)
        assert other.tolist() == w.tolist()
        assert changed["feasible"] == info["feasible"]
        assert changed["epsilon"] == k * info["epsilon"]
        assert changed["lambda"] == pytest.approx(info["lambda"] / k)
    assert 0 < sum(epsilon > 0 for epsilon in epsilons) < 9


@pytest.mark.parametrize("scale", [1e-4, 1e-2])
def test_the_best_objective_of_the_feasible_solutions(monkeypatch, scale):
    """Where losses change by as little as the tolerance, solutions for many λ are feasible: the one
    that lowers the targets most counts, and not the one that violates least."""
    rng, objectives, solve = np.random.default_rng(5), [], dynamics.solve_mixture
    for _ in range(5):
        losses, slopes, reference, *others = random_problem(rng, 0.0)
        problem = losses, scale * slopes, losses + scale * (reference - losses), *others
        result, single = solve(*problem)[1]["objective"], []
        with monkeypatch.context() as patch:
            patch.setattr(dynamics, "EPSILONS", (0.0,))
            for lam in (1.0, 1e2, 1e4, 1e6):
                patch.setattr(dynamics, "LAMBDAS", (lam,))
                single.append(solve(*problem)[1])
        best = [info["objective"] for info in single if info["feasible"]]
        spread = np.ptp(problem[1][others[0]].sum(0))
        assert result == pytest.approx(min(best), abs=0.01 * spread)
        objectives.append((max(best) - min(best)) / spread)
    assert max(objectives) > 0.05


# ------------------------------------------------------------------------ before training


def test_losses_by_hand():
    """Mean over tokens, not examples; the highest sum over a choice's tokens, not their mean."""
    side = dynamics.Side([], [2, 3], [0, 1], [])
    nll, tokens = np.array([3.0, 3.5, 4.0, 1.0, 2.0]), np.array([1, 2, 5, 1, 4])
    assert side.loss("nll", nll, tokens) == pytest.approx(13.5 / 13)
    assert side.loss("error", nll, tokens) == 0  # by the mean, both questions were wrong
    assert dynamics.Side([], [2, 3], [1, 1], []).loss("error", nll, tokens) == 0.5


def make_problem(tokenizer, *flags):
    """What is known before training, without a model -> Problem and flags."""
    args = dynamics.parse_args(["--template", "plain", *flags])
    tokenizer = plain(tokenizer)
    return dynamics.make_problem(*dynamics.load_datasets(args, tokenizer), tokenizer, args)


@pytest.fixture(scope="module")
def sized(tmp_path_factory):
    """Files whose rows have known lengths in bytes, which are tokens -> the flags that name them.
    Training: rows of 10 and of 20 tokens. Evaluation, 60 rows each: t of 20 tokens, m of 16, and
    mc of 2 choices of 14 tokens. A row is BOS, prompt, newline, response and EOS; a choice has no
    EOS."""
    folder, files = tmp_path_factory.mktemp("sized"), {}

    def row(i, prompt, response):
        return {"prompt": f"{i:0{prompt}d}", "completion": "x" * response}

    files["a"] = [row(i, 3, 4) for i in range(30)]
    files["b"] = [row(i, 10, 7) for i in range(20)]
    files["t"] = [row(i, 9, 8) for i in range(100, 160)]
    files["m"] = [row(i, 5, 8) for i in range(200, 260)]
    choices = ["y" * 8, "n" * 8]
    quizzes = range(300, 360)
    files["mc"] = [{"question": f"{i:04d}", "choices": choices, "answer": i % 2} for i in quizzes]
    for name, entries in files.items():
        lines = [json.dumps(entry) + "\n" for entry in entries]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    names = {name: str(folder / f"{name}.jsonl") for name in files}
    flags = ["--data", names["a"], names["b"], "--eval_data", names["m"], names["t"], names["mc"]]
    return [*flags, "--targets", "t", "--constraints", "mc", "--accuracy", "mc"]


def questions_of(problem):
    """Validation and test questions of each domain, and validation examples."""
    result = {}
    for d in problem.domains:
        sides = [len(side.sizes or side.examples) for side in (d.validation, d.test)]
        result[d.label] = (*sides, len(d.validation.examples))
    return result


def test_max_cost(sized, tokenizer):
    """A static run of 100 steps costs 100 · 8 · 10 tokens (the shorter dataset) = 8,000. Two
    updates probe with 2 · 2 · 8 · (10 + 20) = 960. One validation row of each domain costs 0.4 of
    its tokens: 2 updates · 2 datasets · (20 + 28) + 7 evaluations · (20 + 28 + 16) = 640, so 256.
    At twice a static run, less a margin of 10 %: (0.9 · 8,000 - 960) / 256 = 24.4 rows."""
    steps = ["--max_steps", "100", "--updates", "50", "--probe_steps", "2", "--eval_every", "20"]
    problem = make_problem(tokenizer, *sized, *steps, "--max_cost", "2")
    assert questions_of(problem) == {"t": (24, 30, 24), "mc": (24, 30, 48), "m": (24, 30, 24)}
    assert [len(part) for part in problem.examples] == [30, 20]
    more = make_problem(tokenizer, *sized, *steps, "--max_cost", "2.2")
    assert questions_of(more)["mc"] == (30, 30, 60)  # 30.0 rows
    few = make_problem(tokenizer, *sized, *steps)
    assert questions_of(few)["t"] == (16, 30, 16)  # 1.4: at least 16
    fixed = make_problem(tokenizer, *sized, *steps, "--max_cost", "2", "--mixture", "uniform")
    assert questions_of(fixed) == questions_of(problem)  # the same rows for a baseline


def ids_by_label(problem, side):
    result = {}
    for d in problem.domains:
        result[d.label] = [tuple(e.ids.tolist()) for e in getattr(d, side).examples]
    return result


def test_validation_rows(sized, tokenizer):
    """--eval_limit, --validation_fraction: so many rows, nested; test rows do not depend on the
    limit, and neither on --seed."""
    whole = make_problem(tokenizer, *sized, "--eval_limit", "30", "--seed", "1")
    other = make_problem(tokenizer, *sized, "--eval_limit", "7", "--seed", "2")
    assert questions_of(other) == {"t": (7, 30, 7), "mc": (7, 30, 14), "m": (7, 30, 7)}
    assert ids_by_label(whole, "test") == ids_by_label(other, "test")
    rows, fewer = ids_by_label(whole, "validation"), ids_by_label(other, "validation")
    for label, part in fewer.items():
        assert part == rows[label][: len(part)]
        assert not {*rows[label]} & {*ids_by_label(whole, "test")[label]}
        assert sorted(part) != sorted(rows[label])[: len(part)]  # in random order
    part = make_problem(tokenizer, *sized, "--eval_limit", "99", "--validation_fraction", "0.3")
    assert questions_of(part) == {"t": (18, 42, 18), "mc": (18, 42, 36), "m": (18, 42, 18)}


def test_rows_of_one_prompt_stay_together(tmp_path, tokenizer):
    """--validation_fraction is a share of the distinct prompts: 30 % of 20, of which 5 have six
    rows."""
    prompts = [*range(20), *[i // 5 for i in range(25)]]
    rows = [{"prompt": f"{p:03d}", "completion": f"{i:03d}"} for i, p in enumerate(prompts)]
    file = tmp_path / "t.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--data", "toy/add#4", "--eval_data", str(file), "--targets", "t"]
    problem = make_problem(tokenizer, *flags, "--validation_fraction", "0.3", "--eval_limit", "99")
    sides = []
    for side in ("validation", "test"):
        examples = ids_by_label(problem, side)["t"]
        sides.append([tokenizer.decode(ids[1:4]) for ids in examples])
    assert sorted(sides[0] + sides[1]) == sorted(f"{p:03d}" for p in prompts)
    assert not {*sides[0]} & {*sides[1]}
    assert (len({*sides[0]}), len({*sides[1]})) == (6, 14)


@pytest.mark.parametrize(
    "flags, steps, updates",
    [
        (["--max_steps", "96", "--updates", "none"], 96, [0, 16, 32, 48, 64, 80]),
        (["--max_steps", "96"], 96, [0, 4, 8, 16, 32, 48, 64, 80]),  # light
        (["--max_steps", "96", "--updates", "dense"], 96, [0, 1, 2, 4, 8, 16, 32, 48, 64, 80]),
        (["--max_steps", "96", "--updates", "7,50"], 96, [0, 7, 50]),
        ([], 2048, [0, 85, 171, 341, 683, 1024, 1365, 1707]),
        (["--epochs", "3", "--batch_size", "4", "--updates", "0"], 39, [0]),  # 3 · 50 / 4
    ],
)
def test_steps_and_updates(sized, tokenizer, flags, steps, updates):
    """--updates, --max_steps, --epochs; an update splits what follows it, up to the next."""
    problem = make_problem(tokenizer, *sized, *flags)
    assert problem.steps == steps
    assert problem.updates == updates


RECIPE = {
    **{"max_steps": 2048, "epochs": None, "batch_size": 8, "max_length": 512, "lr": 2e-4},
    **{"weight_decay": 0.0, "schedule": "cosine", "warmup_ratio": 0.03, "max_grad_norm": 1.0},
    **{"lora_rank": 32, "lora_alpha": None, "lora_dropout": 0.0, "dtype": "auto", "seed": 0},
    **{"template": "auto", "micro_batch_size": 8, "eval_every": 0, "eval_limit": None},
    **{"updates": "light", "probe_steps": 4, "damping": 0.0, "mixture": "dynamics"},
    **{"target_mass": None, "target_data": [], "validation_fraction": 0.5, "max_cost": 1.4},
    **{"targets": ["x"], "constraints": [], "accuracy": [], "reference": []},
}


@pytest.mark.parametrize(
    "flags, changes",
    [
        (["--model", "org/name"], {}),
        ([], {"lora_rank": 0}),  # tiny
        (["--lora_rank", "4"], {"lora_rank": 4}),
        (["--model", "org/name", "--lora_rank", "0"], {"lora_rank": 0}),
        (["--model", "org/name", "--epochs", "2"], {"epochs": 2.0, "max_steps": None}),
        (["--model", "org/name", "--max_steps", "9"], {"max_steps": 9}),
    ],
)
def test_recipe(flags, changes):
    """The paper's recipe, and ours where it says nothing, as it stands after parsing."""
    args = vars(dynamics.parse_args(["--targets", "x", *flags]))
    assert {key: args[key] for key in RECIPE} == {**RECIPE, **changes}


# ------------------------------------------------------------------------ a run that is watched


class Spy:
    """What a run did, in order, and a clock that only moves when it does something."""

    COSTS = {"backward": 1.0, "score": 0.125, "solve": 0.5, "snapshot": 0.25, "restore": 0.0625}

    def __init__(self, patch):
        self.events, self.clock = [], 0.0
        real = {"strftime": time.strftime, "monotonic": time.monotonic}
        clock = SimpleNamespace(perf_counter=lambda: self.clock, **real)
        patch.setattr(runs, "time", clock)
        patch.setattr(plots, "draw", lambda folder: [])
        self.original = {}
        for name, owner, attribute in (
            ("draw", common.MixtureSampler, "batch"),
            ("backward", common, "backward"),
            ("step", common, "optimizer_step"),
            ("score", common, "score"),
            ("solve", dynamics, "solve_mixture"),
            ("snapshot", common.Snapshot, "__init__"),
            ("restore", common.Snapshot, "restore"),
        ):
            self.original[name] = getattr(owner, attribute)
            patch.setattr(owner, attribute, self.watched(name))

    def watched(self, name):
        return lambda *args, **options: self.call(name, args, options)

    def call(self, name, args, options):
        event = {"name": name, "args": copy_of(args)}
        if name == "backward":
            event |= {"weights": weights_of(args[0]), "training": args[0].training}
        self.events.append(event)
        self.clock += self.COSTS.get(name, 0.0)
        result = event["result"] = self.original[name](*args, **options)
        return result

    def all(self, name):
        return [event for event in self.events if event["name"] == name]


def copy_of(args):
    """Arrays as they were at the call."""
    return tuple(arg.copy() if isinstance(arg, np.ndarray) else arg for arg in args)


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def watched_run(folder, *flags):
    """A run of the command -> what was seen of it."""
    with pytest.MonkeyPatch.context() as patch:
        spy = Spy(patch)
        dynamics.main(["--template", "plain", "--output_dir", str(folder), *flags])
    spy.folder, spy.summary = folder, read_json(folder / "summary.json")
    return spy


def split_events(events, datasets):
    """-> the training steps [{batch, rate, weights, loss}], the evaluations [(steps done, score)],
    and the updates [{step, probes, solved}], a probe being {batches, rates, score}."""
    steps, evaluations, updates, update = [], [], [], None
    for event in events:
        name, args = event["name"], event["args"]
        if name == "snapshot":
            probes = [{"batches": [], "rates": []} for _ in range(datasets)]
            update = {"step": len(steps), "probes": probes, "restored": 0}
        elif name == "solve":
            updates.append({**update, "solved": event})
            update = None
        elif update and name == "restore":
            update["restored"] += 1
        elif update:
            probe = update["probes"][update["restored"]]
            if name == "score":
                probe["score"] = event
            elif name == "backward":
                probe["batches"].append(args[1])
            elif name == "step":
                probe["rates"].append(args[2])
        elif name == "backward":
            seen = {"batch": args[1], "weights": event["weights"], "loss": event["result"]}
            steps.append(seen)
        elif name == "step":
            steps[-1]["rate"] = args[2]
        elif name == "score":
            evaluations.append((len(steps), event))
    return steps, evaluations, updates


# ------------------------------------------------------------------------ the main run

SIZES = {"add": 12, "copy": 10, "sort": 14}
TRAINING = [f"toy/{task}#{size}" for task, size in SIZES.items()]
STEPS, PROBE, DAMPING, LR, DECAY, CLIP, SEED = 7, 2, 0.25, 1e-2, 0.1, 0.5, 3
UPDATES, HORIZONS, EVALUATED = [0, 3, 4], [3, 1, 3], [0, 2, 3, 4, 6, 7]
# The learning rates of a probe are those of these steps: the middles of the halves of its interval.
PROBED_AS = [(0, 2), (3, 3), (4, 6)]
DECIDED = ["sort", "add", "quiz", "copy"]  # targets first, in the order of --eval_data
QUIZ, COPY = 0.75, 0.75  # the level of quiz, and that of copy in losses before training
TARGETS = ["--targets", "add", "sort", "--constraints", "copy", "quiz", "--accuracy", "quiz"]


def quiz_row(i):
    """A question whose three choices are numbers of two digits."""
    choices = [str(10 + (37 * i + 29 * k) % 90) for k in range(3)]
    return {"question": f"Number {i}?", "choices": choices, "answer": i % 3}


@pytest.fixture(scope="module")
def quiz(tmp_path_factory):
    file = tmp_path_factory.mktemp("quiz") / "quiz.jsonl"
    file.write_text("".join(json.dumps(quiz_row(i)) + "\n" for i in range(10)))
    return str(file)


@pytest.fixture(scope="module")
def eval_specs(quiz):
    return ["toy/reverse#10", "toy/sort#12", quiz, "toy/copy#10", "toy/add#10"]


@pytest.fixture(scope="module")
def flags(model_folder, eval_specs):
    result = ["--model", model_folder("llama"), "--lora_rank", "0", "--data", *TRAINING]
    result += ["--eval_data", *eval_specs, *TARGETS, "--reference", "copy=-25%", "quiz=0.75"]
    result += ["--max_steps", f"{STEPS}", "--updates", "3,4", "--probe_steps", f"{PROBE}"]
    result += ["--damping", f"{DAMPING}", "--validation_fraction", "0.6", "--eval_limit", "5"]
    result += ["--eval_every", "2", "--batch_size", "4", "--micro_batch_size", "3"]
    result += ["--lr", f"{LR}", "--warmup_ratio", "0.4", "--max_grad_norm", f"{CLIP}"]
    return [*result, "--weight_decay", f"{DECAY}", "--seed", f"{SEED}", "--log_every", "2"]


@pytest.fixture(scope="module")
def watched(tmp_path_factory, flags):
    spy = watched_run(tmp_path_factory.mktemp("watched") / "run", *flags)
    spy.steps, spy.evaluations, spy.updates = split_events(spy.events, len(SIZES))
    return spy


class Rows:
    """Which row of which set an example is, by its text alone."""

    def __init__(self, specs, tokenizer):
        self.tokenizer, self.of, self.answers, self.counts = tokenizer, {}, {}, {}
        for dataset in data.load_data(specs, seed=SEED, split="eval"):
            self.counts[dataset.label] = len(dataset.rows)
            for number, row in enumerate(dataset.rows):
                for response in row.choices or [row.response]:
                    text = plain_text(row) + response
                    self.of[text] = dataset.label, number
                self.answers[dataset.label, number] = row.answer

    def of_example(self, example):
        return self.of[self.tokenizer.decode(example.ids, skip_special_tokens=True)]

    def by_label(self, examples):
        """{label: {row: its examples}}"""
        result = {}
        for example in examples:
            label, number = self.of_example(example)
            result.setdefault(label, {}).setdefault(number, []).append(example)
        return result

    def own_losses(self, model, rows):
        """{label: loss} of by_label's rows by the model's own logits: mean NLL per token, and for
        quiz 1 - accuracy."""
        losses = {}
        for label, questions in rows.items():
            nll = {number: [own_sum(model, e) for e in part] for number, part in questions.items()}
            if label == "quiz":
                wrong = [np.argmin(nll[n]) != self.answers[label, n] for n in questions]
                losses[label] = float(np.mean(wrong))
            else:
                tokens = sum(e.response_length for part in questions.values() for e in part)
                losses[label] = sum(map(sum, nll.values())) / tokens
        return losses


@torch.no_grad()
def own_sum(model, example):
    return own_batch_loss(model, [example]).item() * example.response_length


def own_batch_loss(model, batch):
    """Mean NLL over the response tokens of all examples, one unpadded example after the other."""
    total = 0.0
    for example in batch:
        logits, targets = own_logits(model, example)
        total = total + torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    return total / sum(example.response_length for example in batch)


def own_rate(step):
    """Three steps of warm-up (0.4 · 7, rounded up), then a cosine over the four others."""
    if step < 3:
        return LR * (step + 1) / 3
    return LR * 0.5 * (1 + math.cos(math.pi * (step - 3) / 4))


def own_optimizer(model):
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": DECAY}]
    return torch.optim.AdamW([*groups, {"params": others, "weight_decay": 0.0}])


def own_step(model, optimizer, batch, rate):
    optimizer.zero_grad()
    own_batch_loss(model, batch).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()


def own_model(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()


@pytest.fixture(scope="module")
def rows(eval_specs, tokenizer):
    return Rows(eval_specs, tokenizer)


@pytest.fixture(scope="module")
def oracle(watched, rows, model_folder):
    """The run again in float64, in plain PyTorch, from its batches, rates and validation rows ->
    losses {steps done: {label: loss}}, slopes {update: {label: [of each dataset]}}."""
    model = own_model(model_folder("llama"))
    optimizer = own_optimizer(model)
    validation = rows.by_label(watched.evaluations[0][1]["args"][1])
    probes = {update["step"]: update["probes"] for update in watched.updates}
    losses, slopes = {0: rows.own_losses(model, validation)}, {}
    for step, seen in enumerate(watched.steps):
        if step in probes:
            known = dict(zip(UPDATES, PROBED_AS))[step]
            slopes[step] = {label: [] for label in DECIDED}
            for probe in probes[step]:
                clone = copy.deepcopy(model)
                own = own_optimizer(clone)
                own.load_state_dict(copy.deepcopy(optimizer.state_dict()))
                for batch, like in zip(probe["batches"], known):
                    own_step(clone, own, batch, own_rate(like))
                after = rows.own_losses(clone, validation)
                for label in DECIDED:
                    slopes[step][label].append((after[label] - losses[step][label]) / PROBE)
        own_step(model, optimizer, seen["batch"], own_rate(step))
        losses[step + 1] = rows.own_losses(model, validation)
    return losses, slopes, model


def ids_of(examples):
    return [(example.dataset, example.row) for example in examples]


def test_probe_steps_rates_and_batches(watched):
    """--probe_steps, --batch_size, --lr, --warmup_ratio: C steps on each dataset alone, at the
    rates of the middles of the C parts of the interval; no example twice in a probe; other
    examples at another update; everything put back after each."""
    assert [update["step"] for update in watched.updates] == UPDATES
    before = {}
    for update, like in zip(watched.updates, PROBED_AS):
        assert update["restored"] == len(SIZES)
        for j, probe in enumerate(update["probes"]):
            assert probe["rates"] == pytest.approx([own_rate(step) for step in like])
            assert [len(batch) for batch in probe["batches"]] == [4] * PROBE
            found = ids_of(sum(probe["batches"], []))
            assert {dataset for dataset, _ in found} == {j}
            assert len(set(found)) == 4 * PROBE
            before.setdefault(j, []).append(sorted(found))
    for j, found in before.items():
        assert found[0] != found[1] != found[2], j


def test_training_rates_and_batches(watched):
    """--max_steps, --updates, --batch_size: each batch is drawn with the mixture in force at its
    step, never ahead across an update, from cursors that the probes do not move."""
    draws = watched.all("draw")
    assert [draw["args"][2] for draw in draws] == list(range(STEPS))
    sampler = common.MixtureSampler([*SIZES.values()], 4, SEED)
    starts, drawn = dict(enumerate([0, 12, 22])), []
    for draw, mixture in zip(draws, np.repeat(own_mixtures(watched), HORIZONS, 0)):
        assert draw["args"][1] == pytest.approx(mixture)
        drawn.append(sampler.batch(*draw["args"][1:]).tolist())
    assert all(event["training"] for event in watched.all("backward"))
    assert {event["args"][3] for event in watched.all("step")} == {CLIP}  # of the probes, too
    trained = [[starts[k] + row for k, row in ids_of(step["batch"])] for step in watched.steps]
    assert trained == drawn
    assert [s["rate"] for s in watched.steps] == pytest.approx([*map(own_rate, range(STEPS))])
    for k, size in enumerate(SIZES.values()):  # a probe's examples are not the training's next
        sampler = common.MixtureSampler([*SIZES.values()], 4 * PROBE, SEED)
        first = sampler.batch(np.eye(3)[k], 0) - starts[k]
        probed = [row for _, row in ids_of(sum(watched.updates[0]["probes"][k]["batches"], []))]
        assert sorted(first) != sorted(probed), size


def training_pool(watched):
    """All training examples, dataset after dataset."""
    loaded = data.load_data(TRAINING, seed=SEED)
    tokenizer = common.tiny_tokenizer()
    return data.Examples.join(data.encode_datasets(loaded, plain(tokenizer), 512, quiet=True))


def own_mixtures(watched):
    """The solver's mixtures after damping, from the uniform one on."""
    mixture, result = np.full(3, 1 / 3), []
    for update in watched.updates:
        mixture = (1 - DAMPING) * update["solved"]["result"][0] + DAMPING * mixture
        result.append(mixture)
    return result


def test_the_solver_gets_the_losses_slopes_levels_and_horizon(watched, oracle, rows):
    """--targets, --constraints, --accuracy, --reference on validation rows, --probe_steps: against
    the float64 run. Domains that are only monitored have no row in it."""
    losses, slopes, _ = oracle
    level = {"quiz": QUIZ, "copy": COPY * losses[0]["copy"]}
    for update, horizon in zip(watched.updates, HORIZONS):
        known, found, reference, targets, constraints, given = update["solved"]["args"]
        expected = [losses[update["step"]][label] for label in DECIDED]
        assert known == pytest.approx(expected, rel=1e-3)
        expected = np.array([slopes[update["step"]][label] for label in DECIDED])
        assert found.shape == (4, 3)
        assert found == pytest.approx(expected, abs=2e-3 * np.abs(expected).max())
        assert reference[2:] == pytest.approx([level["quiz"], level["copy"]], rel=1e-5)
        assert [DECIDED[i] for i in targets] == ["sort", "add"]
        assert [DECIDED[i] for i in constraints] == ["quiz", "copy"]
        assert given == horizon
    assert max(map(abs, slopes[0]["quiz"])) > 0.05  # the quiz in units of accuracy


def test_training_goes_on_as_if_nothing_had_been_probed(watched, oracle):
    """--weight_decay, --max_grad_norm: the losses after every step are those of the float64 run."""
    losses, _, _ = oracle
    found = [record for record in records(watched.folder) if "eval/target_total" in record]
    assert [record["step"] for record in found] == EVALUATED
    for record in found:
        for label in (*DECIDED, "reverse"):
            metric = "error" if label == "quiz" else "nll"
            own = losses[record["step"]][label]
            assert record[f"eval/{label}/{metric}"] == pytest.approx(own, rel=1e-3), label


def test_logged_updates(watched, oracle):
    """What is logged of an update: the slopes and mixture in force, H S w, and what came of it."""
    losses, slopes, _ = oracle
    log = records(watched.folder)
    updates = [record for record in log if "update/horizon" in record]
    ends = [record for record in log if "update/add/observed" in record]
    assert [record["step"] for record in updates] == UPDATES
    assert [record["step"] for record in ends] == [3, 4, 7]
    for record, end, mixture, h in zip(updates, ends, own_mixtures(watched), HORIZONS):
        assert [record[f"mixture/{k}"] for k in SIZES] == pytest.approx(mixture)
        reached = {}
        for label in DECIDED:
            own = np.array(slopes[record["step"]][label])
            room = 2e-3 * np.abs([*slopes[record["step"]].values()]).max()
            assert [record[f"slope/{label}/{k}"] for k in SIZES] == pytest.approx(own, abs=room)
            predicted = h * own @ mixture
            assert record[f"update/{label}/predicted"] == pytest.approx(predicted, abs=h * room)
            observed = losses[end["step"]][label] - losses[record["step"]][label]
            assert end[f"update/{label}/observed"] == pytest.approx(observed, abs=2e-2)
            reached[label] = losses[record["step"]][label] + predicted
        holds = reached["quiz"] <= QUIZ and reached["copy"] <= COPY * losses[0]["copy"]
        assert record["update/feasible"] == holds
        assert "slope/reverse/add" not in record


def test_logged_training(watched):
    """Mean loss over the response tokens of the steps since the last line, the rate of the step and
    the mixture in force."""
    lines = [record for record in records(watched.folder) if "train/loss" in record]
    mixtures = own_mixtures(watched)
    assert [record["step"] for record in lines] == [1, 2, 4, 6, 7]
    for record, covered in zip(lines, [[0], [0, 1], [2, 3], [4, 5], [5, 6]]):
        total = tokens = 0
        for step in covered:
            lengths = [example.response_length for example in watched.steps[step]["batch"]]
            total += watched.steps[step]["loss"] @ lengths
            tokens += sum(lengths)
        assert record["train/loss"] == pytest.approx(total / tokens)
        assert record["train/lr"] == pytest.approx(own_rate(covered[-1]))
        current = mixtures[sum(covered[-1] >= np.array(UPDATES)) - 1]
        assert [record[f"mixture/{k}"] for k in SIZES] == pytest.approx(current)
        drawn = sum((step["batch"] for step in watched.steps[: record["step"]]), [])
        tokens = sum(example.response_length for example in drawn)
        assert (record["examples"], record["tokens"]) == (len(drawn), tokens)
        for k, (label, size) in enumerate(SIZES.items()):
            lengths = [example.response_length for example in drawn if example.dataset == k]
            assert record[f"share/{label}"] == pytest.approx(len(lengths) / len(drawn))
            assert record[f"token_share/{label}"] == pytest.approx(sum(lengths) / tokens)
            assert record[f"passes/{label}"] == pytest.approx(len(lengths) / size)


def scored(watched, done):
    """The sets of examples scored outside of probes after `done` training steps, in order."""
    return [event["args"][1] for steps, event in watched.evaluations if steps == done]


def test_validation_and_test_rows(watched, rows):
    """--validation_fraction, --eval_limit, --eval_every: 6 of 10 prompts may decide and 5 do, 4
    report; never the same rows; a probe measures the targets and constraints on the same rows."""
    decide = rows.by_label(scored(watched, 0)[0])
    assert all(len(part) == 3 for part in decide["quiz"].values())
    decide = {label: [*part] for label, part in decide.items()}
    for done in EVALUATED[1:]:
        found = rows.by_label(scored(watched, done)[0])
        assert {label: [*part] for label, part in found.items()} == decide
    for update in watched.updates:
        for probe in update["probes"]:
            found = rows.by_label(probe["score"]["args"][1])
            assert {x: [*part] for x, part in found.items()} == {x: decide[x] for x in DECIDED}
    for done in (0, STEPS):
        tested = rows.by_label(sum(scored(watched, done)[1:], []))
        assert sorted(tested) == sorted(rows.counts)
        for label, part in tested.items():
            count = rows.counts[label]
            assert len(decide[label]) == 5
            assert len(part) == count - round(0.6 * count)
            assert not {*decide[label]} & {*part}
    steps = {done for done, _ in watched.evaluations}
    assert sorted(steps) == EVALUATED


def test_choice(watched, oracle):
    """--reference, --eval_every: of the evaluations after which quiz and copy hold their levels and
    the targets' total fell, the one with the lowest total; final/ has its weights."""
    losses, _, _ = oracle

    def total(step):
        return losses[step]["sort"] + losses[step]["add"]

    holds = [s for s in EVALUATED if losses[s]["quiz"] <= QUIZ + TOLERANCE]
    holds = [s for s in holds if losses[s]["copy"] <= COPY * losses[0]["copy"] + TOLERANCE]
    feasible = [step for step in holds if total(step) < total(0)]
    assert 0 < len(feasible) < 5
    best = min(feasible, key=total)
    found = [r["step"] for r in records(watched.folder) if r.get("eval/feasible")]
    assert found == feasible
    assert watched.summary["report"]["step"] == best
    chosen = watched.summary["validation"]["chosen"]
    assert chosen.pop("step") == best
    assert chosen == pytest.approx(losses[best], rel=1e-3)
    if best < STEPS:
        assert same(weights(watched.folder), watched.steps[best]["weights"])


def test_report(watched, rows, model_folder):
    """--reference on test rows: losses of the base model and of final/, levels from the test rows'
    own losses, and the geometric mean of the targets' perplexities, all in float64."""
    sets = [rows.by_label(part) for part in scored(watched, STEPS)[1:]]
    report, numbers = watched.summary["report"], []
    for folder in (model_folder("llama"), watched.folder / "final"):
        model, found = own_model(folder), {}
        for part in sets:  # quiz: first the right answers, then, for the accuracy, all choices
            if "quiz" not in part or len([*part["quiz"].values()][0]) == 3:
                found |= rows.own_losses(model, part)
        numbers.append(found)
    before, after = numbers
    for role, labels in (("targets", ["sort", "add"]), ("constraints", ["quiz", "copy"])):
        assert [*report[role]] == labels
        for label in labels:
            assert report[role][label]["before"] == pytest.approx(before[label], rel=1e-4)
            assert report[role][label]["after"] == pytest.approx(after[label], rel=1e-4)
    levels, failed = {"quiz": QUIZ, "copy": COPY * before["copy"]}, False
    for label, level in levels.items():
        row, excess = report["constraints"][label], after[label] - level
        assert row["reference"] == pytest.approx(level, rel=1e-4)
        assert row["violation"] == pytest.approx(max(0, excess), rel=1e-3)
        failed = failed or excess > TOLERANCE
    changes = [after[label] - before[label] for label in ("sort", "add")]
    reduction = 100 * (1 - math.exp(sum(changes) / 2))
    assert report["unconstrained_reduction_percent"] == pytest.approx(reduction, rel=1e-3)
    assert report["feasible"] == (not failed)
    assert report["reduction_percent"] == (
        0 if failed else report["unconstrained_reduction_percent"]
    )


def test_cost(watched):
    """Of every second of the watched clock: probes are probing steps, snapshots and the solver,
    evaluation is that of validation rows (before training, in probes, and later), test rows are
    neither; both in multiples of the training steps."""
    probes = 3 * (3 * PROBE * 1.0 + 0.25 + 3 * 0.0625 + 0.5)
    evaluations = 0.125 * (3 * 3 + len(EVALUATED))
    cost = watched.summary["cost"]
    assert cost["probe"] == pytest.approx(probes / STEPS)
    assert cost["eval"] == pytest.approx(evaluations / STEPS)
    assert cost["total"] == pytest.approx(1 + (probes + evaluations) / STEPS)


# ------------------------------------------------------------------------ gradient alignment


def own_gradient(model, examples):
    """Gradient of the mean NLL per response token, in float64, as one vector."""
    model.zero_grad()
    own_batch_loss(model, examples).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([p.grad.flatten() for p in trained])


@pytest.fixture(scope="module")
def aligned(tmp_path_factory, model_folder):
    """A run with --mixture gradient and a LoRA adapter with dropout, and the models that it
    trained."""
    flags = ["--model", model_folder("llama"), "--lora_rank", "2", "--lora_dropout", "0.5"]
    flags += ["--data", "toy/add#12", "toy/sort#12", "toy/count#12", "--max_steps", "6"]
    flags += ["--eval_data", "toy/reverse#8", "toy/copy#8", "toy/add#8", "--targets", "add"]
    flags += ["--constraints", "copy", "--mixture", "gradient", "--updates", "2"]
    flags += ["--probe_steps", "3", "--batch_size", "3", "--micro_batch_size", "2"]
    flags += ["--lr", "1e-2", "--warmup_ratio", "0.5", "--schedule", "linear"]
    folder = tmp_path_factory.mktemp("aligned") / "run"
    return watched_run(folder, *flags)


def test_gradient_alignment(aligned):
    """S_ij = -lr ∇L_i·∇L_j by the exact gradients of a float64 copy without dropout: ∇L_i on the
    domain's validation rows, ∇L_j on the probe's batches, lr the mean of the probe's rates."""
    events, at, updates = aligned.events, 0, []
    for end, event in enumerate(events):
        if event["name"] == "solve":
            calls = [e for e in events[at:end] if e["name"] == "backward"]
            updates.append((calls[-5:], event))  # 2 domains and 3 datasets
            at = end
    # warm-up over 3 steps, then a line to 0 over 3. The probe of steps 0 and 1 is at the rates of
    # 0, 1 and 1, that of steps 2 to 5 at those of 2, 4 and 5
    rates = [1e-2 / 3, 2e-2 / 3, 1e-2, 1e-2, 2e-2 / 3, 1e-2 / 3]
    for (calls, solved), like in zip(updates, [(0, 1, 1), (2, 4, 5)]):
        model = copy.deepcopy(calls[0]["args"][0]).double().eval()
        common.load_trainable_state(model, calls[0]["weights"])
        gradients = [own_gradient(model, call["args"][1]) for call in calls]
        mean = np.mean([rates[step] for step in like])
        exact = -mean * np.array([[(a @ b).item() for b in gradients[2:]] for a in gradients[:2]])
        assert np.abs(exact).min() > 0
        assert solved["args"][1] == pytest.approx(exact, rel=1e-4)
        assert not any(call["training"] for call in calls)
        validated = aligned.all("score")[0]["args"][1]
        assert calls[0]["args"][1] == validated[:4]
        assert calls[1]["args"][1] == validated[4:8]
        for j, call in enumerate(calls[2:]):
            assert {example.dataset for example in call["args"][1]} == {j}
            assert len({*ids_of(call["args"][1])}) == 9
    assert [solved["args"][5] for _, solved in updates] == [2, 4]
    assert sum(event["training"] for event in aligned.all("backward")) == 6
    assert not aligned.all("snapshot")


# ------------------------------------------------------------------------ the choice, by script

SIDES = ["t", "u", "c", "d", "m"]  # two targets, two constraints, one that is only monitored
BEFORE = [2.0, 1.0, 1.0, 0.5, 1.0]


@pytest.fixture(scope="module")
def scripted_flags(model_folder):
    result = ["--model", model_folder("llama"), "--lora_rank", "0", "--data", "toy/add#4"]
    labels = zip(SIDES, ("add", "sort", "copy", "count", "reverse"))
    result += ["--eval_data", *[f"{label}=toy/{task}#4" for label, task in labels]]
    result += ["--targets", "u", "t", "--constraints", "d", "c", "--mixture", "uniform"]
    return [*result, "--batch_size", "2", "--updates", "0", "--eval_every", "1", "--lr", "1e-3"]


def scripted_run(folder, flags, losses, tests):
    """A run whose validation losses are BEFORE and, after each step, a row of losses; and whose
    test rows give tests[0] before and tests[1] after training ({label: numbers})."""
    losses, tests = iter([BEFORE, *losses]), iter(tests)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamics, "validation_losses", lambda *args: np.array(next(losses)))
        patch.setattr(dynamics, "report_test", lambda *args, **how: next(tests))
        spy = watched_run(folder, *flags)
    spy.steps = split_events(spy.events, 1)[0]
    assert next(losses, None) is None
    return spy


def test_numbers(losses, nll=None):
    """What report_test gives for losses of SIDES; nll: of the targets, where it is not the loss."""
    nll = {**dict(zip(SIDES, losses)), **(nll or {})}
    others = {"ppl": 1.0, "accuracy": 0.0, "tokens": 1}
    return {x: {"loss": loss, "nll": nll[x], **others} for x, loss in zip(SIDES, losses)}


test_numbers.__test__ = False  # a helper


def test_choice_of_the_lowest_total_that_is_feasible(tmp_path, scripted_flags):
    """Feasible: every constraint within 1e-4 of its level and the sum over the targets below that
    before training. Chosen: the lowest sum, of equal ones the first; not the last, not the least
    violation, whatever one target or a monitored domain does. Report: geometric mean."""
    losses = [
        [1.0, 0.5, 1.0003, 0.5, 0.0],  # c is 3e-4 above its level
        [1.25, 1.25, 1.0, 0.5, 9.0],  # feasible, and the lowest maximum
        [1.5, 0.5, 1.00005, 0.50005, 9.0],  # chosen: within the tolerance
        [0.5, 1.5, 0.25, 0.25, 0.0],  # the same sum again
        [2.0, 0.96875, 0.1, 0.1, 0.0],  # feasible, only just
        [0.5, 0.5, 0.1, 0.6, 0.0],  # d fails
    ]
    tests = [test_numbers([2.0, 0.5, 1.0, 0.4, 1.0], {"u": 3.0})]
    tests += [test_numbers([1.5, 0.25, 1.00005, 0.3, 7.0], {"u": 2.0})]
    spy = scripted_run(tmp_path, [*scripted_flags, "--max_steps", "6"], losses, tests)
    log = [record for record in records(tmp_path) if "eval/feasible" in record]
    assert [record["eval/feasible"] for record in log] == [0, 0, 1, 1, 1, 1, 0]
    totals = [3.0, 1.5, 2.5, 2.0, 2.0, 2.96875, 1.0]
    assert [record["eval/target_total"] for record in log] == totals
    excess = [record["eval/violation"] for record in log]
    assert excess == pytest.approx([0, 3e-4, 0, 0, 0, 0, 0.1])
    assert same(weights(tmp_path), spy.steps[3]["weights"])
    report, validation = spy.summary["report"], spy.summary["validation"]
    assert report["step"] == 3
    assert report["feasible"]
    assert report["feasible_on_validation"]
    # the NLL of u fell by 1, that of t by 0.5; the loss of u is another
    assert report["reduction_percent"] == pytest.approx(100 * (1 - math.exp(-0.75)))
    assert report["unconstrained_reduction_percent"] == report["reduction_percent"]
    assert report["targets"]["u"] == {"metric": "nll", "before": 0.5, "after": 0.25}
    assert [row["violation"] for row in report["constraints"].values()] == [0, 0]
    assert validation["before"] == dict(zip(SIDES, BEFORE))
    assert validation["reference"] == {"c": 1.0, "d": 0.5}
    assert validation["chosen"] == {"step": 3, **dict(zip(SIDES, losses[2]))}


def test_levels_and_no_feasible_checkpoint(tmp_path, scripted_flags):
    """--reference +x % of each side's own loss before training, and a level that is the same on
    both. Nothing was chosen: final/ is the last, and good test rows do not make it feasible."""
    losses = [
        [1.0, 0.5, 1.1, 0.5, 1.0],  # d: its level is 0.45 now
        [1.0, 0.5, 1.1003, 0.45, 1.0],  # c: more than 10 % above
        [2.5, 0.5, 0.5, 0.1, 1.0],  # the total is what it was
        [2.5, 1.0, 0.5, 0.1, 1.0],  # the total rose
    ]
    tests = [test_numbers([2.0, 1.0, 2.0, 0.5, 1.0]), test_numbers([1.0, 1.0, 2.2, 0.45, 1.0])]
    flags = [*scripted_flags, "--max_steps", "4", "--reference", "c=+10%", "d=0.45"]
    spy = scripted_run(tmp_path, flags, losses, tests)
    log = [record for record in records(tmp_path) if "eval/feasible" in record]
    assert [record["eval/feasible"] for record in log] == [0] * 5
    excess = [record["eval/violation"] for record in log]
    assert excess == pytest.approx([0.05, 0.05, 3e-4, 0, 0])
    report = spy.summary["report"]
    assert not (tmp_path / "best").exists()
    assert report["step"] is None
    assert not report["feasible"]
    assert report["reduction_percent"] == 0
    assert report["unconstrained_reduction_percent"] == pytest.approx(100 * (1 - math.exp(-0.5)))
    rows = report["constraints"]
    assert [rows[label]["reference"] for label in "cd"] == pytest.approx([2.2, 0.45])
    assert [rows[label]["violation"] for label in "cd"] == [0, 0]
    assert spy.summary["validation"]["reference"] == pytest.approx({"c": 1.1, "d": 0.45})
    assert spy.summary["validation"]["chosen"] is None
    last, final = spy.steps[-1]["weights"], weights(tmp_path)
    assert not any(torch.equal(last[name], final[name]) for name in last)


@pytest.mark.parametrize(
    "after, violation, feasible",
    [
        ([1.0, 0.5, 1.3, 0.7, 1.0], [0.1, 0.2], False),  # both levels fail
        ([1.0, 0.5, 1.2, 0.7, 1.0], [0, 0.2], False),  # one does
        ([2.5, 0.5, 1.2, 0.5, 1.0], [0, 0], False),  # the total did not fall
        ([2.25, 0.5, 1.2, 0.5, 1.0], [0, 0], True),  # one target rose, the total fell
    ],
)
def test_feasible_on_validation_but_not_on_test_rows(
    tmp_path, scripted_flags, after, violation, feasible
):
    """FILE.json of --reference; the reduction counts as 0 where the test rows are not feasible."""
    levels = tmp_path / "levels.json"
    levels.write_text(json.dumps({"c": "-40%", "d": 0.5}))
    tests = [test_numbers([2.0, 1.0, 2.0, 0.4, 1.0]), test_numbers(after)]
    flags = [*scripted_flags, "--max_steps", "1", "--reference", str(levels)]
    spy = scripted_run(tmp_path / "run", flags, [[1.5, 0.5, 0.6, 0.4, 1.0]], tests)
    report = spy.summary["report"]
    assert report["feasible_on_validation"]
    assert report["step"] == 1
    rows = report["constraints"]
    assert [rows[label]["reference"] for label in "cd"] == pytest.approx([1.2, 0.5])
    assert [rows[label]["violation"] for label in "cd"] == pytest.approx(violation)
    reduction = 100 * (1 - math.exp((after[0] + after[1] - 3) / 2))
    assert report["feasible"] == feasible
    assert report["unconstrained_reduction_percent"] == pytest.approx(reduction)
    assert report["reduction_percent"] == pytest.approx(reduction if feasible else 0)


# ------------------------------------------------------------------------ fixed mixtures


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--mixture", "uniform"], [1 / 3, 1 / 3, 1 / 3]),
        (["--mixture", "proportional"], [0.3, 0.5, 0.2]),
        (["--mixture", "uniform", "--target_mass", "0.8"], [0.4, 0.2, 0.4]),
        (["--mixture", "proportional", "--target_mass", "0.8"], [0.48, 0.2, 0.32]),
        (["--mixture", "proportional", "--target_mass", "0"], [0, 1, 0]),
        (
            ["--mixture", "proportional", "--target_mass", "0.4", "--target_data", "copy"],
            [0.36, 0.4, 0.24],
        ),
        ({"copy": 3, "add": 1, "sort": 0}, [0.25, 0.75, 0]),
    ],
)
def test_fixed_mixtures(tmp_path, model_folder, flags, expected):
    """--mixture, --target_mass, --target_data: the probabilities of every draw; nothing is probed,
    no mixture solved for."""
    if isinstance(flags, dict):
        (tmp_path / "mix.json").write_text(json.dumps(flags))
        flags = ["--mixture", str(tmp_path / "mix.json")]
    flags += ["--data", "toy/add#6", "toy/copy#10", "toy/sort#4", "--max_steps", "18"]
    flags += ["--eval_data", "toy/sort#4", "toy/add#4", "--targets", "sort", "add"]
    flags += ["--model", model_folder("llama"), "--lora_rank", "0", "--updates", "0"]
    spy = watched_run(tmp_path / "run", *flags, "--batch_size", "1", "--dtype", "bf16")
    assert [event["args"][2] for event in spy.all("draw")] == list(range(18))
    for event in spy.all("draw"):
        assert event["args"][1] == pytest.approx(expected, abs=1e-12)
    assert not spy.all("snapshot") + spy.all("solve")
    # validation rows are measured in fp32 whatever --dtype is
    dtypes = [event["args"][3] for event in spy.all("score")]
    assert dtypes == ["fp32", "bf16", "bf16", "fp32", "bf16", "bf16"]
