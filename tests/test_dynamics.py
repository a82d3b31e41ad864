"""DynaMiCS: slopes and the mixture by hand and against linprog, probes that leave no trace, the
choice of the checkpoint, the command."""

import contextlib
import copy
import json

import numpy as np
import pytest
import torch
import transformers
from conftest import (
    adamw,
    error_line,
    killed_at,
    own_nll,
    plain,
    read_json,
    records,
    same,
    state_of,
    values,
    weights,
    windowed,
)
from scipy.optimize import linprog, minimize

import common
import data
import dynamics

TOLERANCE = dynamics.FEASIBILITY_TOLERANCE

# ------------------------------------------------------------------------ slopes


def test_slope_matrix_by_hand():
    slopes = dynamics.slope_matrix([1.0, 2.0], [[0.5, 1.0, 1.5], [2.0, 4.0, 1.0]], 2)
    assert slopes.tolist() == [[-0.25, 0.0, 0.25], [0.0, 1.0, -0.5]]
    bad = [
        ([1.0], [[1.0], [2.0]], 1),
        ([1.0], [1.0], 1),
        ([1.0], [[1.0]], 0),
        ([1.0], [[float("nan")]], 1),
    ]
    for before, after, steps in bad:
        with pytest.raises(ValueError):
            dynamics.slope_matrix(before, after, steps)


def test_gradient_slopes_by_hand():
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([-3.0, 1.0])
    slopes = dynamics.gradient_slopes([one, two], [one], 0.1)
    assert slopes == pytest.approx(np.array([[-0.5], [0.1]]))
    assert dynamics.gradient_slopes([one], [one, two], 0.1).shape == (1, 2)


# ------------------------------------------------------------------------ the mixture


def solve(slopes, slack, targets, constraints):
    """The mixture for 10 steps from losses of 1, with levels `slack` above them."""
    losses = np.ones(len(slopes))
    return dynamics.solve_mixture(losses, slopes, losses + slack, targets, constraints, 10)


def test_solution_by_hand():
    # Dataset 0 helps the target (-0.3 a step) and hurts the constraint (+0.1); dataset 1 does
    # nothing to the target and -0.1 to the constraint. With no slack the constraint allows at most
    # half of dataset 0; with a slack of 0.5 over 10 steps 0.1 (2w - 1) <= 0.05, so w = 0.75.
    slopes = np.array([[-0.3, 0.0], [0.1, -0.1]])
    w, info = solve(slopes, 0.0, [0], [1])
    assert w == pytest.approx([0.5, 0.5], abs=0.01)
    assert info["feasible"]
    assert info["predicted"] == pytest.approx([1 + 10 * slopes[0] @ w, 1 + 10 * slopes[1] @ w])
    w, _ = solve(slopes, 0.5, [0], [1])
    assert w == pytest.approx([0.75, 0.25], abs=0.01)
    w, _ = solve(slopes, 5.0, [0], [1])  # nothing binds: the vertex
    assert w == pytest.approx([1.0, 0.0], abs=1e-6)
    w, _ = solve(slopes, -0.5, [0], [1])  # already above: room must be made
    assert w == pytest.approx([0.25, 0.75], abs=0.01)


def test_returned_lambda_and_epsilon_are_those_of_the_equation():
    """The weights minimise the paper's equation, with the λ and ε of info, on a fine grid of the
    simplex."""
    slopes = np.array([[-0.03, 0.001], [0.02, -0.01]])
    losses, reference, horizon = np.array([2.0, 1.5]), np.array([0.0, 1.52]), 20
    w, info = dynamics.solve_mixture(losses, slopes, reference, [0], [1], horizon)

    grid = np.linspace(0, 1, 20001)
    mixtures = np.stack([grid, 1 - grid])
    predicted = losses[1] + horizon * slopes[1] @ mixtures
    excess = np.maximum(0, predicted - reference[1] + info["epsilon"])
    best = grid[np.argmin(slopes[0] @ mixtures + info["lambda"] * excess**2)]
    assert w[0] == pytest.approx(best, abs=2e-3)
    assert info["feasible"]
    assert 0.1 < best < 0.9


@pytest.mark.parametrize(
    "slopes, slack, targets, constraints",
    [
        ([[-1.0], [2.0]], 0.0, [0], [1]),  # N = 1, infeasible
        ([[-0.5, -0.1, 0.3]], 0.0, [0], []),  # M = 1, no constraint
        ([[-0.5, -0.1, 0.3]], 0.0, [], [0]),  # M = 1, no target
        ([[0.0, 0.0], [0.0, 0.0]], 0.0, [0], [1]),  # nothing happens
        ([[-0.1, -0.1, -0.1], [0.2, 0.2, 0.2]], 0.0, [0], [1]),  # collinear, all infeasible
        ([[-1e-9, 1e-9], [1e-9, -1e-9]], 0.0, [0], [1]),  # tiny
        ([[-1e6, 1e6], [1e6, -1e6]], 0.0, [0], [1]),  # huge
    ],
)
def test_edge_cases_give_a_mixture(slopes, slack, targets, constraints):
    slopes = np.array(slopes)
    w, info = solve(slopes, slack, targets, constraints)
    assert w.shape == (slopes.shape[1],)
    assert np.isfinite(w).all()
    assert w.min() >= 0
    assert w.sum() == pytest.approx(1)
    assert np.isfinite(info["predicted"]).all()
    assert np.isfinite([info["lambda"], info["epsilon"], info["objective"]]).all()
    again, _ = solve(slopes, slack, targets, constraints)
    assert (w == again).all()
    if not constraints:
        assert w.tolist() == [1.0, 0.0, 0.0]
        assert info["feasible"]


def test_no_target_keeps_to_the_feasible_side():
    slopes = np.array([[-0.5, -0.1, 0.9]])
    w, info = solve(slopes, 0.0, [], [0])
    assert info["feasible"]
    assert slopes[0] @ w <= 1e-5


def test_solver_refuses_what_is_not_finite():
    flat, infinite = np.zeros((2, 2)), np.full((2, 2), np.inf)
    bad = [
        ([np.nan, 1], flat, [1, 1]),
        ([1, 1], infinite, [1, 1]),
        ([1, 1], flat, [1, np.nan]),
        ([1, 1, 1], flat, [1, 1]),
    ]
    for losses, slopes, reference in bad:
        with pytest.raises(ValueError):
            dynamics.solve_mixture(losses, slopes, reference, [0], [1], 10)
    _, info = dynamics.solve_mixture([1, 1], flat, [np.nan, 1], [0], [1], 10)
    assert info["feasible"]  # a target needs no level


def random_problem(rng, feasible):
    """The arguments of solve_mixture.

    The levels allow one random mixture, exactly or with a little room; or (not feasible) no mixture
    at all reaches them.
    """
    count, domains = rng.integers(2, 11), rng.integers(2, 14)
    target_count = rng.integers(1, domains)
    slopes = rng.normal(size=(domains, count)) * rng.choice([1e-3, 1e-2])
    losses, horizon = rng.uniform(0.5, 3, domains), int(rng.integers(1, 300))
    inside = losses + horizon * slopes @ rng.dirichlet(np.full(count, 0.3))
    if feasible:
        reference = inside + rng.choice([0.0, 1e-3, 1e-2])
    else:
        reference = losses + horizon * slopes.min(1) - rng.uniform(0.01, 1, domains)
    targets, constraints = list(range(target_count)), list(range(target_count, domains))
    return losses, slopes, reference, targets, constraints, horizon


def test_oracle_linear_programme():
    """On 200 feasible problems: really feasible, and within 5 % of the objective's spread of
    linprog's optimum."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        problem = random_problem(rng, True)
        losses, slopes, reference, targets, constraints, horizon = problem
        w, info = dynamics.solve_mixture(*problem)
        objective = slopes[targets].sum(0)
        room = (reference - losses)[constraints]
        simplex = dict(A_eq=np.ones((1, len(w))), b_eq=[1], bounds=(0, 1))
        exact = linprog(objective, A_ub=horizon * slopes[constraints], b_ub=room, **simplex)
        assert exact.status == 0
        assert info["feasible"]
        assert w.min() >= 0
        assert w.sum() == pytest.approx(1, abs=1e-12)
        excess = losses + horizon * slopes @ w - reference
        assert excess[constraints].max() <= TOLERANCE
        assert objective @ w <= exact.fun + 0.05 * np.ptp(objective)


def least_violation(a, b):
    """Minimum over the simplex of Σ (a w + b)₊².

    All levels are out of reach, so this is least squares, which trust-constr solves with the exact
    Hessian.
    """

    def excess(w):
        return np.maximum(a @ w + b, 0)

    count = a.shape[1]
    return minimize(
        lambda w: (excess(w) ** 2).sum(),
        np.full(count, 1 / count),
        jac=lambda w: 2 * a.T @ excess(w),
        hess=lambda w: 2 * a.T @ a,
        method="trust-constr",
        bounds=[(0, 1)] * count,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        options={"gtol": 1e-10, "maxiter": 300},
    ).fun


def test_oracle_least_violation():
    """On 60 infeasible problems: the sum of squared violations is the least there is (quadratic
    programme, by another solver)."""
    rng = np.random.default_rng(1)
    for _ in range(60):
        problem = random_problem(rng, False)
        losses, slopes, reference, _, constraints, horizon = problem
        w, info = dynamics.solve_mixture(*problem)
        a, b = horizon * slopes[constraints], (losses - reference)[constraints]
        violation = (np.maximum(a @ w + b, 0) ** 2).sum()
        assert not info["feasible"]
        assert violation <= least_violation(a, b) * 1.001 + 1e-6


def test_damping_and_fixed_mixtures_by_hand():
    assert dynamics.damp([1.0, 0.0], [0.5, 0.5], 0.0).tolist() == [1.0, 0.0]
    assert dynamics.damp([1.0, 0.0], [0.2, 0.8], 0.25) == pytest.approx([0.8, 0.2])
    sizes, serves = [10, 30, 20, 40], [True, False, False, True]
    assert dynamics.fixed_mixture(sizes, serves, "uniform").tolist() == [0.25] * 4
    assert dynamics.fixed_mixture(sizes, serves, "proportional").tolist() == [0.1, 0.3, 0.2, 0.4]
    assert dynamics.fixed_mixture(sizes, serves, "uniform", 0.5).tolist() == [0.25] * 4
    by_hand = [
        ("uniform", 0.2, [0.1, 0.4, 0.4, 0.1]),
        ("proportional", 0.5, [0.1, 0.3, 0.2, 0.4]),
        ("proportional", 0.0, [0, 0.6, 0.4, 0]),
    ]
    for kind, mass, expected in by_hand:
        assert dynamics.fixed_mixture(sizes, serves, kind, mass) == pytest.approx(expected)
    every = dynamics.fixed_mixture([10, 30], [True, True], "proportional", 1.0)
    assert every == pytest.approx([0.25, 0.75])
    for same_for_all, mass in (([False] * 4, 0.2), ([True] * 4, 0.8)):
        with pytest.raises(ValueError):
            dynamics.fixed_mixture(sizes, same_for_all, "uniform", mass)


def make_args(*flags):
    """Parsed flags, after derivation; add is the target and copy the constraint."""
    small = ["--template", "plain", "--micro_batch_size", "4", "--batch_size", "4"]
    roles = ["--targets", "add", "--constraints", "copy", "--dtype", "fp32"]
    return dynamics.parse_args([*small, *roles, *flags])


# ------------------------------------------------------------------------ schedules and cost


def test_update_steps():
    assert dynamics.update_steps("none", 96) == [0, 16, 32, 48, 64, 80]
    assert dynamics.update_steps("light", 96) == [0, 4, 8, 16, 32, 48, 64, 80]
    assert dynamics.update_steps("dense", 96) == [0, 1, 2, 4, 8, 16, 32, 48, 64, 80]
    assert dynamics.update_steps("light", 2048) == [0, 85, 171, 341, 683, 1024, 1365, 1707]
    assert dynamics.update_steps("5,9", 10) == [0, 5, 9]
    assert dynamics.update_steps("0", 1) == [0]
    for steps in (1, 2, 7, 100):
        for schedule in ("none", "light", "dense"):
            points = dynamics.update_steps(schedule, steps)
            assert points[0] == 0
            assert points == sorted(set(points))
            assert points[-1] < steps
    for bad in ("10", "-1", "often", "1,x"):
        with pytest.raises(ValueError):
            dynamics.update_steps(bad, 10)


def test_probe_rates_are_the_interval_in_miniature():
    rates = [0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4, 0.4]
    assert dynamics.probe_rates(rates, 4) == [0.2, 0.4, 0.4, 0.4]
    assert dynamics.probe_rates(rates, 1) == [0.4]
    # an interval shorter than the probe
    assert dynamics.probe_rates([0.1, 0.2], 4) == [0.1, 0.1, 0.2, 0.2]


def test_affordable_rows_by_hand():
    # Static run: 100 steps · 8 · 10 tokens (the shorter dataset) = 8,000; 1.5x less the margin
    # leaves 3,600. The probes of 4 updates train on 4 · 1 step · 8 · (10 + 20) = 960. An evaluated
    # row costs 0.4 (8 probes · 20 + 5 evaluations · 30) = 124 -> 21 rows.
    def rows(max_cost):
        args = make_args("--max_cost", max_cost, "--probe_steps", "1", "--batch_size", "8")
        return dynamics.affordable_rows(args, 100, 5, 4, [10, 20], [20, 30])

    assert rows("1.5") == 21
    assert rows("1.01") == dynamics.FEWEST_ROWS


# ------------------------------------------------------------------------ domains


def prompts(rows):
    return {row.prompt for row in rows}


def test_split_is_disjoint_by_prompt():
    rows = []
    for i in range(60):
        question, extra = i % 40, "extra" if i % 40 < 10 else ""
        rows.append(data.Row((("user", f"question {question}"),), f"answer {i}", extra))
    validation, test = dynamics.split_rows(rows, 0.5, "a")
    assert len(validation) + len(test) == 60
    assert {row.response for row in validation + test} == {f"answer {i}" for i in range(60)}
    assert not prompts(validation) & prompts(test)
    assert len(prompts(validation)) == 20
    assert dynamics.split_rows(rows, 0.5, "a") == (validation, test)
    assert dynamics.split_rows(rows, 0.5, "b") != (validation, test)
    fewer, _ = dynamics.split_rows(rows, 0.25, "a")
    assert len(prompts(fewer)) == 10
    assert fewer == validation[: len(fewer)]  # nested
    texts = [data.Row((), f"text {i}") for i in range(4)]
    assert len(dynamics.split_rows(texts, 0.5, "a")[0]) == 2  # no prompt: the text itself counts
    for few, fraction in ((rows[:1], 0.5), (rows, 0.0), (rows, 1.0)):
        with pytest.raises(data.UserError):
            dynamics.split_rows(few, fraction, "a")


def test_choice_error_by_hand():
    scores = [-1.0, -2.0, -3.0, -1.0, -0.5]
    assert dynamics.choice_error(scores, [2, 3], [0, 2]) == 0.0
    assert dynamics.choice_error(scores, [2, 3], [0, 1]) == 0.5
    assert dynamics.choice_error([-1.0, -1.0], [2], [1]) == 1.0  # of equal ones the first counts


def choice_rows(count):
    """Multiple-choice rows whose answers take turns."""
    choices, rows = ("yes", "no", "perhaps"), []
    for i in range(count):
        answer = dict(response=choices[i % 3], choices=choices, answer=i % 3)
        rows.append(data.Row((("user", f"Which {i}?"),), **answer))
    return rows


def test_losses_are_means_over_tokens_and_over_questions(tokenizer):
    """Both metrics against the model's own logits, one unpadded example after the other."""
    model = common.tiny_model(0).eval()
    words = ("one", "twenty two", "3", "four")
    rows = [data.Row((("user", f"Say {word}."),), word) for word in words]
    choices = choice_rows(6)
    flags = ["--micro_batch_size", "2", "--accuracy", "b"]
    args = make_args(*flags, "--targets", "a", "--constraints", "b")
    text = dynamics.make_domain(data.Dataset("a", rows), args, plain(tokenizer))
    questions = dynamics.make_domain(data.Dataset("b", choices), args, plain(tokenizer))
    loss, error = dynamics.validation_losses(model, [text, questions], args)

    total = sum(own_nll(model, example) for example in text.validation.examples)
    tokens = sum(example.response_length for example in text.validation.examples)
    assert loss == pytest.approx(total / tokens, rel=1e-5)

    validation, _ = dynamics.split_rows(choices, 0.5, "b")
    wrong = 0
    for row in validation:
        (parts,), _ = data.encode_choices([row], plain(tokenizer), 512)
        best = np.argmin([own_nll(model, example) for example in parts])
        wrong += best != row.answer
    assert error == pytest.approx(wrong / len(validation))
    assert questions.validation.sizes == [3] * 3

    dynamics.cut_validation(questions, 2)
    dynamics.cut_validation(text, 1)
    assert len(text.validation.examples) == 1
    assert len(questions.validation.examples) == 6
    assert len(questions.validation.answers) == 2


def domain(label, role, metric="nll"):
    nothing = dynamics.Side([], [], [], [])
    return dynamics.Domain(label, role, metric, nothing, nothing)


def test_reference_levels(tmp_path):
    file = tmp_path / "levels.json"
    file.write_text(json.dumps({"c": 0.5, "d": "-10%"}))
    rules = dynamics.parse_references(["a=1.25", "b=+2%", str(file)], list("abcde"))
    domains = [domain(label, "constraint") for label in "abcde"]
    levels = dynamics.reference_levels(domains, [1.0, 2.0, 3.0, 4.0, 5.0], rules)
    assert levels == pytest.approx([1.25, 2.04, 0.5, 3.6, 5.0])
    assert dynamics.parse_references(["x=y=1e-1"], ["x=y"]) == {"x=y": (0.1, False)}
    for bad in ("a=2%", "a=+2", "a=nan", "z=1", "a", str(tmp_path / "none.json")):
        with pytest.raises(data.UserError):
            dynamics.parse_references([bad], ["a"])


REPORTED = [
    domain("t", "target"),
    domain("u", "target"),
    domain("c", "constraint"),
    domain("w", "monitored"),
]


def test_violations_and_report_by_hand():
    reference = [0, 0, 1.0, 0]
    within = dynamics.violations(REPORTED, [9.0, 9.0, 1.00005, 9.0], reference)
    assert within == {}  # within the tolerance
    assert dynamics.violations(REPORTED, [9.0, 9.0, 1.25, 9.0], reference) == {"c": 0.25}

    def numbers(*losses):
        return {d.label: {"loss": loss, "nll": loss} for d, loss in zip(REPORTED, losses)}

    def report(after, rules, best):
        before = numbers(2.0, 1.0, 1.0, 1.0)
        return dynamics.final_report(REPORTED, before, numbers(*after), rules, best)

    best, good, too_high = {"step": 4}, [1.5, 0.9, 1.0, 5.0], [1.5, 0.9, 1.1, 5.0]
    result = report(good, {}, best)
    assert result["feasible"]
    reduction = 100 * (1 - np.exp(-0.3))  # mean change -0.6 / 2
    assert result["reduction_percent"] == pytest.approx(reduction)
    result = report(too_high, {}, best)
    assert not result["feasible"]
    assert result["reduction_percent"] == 0
    assert result["constraints"]["c"]["violation"] == pytest.approx(0.1)
    assert result["unconstrained_reduction_percent"] == pytest.approx(reduction)
    assert report(too_high, {"c": (0.1, True)}, best)["feasible"]
    assert not report(good, {}, None)["feasible"]  # nothing was chosen
    assert not report([2.5, 0.9, 1.0, 5.0], {}, best)["feasible"]  # the total rose


# ------------------------------------------------------------------------ probes


def row_numbers(batches):
    return [[example.row for example in batch] for batch in batches]


def test_probe_batches_hold_one_dataset_and_leave_no_cursor():
    examples = [data.Example(np.arange(3 + i), 1, i, 1) for i in range(20)]
    rows = row_numbers(dynamics.probe_batches(examples, 2, 8, seed=0, step=5, j=1))
    assert [len(batch) for batch in rows] == [8, 8]
    assert len(set(rows[0] + rows[1])) == 16
    assert rows == row_numbers(dynamics.probe_batches(examples, 2, 8, 0, 5, 1))
    assert rows != row_numbers(dynamics.probe_batches(examples, 2, 8, 0, 6, 1))
    # fewer examples than the probe takes: over again
    one, two = row_numbers(dynamics.probe_batches(examples[:3], 2, 4, 0, 0, 0))
    assert sorted(np.bincount(one + two).tolist()) == [2, 3, 3]


class Timers:
    """Stands in for common.Run where only the timer is used."""

    def timer(self, name):
        return contextlib.nullcontext()


@pytest.fixture(scope="module")
def train_examples(tokenizer):
    """Two training datasets, encoded."""
    loaded = data.load_data(["toy/add#20", "toy/copy#20"])
    return data.encode_datasets(loaded, plain(tokenizer), 512, quiet=True)


@pytest.fixture(scope="module")
def domains(tokenizer):
    """add is the target, copy the constraint."""
    loaded = data.load_data(["toy/add#16", "toy/copy#16"], split="eval")
    return [dynamics.make_domain(dataset, make_args(), plain(tokenizer)) for dataset in loaded]


def problem_of(train_examples, domains):
    """What a run of two datasets is given, as far as probes read it."""
    return dynamics.Problem(["add", "copy"], train_examples, domains, 10, [0, 7], None)


@pytest.mark.parametrize("warm", [False, True])
def test_probing_leaves_no_trace_and_measures_the_right_thing(train_examples, domains, warm):
    """Parameters, moments, learning rate, RNG and mode are as before, bit for bit; `after` is what
    a separate copy trained on the dataset's probe batches measures."""
    args, rates = make_args("--probe_steps", "2"), [1e-3, 5e-4]
    model = common.tiny_model(0).train()
    optimizer = adamw(model, 1e-3, 0.0)
    if warm:
        for examples in train_examples:
            common.backward(model, examples[:4], args)
            common.optimizer_step(model, optimizer, 1e-3, 1.0)
    torch.manual_seed(3)
    before = state_of(model, optimizer)
    problem = problem_of(train_examples, domains)
    interval = dynamics.Interval(7, rates, np.zeros(2))
    after = dynamics.probe(model, optimizer, problem, interval, args, Timers())
    assert same(before, state_of(model, optimizer))
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    for j in (1, 0):  # in the other order: one probe does not leak into the next
        clone = copy.deepcopy(model)
        own = adamw(clone, 1e-3, 0.0)
        own.load_state_dict(copy.deepcopy(before["optimizer"]))
        batches = dynamics.probe_batches(train_examples[j], 2, 4, 0, 7, j)
        for batch, rate in zip(batches, rates):
            common.backward(clone, batch, args)
            common.optimizer_step(clone, own, rate, 1.0)
        assert dynamics.validation_losses(clone, domains, args).tolist() == after[:, j].tolist()
    assert (after[:, 0] != after[:, 1]).all()


def test_gradient_alignment_predicts_a_plain_gradient_step(train_examples, domains):
    """S_ij of `align` is the change of L_i by a small step of plain gradient descent on dataset j
    (finite differences)."""
    args, lr = make_args("--batch_size", "8", "--probe_steps", "2"), 1e-4
    model = common.tiny_model(0).train()
    interval = dynamics.Interval(0, [lr, lr], np.zeros(2))
    slopes = dynamics.align(model, problem_of(train_examples, domains), interval, args, Timers())
    before = dynamics.validation_losses(model, domains, args)
    for j in range(2):
        clone = copy.deepcopy(model)
        batches = dynamics.probe_batches(train_examples[j], 2, 8, 0, 0, j)
        common.backward(clone, sum(batches, []), args)
        with torch.no_grad():
            for p in clone.parameters():
                p -= lr * p.grad
        change = dynamics.validation_losses(clone, domains, args) - before
        assert change == pytest.approx(slopes[:, j], rel=0.1)
    assert all(p.grad is None for p in model.parameters())
    assert model.training


# ------------------------------------------------------------------------ the command

GOLDEN = {
    "train/loss": [5.50412, 4.57538, 4.28701],
    "eval/add/nll": [5.56294, 4.35022],
    "slope/add/copy": [-0.25060],
}
QUICK = ["--model", "tiny", "--template", "plain", "--lr", "1e-3", "--eval_limit", "6"]
QUICK += ["--probe_steps", "1", "--log_every", "1"]
LABELS = ["add", "copy", "count"]
TOY = ["--data", "toy/add#40", "toy/copy#40", "toy/count"]
TOY += ["--eval_data", "toy/add#24", "toy/copy#24", "toy/count#24"]
TOY += ["--targets", "add", "--constraints", "copy", "--max_steps", "8", "--updates", "0,2,5"]
TOY += ["--seed", "3"]


def run(folder, *flags):
    dynamics.main([*QUICK, "--output_dir", str(folder), *flags])
    return read_json(folder / "summary.json")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dynamics") / "run"
    return folder, run(folder, *TOY)


def test_run_folder(finished):
    folder, summary = finished
    files = {"config.json", "metrics.jsonl", "summary.json", ".lock", "best", "final"}
    files.add("test_rows.jsonl")
    figures = {"losses.png", "mixture.png", "slopes.png", "prediction.png"}
    assert {path.name for path in folder.iterdir()} == files | figures
    assert (summary["steps"], summary["examples"]) == (8, 64)
    assert summary["eval"]["count"]["tokens"] > 0
    config = read_json(folder / "config.json")
    assert config["update_steps"] == [0, 2, 5]
    assert config["validation_rows"] == 6
    assert config["flags"]["lora_rank"] == 0
    time, cost = summary["time"], summary["cost"]["total"]
    assert {"train", "probe", "eval", "test"} <= set(time)
    # summary.json gives seconds to the millisecond
    rounding = 0.0005 * (2 + cost) / time["train"]
    expected = 1 + (time["probe"] + time["eval"]) / time["train"]
    assert cost == pytest.approx(expected, abs=1.1 * rounding)


def mixture_of(record):
    return {label: record[f"mixture/{label}"] for label in LABELS}


def drawn_of(record):
    """Examples drawn so far, by dataset."""
    return {label: record[f"share/{label}"] * record["examples"] for label in LABELS}


def test_metrics_are_consistent(finished):
    """Weights on the simplex; observed = difference of the losses at the updates; predicted = H S w
    with the logged S and w."""
    folder, _ = finished
    log = records(folder)
    updates = [record for record in log if "update/horizon" in record]
    assert [record["step"] for record in updates] == [0, 2, 5]
    assert [record["update/horizon"] for record in updates] == [2, 3, 3]
    losses = {record["step"]: record for record in log if "eval/add/nll" in record}
    assert sorted(losses) == [0, 2, 5, 8]
    for record, end in zip(updates, (2, 5, 8)):
        mixture = mixture_of(record)
        assert sum(mixture.values()) == pytest.approx(1)
        assert min(mixture.values()) >= 0
        before, after = losses[record["step"]], losses[end]
        for label in ("add", "copy"):
            slope = sum(record[f"slope/{label}/{j}"] * w for j, w in mixture.items())
            predicted = record["update/horizon"] * slope
            assert record[f"update/{label}/predicted"] == pytest.approx(predicted)
            observed = after[f"eval/{label}/nll"] - before[f"eval/{label}/nll"]
            assert after[f"update/{label}/observed"] == pytest.approx(observed)
        assert "slope/count/add" not in record  # monitored: reported, not part of the problem

    # between two updates nothing is drawn from a dataset of weight 0
    steps = [record for record in log if "train/loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 9))
    drawn = {record["step"]: drawn_of(record) for record in steps}
    drawn[0] = dict.fromkeys(LABELS, 0.0)
    unused = 0
    for record, end in zip(updates, (2, 5, 8)):
        for label, weight in mixture_of(record).items():
            if weight == 0:
                unused += 1
                assert drawn[end][label] == pytest.approx(drawn[record["step"]][label])
    assert unused
    assert sum(drawn_of(steps[-1]).values()) == pytest.approx(steps[-1]["examples"])


def test_golden_first_losses(finished):
    """Recorded from this implementation on CPU: a change of data order, masks, initialisation,
    slopes or loss shows here."""
    folder, _ = finished
    for key, expected in GOLDEN.items():
        assert values(folder, key)[: len(expected)] == pytest.approx(expected, abs=2e-4), key


def test_the_chosen_checkpoint_is_the_best_feasible_one(finished):
    """From the logged validation losses: feasible where the constraint holds and the target fell;
    best the lowest target. final/ is best/, and what the report says is what final/ does on the
    test rows."""
    folder, summary = finished
    losses = [record for record in records(folder) if "eval/add/nll" in record]
    level = losses[0]["eval/copy/nll"] + TOLERANCE
    fell = [record for record in losses if record["eval/add/nll"] < losses[0]["eval/add/nll"]]
    feasible = [record for record in fell if record["eval/copy/nll"] <= level]
    assert feasible
    assert [record for record in losses if record["eval/feasible"]] == feasible
    best = min(feasible, key=lambda record: record["eval/add/nll"])
    assert summary["report"]["step"] == best["step"]
    assert same(weights(folder), weights(folder, "best"))

    args = make_args("--micro_batch_size", "8")
    (dataset,) = data.load_data(["toy/add#24"], seed=3, split="eval")
    target = dynamics.make_domain(dataset, args, plain(common.tiny_tokenizer()))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "final")
    nll = dynamics.report_test(model, [target], args)["add"]["nll"]
    assert nll == pytest.approx(summary["report"]["targets"]["add"]["after"], rel=1e-6)


def test_one_dataset_is_the_fixed_mixture_bit_for_bit(tmp_path):
    """With N = 1 every mixture is the same: if probing left anything behind, the weights would
    differ."""
    probed, fixed = tmp_path / "probed", tmp_path / "fixed"
    flags = ["--data", "toy/add#40", "--eval_data", "toy/add#20", "toy/copy#20"]
    flags += ["--targets", "add", "--constraints", "copy", "--max_steps", "5", "--updates", "0,2,3"]
    run(probed, *flags)
    run(fixed, *flags, "--mixture", "uniform")
    for key in ("train/loss", "eval/copy/nll"):
        assert values(probed, key)
        assert values(probed, key) == values(fixed, key)
    assert same(weights(probed), weights(fixed))


def test_weights_are_followed(tmp_path):
    """All weight on one dataset by file: every example comes from it, and nothing is probed."""
    folder, mixture = tmp_path / "run", tmp_path / "mix.json"
    mixture.write_text(json.dumps({"add": 2, "copy": 0, "count": 0}))
    run(folder, *TOY, "--mixture", str(mixture))
    assert values(folder, "share/add") == [1.0] * 8
    assert values(folder, "share/copy") == [0.0] * 8
    assert values(folder, "share/count") == [0.0] * 8
    assert not (folder / "slopes.png").exists()
    assert not (folder / "prediction.png").exists()


@pytest.mark.parametrize("at, extra", [(4, []), (7, ["--save_every", "3"])])
def test_killed_and_resumed_is_bit_identical(tmp_path, finished, at, extra):
    """Killed between updates, after a best checkpoint and after a regular one: cursors, weights and
    best are kept."""
    folder, (whole, summary) = tmp_path / "run", finished
    with killed_at(at, "train/loss"):
        run(folder, *TOY, *extra)
    state = torch.load(folder / "checkpoint" / "state.pt", weights_only=True)
    assert 0 < state["counts"]["steps"] <= at
    assert state["cursors"].sum() == state["counts"]["examples"]
    assert state["best"]
    torch.rand(100)  # another place in the model's RNG
    resumed = run(folder, *TOY, *extra, "--resume")
    assert same(weights(folder), weights(whole))
    assert same(weights(folder, "best"), weights(whole, "best"))
    assert records(folder) == records(whole)
    for key in ("report", "validation", "eval", "eval_before", "examples", "tokens"):
        assert resumed[key] == summary[key], key


def test_resume_refuses_what_changes_the_choice(finished, capsys):
    folder, _ = finished
    before = (folder / "summary.json").read_bytes()
    cases = [
        (["--eval_every", "1"], "--eval_every was 0 and is now 1"),
        (["--targets", "count"], "--targets"),
    ]
    for flags, message in cases:
        assert message in error_line(capsys, run, folder, *TOY, *flags, "--resume")
    run(folder, *TOY, "--resume")
    assert "nothing to resume" in capsys.readouterr().out
    assert (folder / "summary.json").read_bytes() == before


def test_accuracy_lora_gradient_damping_and_monitored(tmp_path, write_jsonl):
    """Multiple-choice rows by 1 - accuracy, with a LoRA adapter, chosen and reloaded; gradient
    alignment with damping."""
    data = ["--data", "toy/add#20", "toy/copy#20", "--targets", "add"]
    steps = ["--max_steps", "4", "--updates", "0,2"]
    question = {"choices": ["yes", "no"]}
    rows = [{"question": f"Is {i} even?", "answer": i % 2, **question} for i in range(24)]
    choices = write_jsonl("mc.jsonl", rows)
    folder = tmp_path / "run"
    flags = ["--eval_data", "toy/add#20", choices, "--accuracy", "mc", "--lora_rank", "2"]
    flags += ["--constraints", "mc", "--reference", "mc=1"]
    summary = run(folder, *data, *steps, *flags)
    accuracy = summary["eval"]["mc"]["choice_accuracy"]
    assert 0 <= accuracy <= 1
    constraint = summary["report"]["constraints"]["mc"]
    assert constraint["reference"] == 1
    assert constraint["after"] == pytest.approx(1 - accuracy)
    assert summary["report"]["feasible_on_validation"]
    adapter = "adapter_model.safetensors"
    assert (folder / "final" / "adapter_config.json").exists()
    assert (folder / "best" / adapter).read_bytes() == (folder / "final" / adapter).read_bytes()
    errors = values(folder, "eval/mc/error")
    assert len(errors) == 3
    assert all(round(6 * error, 9) % 1 == 0 for error in errors)  # 6 validation questions

    folder = tmp_path / "gradient"
    flags = ["--eval_data", "toy/add#20", "toy/copy#20", "--constraints", "copy"]
    flags += ["--mixture", "gradient", "--damping", "0.5"]
    run(folder, *data, *steps, *flags)
    first = next(record for record in records(folder) if "update/horizon" in record)
    assert min(first["mixture/add"], first["mixture/copy"]) >= 0.25
    assert len(values(folder, "slope/copy/add")) == 2


def test_logged_losses_are_means_over_the_last_steps(tmp_path, finished):
    run(tmp_path / "run", *TOY, "--log_every", "3")
    logged = values(tmp_path / "run", "train/loss")
    assert logged == pytest.approx(windowed(finished[0], "train/loss", 3))
    assert len(logged) == 4


def test_warns_of_prompts_that_are_trained_on(tmp_path, write_jsonl, capsys):
    rows = [{"instruction": f"Say {i}.", "input": "", "output": str(i)} for i in range(12)]
    file = write_jsonl("rows.jsonl", rows)
    flags = ["--data", file, "--eval_data", f"held={file}", "--targets", "held"]
    run(tmp_path / "run", *flags, "--max_steps", "1")
    warning = "12 of 12 rows of evaluation set 'held' have a prompt that is trained on"
    assert warning in capsys.readouterr().out


ADD = ["--targets", "add"]
HALF = ["--mixture", "uniform", "--target_mass", "0.5"]


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "--targets: name at least one"),
        (["--targets", "nothing"], "no such label in --eval_data; there are add, copy"),
        ([*ADD, "--constraints", "add"], "'add' is both in --targets and in --constraints"),
        ([*ADD, "--accuracy", "add"], "no multiple-choice row"),
        ([*ADD, "--updates", "sometimes"], "neither none, light, dense"),
        ([*ADD, "--updates", "0,4"], "a step outside of 0 .. 3"),
        ([*ADD, "--mixture", "best"], "expected dynamics, gradient, uniform"),
        ([*ADD, "--mixture", "none.json"], "--mixture none.json: expected {label: weight}"),
        ([*ADD, "--target_mass", "0.5"], "--target_mass goes with"),
        (["--targets", "copy", *HALF], "no dataset serves a target"),
        ([*ADD, *HALF, "--target_data", "x"], "no such label in --data"),
        ([*ADD, "--constraints", "copy", "--reference", "copy=2%"], "expected a level like 1.25"),
        ([*ADD, "--reference", "copy=1"], "is no constraint"),
        ([*ADD, "--damping", "0.5", "--mixture", "uniform"], "--damping goes with"),
        ([*ADD, "--max_cost", "1"], "more than 1 is needed"),
        ([*ADD, "--validation_fraction", "1"], "cannot be split"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(tmp_path, capsys, flags, message):
    data = ["--data", "toy/add#8", "--eval_data", "toy/add#8", "toy/copy#8", "--max_steps", "4"]
    assert message in error_line(capsys, run, tmp_path / "run", *data, *flags)
    assert not (tmp_path / "run").exists()
