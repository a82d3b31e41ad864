"""DynaMiCS: slopes and the mixture by hand and against linprog, probes that leave no trace, the choice of the checkpoint, the command."""
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from scipy.optimize import linprog, minimize

import common
import dynamics

# ---------------------------------------------------------------------------------------------------- slopes


def test_slope_matrix_by_hand():
    slopes = dynamics.slope_matrix([1.0, 2.0], [[0.5, 1.0, 1.5], [2.0, 4.0, 1.0]], 2)
    assert slopes.tolist() == [[-0.25, 0.0, 0.25], [0.0, 1.0, -0.5]]
    for before, after, steps in (([1.0], [[1.0], [2.0]], 1), ([1.0], [1.0], 1), ([1.0], [[1.0]], 0), ([1.0], [[float("nan")]], 1)):
        with pytest.raises(ValueError):
            dynamics.slope_matrix(before, after, steps)


def test_gradient_slopes_by_hand():
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([-3.0, 1.0])
    assert dynamics.gradient_slopes([one, two], [one], 0.1) == pytest.approx(np.array([[-0.5], [0.1]]))
    assert dynamics.gradient_slopes([one], [one, two], 0.1).shape == (1, 2)


# ---------------------------------------------------------------------------------------------------- the mixture


def solve(slopes, slack, targets, constraints, horizon=10, losses=None):
    losses = np.ones(len(slopes)) if losses is None else losses
    return dynamics.solve_mixture(losses, slopes, losses + slack, targets, constraints, horizon)


def test_solution_by_hand():
    # dataset 0 helps the target (-0.3 a step) and hurts the constraint (+0.1), dataset 1 does nothing to the target and -0.1 to it:
    # with no slack the constraint allows at most half of dataset 0; with a slack of 0.5 over 10 steps 0.1 (2w - 1) <= 0.05, w = 0.75
    slopes = np.array([[-0.3, 0.0], [0.1, -0.1]])
    weights, info = solve(slopes, 0.0, [0], [1])
    assert weights == pytest.approx([0.5, 0.5], abs=0.01) and info["feasible"]
    assert info["predicted"] == pytest.approx([1 + 10 * slopes[0] @ weights, 1 + 10 * slopes[1] @ weights])
    weights, _ = solve(slopes, 0.5, [0], [1])
    assert weights == pytest.approx([0.75, 0.25], abs=0.01)
    weights, _ = solve(slopes, 5.0, [0], [1])  # nothing binds: the vertex
    assert weights == pytest.approx([1.0, 0.0], abs=1e-6)
    assert solve(slopes, -0.5, [0], [1])[0] == pytest.approx([0.25, 0.75], abs=0.01)  # already above: room must be made


def test_returned_lambda_and_epsilon_are_those_of_the_equation():
    """The weights minimise the equation as METHODS.md writes it, with the λ and ε of info, on a fine grid of the simplex."""
    slopes = np.array([[-0.03, 0.001], [0.02, -0.01]])
    losses, reference, horizon = np.array([2.0, 1.5]), np.array([0.0, 1.52]), 20
    weights, info = dynamics.solve_mixture(losses, slopes, reference, [0], [1], horizon)

    def equation(w):
        predicted = losses + horizon * slopes @ w
        return slopes[0] @ w + info["lambda"] * max(0, predicted[1] - reference[1] + info["epsilon"]) ** 2

    grid = np.linspace(0, 1, 20001)
    best = grid[np.argmin([equation(np.array([w, 1 - w])) for w in grid])]
    assert weights[0] == pytest.approx(best, abs=2e-3) and info["feasible"] and 0.1 < best < 0.9


@pytest.mark.parametrize("slopes, slack, targets, constraints", [
    ([[-1.0], [2.0]], 0.0, [0], [1]),                                # N = 1, infeasible
    ([[-0.5, -0.1, 0.3]], 0.0, [0], []),                             # M = 1, no constraint
    ([[-0.5, -0.1, 0.3]], 0.0, [], [0]),                             # M = 1, no target
    ([[0.0, 0.0], [0.0, 0.0]], 0.0, [0], [1]),                       # nothing happens
    ([[-0.1, -0.1, -0.1], [0.2, 0.2, 0.2]], 0.0, [0], [1]),          # collinear, all infeasible
    ([[-1e-9, 1e-9], [1e-9, -1e-9]], 0.0, [0], [1]),                 # tiny
    ([[-1e6, 1e6], [1e6, -1e6]], 0.0, [0], [1]),                     # huge
])
def test_edge_cases_give_a_mixture(slopes, slack, targets, constraints):
    slopes = np.array(slopes)
    weights, info = solve(slopes, slack, targets, constraints)
    assert weights.shape == (slopes.shape[1],) and weights.min() >= 0 and weights.sum() == pytest.approx(1) and np.isfinite(weights).all()
    assert np.isfinite(info["predicted"]).all() and np.isfinite([info["lambda"], info["epsilon"], info["objective"]]).all()
    again, _ = solve(slopes, slack, targets, constraints)
    assert (weights == again).all()
    if not constraints:
        assert weights.tolist() == [1.0, 0.0, 0.0] and info["feasible"]


def test_no_target_keeps_to_the_feasible_side():
    weights, info = solve(np.array([[-0.5, -0.1, 0.9]]), 0.0, [], [0])
    assert info["feasible"] and -0.5 * weights[0] - 0.1 * weights[1] + 0.9 * weights[2] <= 1e-5


def test_solver_refuses_what_is_not_finite():
    for losses, slopes, reference in (([np.nan, 1], np.zeros((2, 2)), [1, 1]), ([1, 1], np.full((2, 2), np.inf), [1, 1]),
                                      ([1, 1], np.zeros((2, 2)), [1, np.nan]), ([1, 1, 1], np.zeros((2, 2)), [1, 1])):
        with pytest.raises(ValueError):
            dynamics.solve_mixture(losses, slopes, reference, [0], [1], 10)
    assert dynamics.solve_mixture([1, 1], np.zeros((2, 2)), [np.nan, 1], [0], [1], 10)[1]["feasible"]  # a target needs no level


def random_problem(rng, feasible):
    count, domains = rng.integers(2, 11), rng.integers(2, 14)
    target_count = rng.integers(1, domains)
    slopes = rng.normal(size=(domains, count)) * rng.choice([1e-3, 1e-2])
    losses, horizon = rng.uniform(0.5, 3, domains), int(rng.integers(1, 300))
    # the levels allow one random mixture, exactly or with a little room; or (not feasible) no mixture at all reaches them
    inside = losses + horizon * slopes @ rng.dirichlet(np.full(count, 0.3))
    reference = inside + rng.choice([0.0, 1e-3, 1e-2]) if feasible else losses + horizon * slopes.min(1) - rng.uniform(0.01, 1, domains)
    return losses, slopes, reference, list(range(target_count)), list(range(target_count, domains)), horizon


def test_oracle_linear_programme():
    """On 200 feasible problems: really feasible, and within 5 % of the objective's spread of linprog's optimum."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        losses, slopes, reference, targets, constraints, horizon = random_problem(rng, True)
        weights, info = dynamics.solve_mixture(losses, slopes, reference, targets, constraints, horizon)
        objective = slopes[targets].sum(0)
        exact = linprog(objective, A_ub=horizon * slopes[constraints], b_ub=reference[constraints] - losses[constraints],
                        A_eq=np.ones((1, len(weights))), b_eq=[1], bounds=(0, 1))
        assert exact.status == 0 and info["feasible"] and weights.min() >= 0 and weights.sum() == pytest.approx(1, abs=1e-12)
        assert (losses + horizon * slopes @ weights - reference)[constraints].max() <= dynamics.FEASIBILITY_TOLERANCE
        assert objective @ weights <= exact.fun + 0.05 * np.ptp(objective)


def test_oracle_least_violation():
    """On 60 infeasible problems: the sum of squared violations is the least there is (quadratic programme, by another solver)."""
    rng = np.random.default_rng(1)
    for _ in range(60):
        losses, slopes, reference, targets, constraints, horizon = random_problem(rng, False)
        weights, info = dynamics.solve_mixture(losses, slopes, reference, targets, constraints, horizon)
        a, b = horizon * slopes[constraints], (losses - reference)[constraints]

        def violation(w):
            return (np.maximum(a @ w + b, 0) ** 2).sum()

        # all levels are out of reach: the squared violation is least squares, which trust-constr solves with the exact Hessian
        exact = minimize(violation, np.full(len(weights), 1 / len(weights)), jac=lambda w: 2 * a.T @ np.maximum(a @ w + b, 0),
                         hess=lambda w: 2 * a.T @ a, method="trust-constr", bounds=[(0, 1)] * len(weights), options={"gtol": 1e-10, "maxiter": 300},
                         constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like})
        assert not info["feasible"] and violation(weights) <= exact.fun * 1.001 + 1e-6


def test_damping_and_fixed_mixtures_by_hand():
    assert dynamics.damp([1.0, 0.0], [0.5, 0.5], 0.0).tolist() == [1.0, 0.0]
    assert dynamics.damp([1.0, 0.0], [0.2, 0.8], 0.25) == pytest.approx([0.8, 0.2])
    sizes, serves = [10, 30, 20, 40], [True, False, False, True]
    assert dynamics.fixed_mixture(sizes, serves, "uniform").tolist() == [0.25] * 4
    assert dynamics.fixed_mixture(sizes, serves, "proportional").tolist() == [0.1, 0.3, 0.2, 0.4]
    assert dynamics.fixed_mixture(sizes, serves, "uniform", 0.5).tolist() == [0.25] * 4
    assert dynamics.fixed_mixture(sizes, serves, "uniform", 0.2) == pytest.approx([0.1, 0.4, 0.4, 0.1])
    assert dynamics.fixed_mixture(sizes, serves, "proportional", 0.5) == pytest.approx([0.1, 0.3, 0.2, 0.4])
    assert dynamics.fixed_mixture(sizes, serves, "proportional", 0.0) == pytest.approx([0, 0.6, 0.4, 0])
    assert dynamics.fixed_mixture([10, 30], [True, True], "proportional", 1.0) == pytest.approx([0.25, 0.75])
    for none, mass in (([False] * 4, 0.2), ([True] * 4, 0.8)):
        with pytest.raises(ValueError):
            dynamics.fixed_mixture(sizes, none, "uniform", mass)


# ---------------------------------------------------------------------------------------------------- schedules and cost


def test_update_steps():
    assert dynamics.update_steps("none", 96) == [0, 16, 32, 48, 64, 80]
    assert dynamics.update_steps("light", 96) == [0, 4, 8, 16, 32, 48, 64, 80]
    assert dynamics.update_steps("dense", 96) == [0, 1, 2, 4, 8, 16, 32, 48, 64, 80]
    assert dynamics.update_steps("light", 2048) == [0, 85, 171, 341, 683, 1024, 1365, 1707]
    assert dynamics.update_steps("5,9", 10) == [0, 5, 9] and dynamics.update_steps("0", 1) == [0]
    for steps in (1, 2, 7, 100):
        for schedule in ("none", "light", "dense"):
            points = dynamics.update_steps(schedule, steps)
            assert points[0] == 0 and points == sorted(set(points)) and points[-1] < steps
    for bad in ("10", "-1", "often", "1,x"):
        with pytest.raises(ValueError):
            dynamics.update_steps(bad, 10)


def test_probe_rates_are_the_interval_in_miniature():
    rates = [0.1, 0.2, 0.3, 0.4, 0.4, 0.4, 0.4, 0.4]
    assert dynamics.probe_rates(rates, 4) == [0.2, 0.4, 0.4, 0.4] and dynamics.probe_rates(rates, 1) == [0.4]
    assert dynamics.probe_rates([0.1, 0.2], 4) == [0.1, 0.1, 0.2, 0.2]  # an interval shorter than the probe


def test_affordable_rows_by_hand():
    # static run: 100 steps · 8 · 10 tokens (the shorter dataset) = 8,000; 1.5x less the margin leaves 3,600; the probes of 4 updates train on
    # 4 · 1 step · 8 · (10 + 20) = 960; an evaluated row costs 0.4 (8 probes · 20 + 5 evaluations · 30) = 124 -> 21 rows
    assert dynamics.affordable_rows(1.5, 100, 5, 4, 1, 8, [10, 20], 20, 30) == 21
    assert dynamics.affordable_rows(1.01, 100, 5, 4, 1, 8, [10, 20], 20, 30) == dynamics.FEWEST_ROWS


# ---------------------------------------------------------------------------------------------------- domains


def test_split_is_disjoint_by_prompt():
    rows = [common.Row((("user", f"question {i % 40}"),), f"answer {i}", "extra" if i % 40 < 10 else "") for i in range(60)]
    validation, test = dynamics.split_rows(rows, 0.5, "a")
    assert len(validation) + len(test) == 60 and {row.response for row in validation + test} == {row.response for row in rows}
    assert not {dynamics.prompt_of(row) for row in validation} & {dynamics.prompt_of(row) for row in test}
    assert len({dynamics.prompt_of(row) for row in validation}) == 20
    assert dynamics.split_rows(rows, 0.5, "a") == (validation, test) and dynamics.split_rows(rows, 0.5, "b") != (validation, test)
    assert dynamics.split_rows(rows, 0.25, "a")[0] == validation[:len(dynamics.split_rows(rows, 0.25, "a")[0])]  # nested
    texts = [common.Row((), f"text {i}") for i in range(4)]  # plain text has no prompt: the text itself counts
    assert len(dynamics.split_rows(texts, 0.5, "a")[0]) == 2
    for few, fraction in ((rows[:1], 0.5), (rows, 0.0), (rows, 1.0)):
        with pytest.raises(common.UserError):
            dynamics.split_rows(few, fraction, "a")


def test_choice_error_by_hand():
    assert dynamics.choice_error([-1.0, -2.0, -3.0, -1.0, -0.5], [2, 3], [0, 2]) == 0.0
    assert dynamics.choice_error([-1.0, -2.0, -3.0, -1.0, -0.5], [2, 3], [0, 1]) == 0.5
    assert dynamics.choice_error([-1.0, -1.0], [2], [1]) == 1.0  # of equal ones the first counts


def test_measure_is_the_mean_over_tokens_and_over_questions(tokenizer):
    """Both metrics against the model's own logits, one unpadded example after the other."""
    model = common.tiny_model(0).eval()
    rows = [common.Row((("user", f"Say {word}."),), word) for word in ("one", "twenty two", "3", "four")]
    choices = [common.Row((("user", f"Which {i}?"),), ("yes", "no", "perhaps")[i % 3], choices=("yes", "no", "perhaps"), answer=i % 3) for i in range(6)]
    args = SimpleNamespace(template="plain", max_length=512, micro_batch_size=2, dtype="fp32", validation_fraction=0.5, targets=["a"],
                           constraints=["b"], accuracy=["b"])
    domains = [dynamics.make_domain(common.Dataset(label, part), args, tokenizer) for label, part in (("a", rows), ("b", choices))]

    def nll(example):
        ids = torch.from_numpy(example.ids)[None]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0].double()
        return torch.nn.functional.cross_entropy(logits[example.start - 1:-1], ids[0, example.start:], reduction="sum").item()

    loss, error = dynamics.measure(model, domains, args)
    assert loss == pytest.approx(sum(map(nll, domains[0].validation)) / sum(e.response_tokens for e in domains[0].validation), rel=1e-5)
    validation = dynamics.split_rows(choices, 0.5, "b")[0]
    wrong = 0
    for row in validation:
        parts, _ = common.encode_choices([row], tokenizer, "plain", 512)
        wrong += int(np.argmin([nll(example) for example in parts[0]])) != row.answer
    assert error == pytest.approx(wrong / len(validation)) and domains[1].sizes["validation"] == [3] * 3
    dynamics.cut_validation(domains[1], 2)
    dynamics.cut_validation(domains[0], 1)
    assert [len(domain.validation) for domain in domains] == [1, 6] and len(domains[1].answers["validation"]) == 2


def domain(label, role, metric="nll"):
    return dynamics.Domain(label, role, metric, [], [], [], {}, {})


def test_reference_levels(tmp_path):
    file = tmp_path / "levels.json"
    file.write_text(json.dumps({"c": 0.5, "d": "-10%"}))
    rules = dynamics.parse_references(["a=1.25", "b=+2%", str(file)], ["a", "b", "c", "d", "e"])
    domains = [domain(label, "constraint") for label in "abcde"]
    assert dynamics.reference_levels(domains, [1.0, 2.0, 3.0, 4.0, 5.0], rules) == pytest.approx([1.25, 2.04, 0.5, 3.6, 5.0])
    assert dynamics.parse_references(["x=y=1e-1"], ["x=y"]) == {"x=y": (0.1, False)}
    for bad in (["a=2%"], ["a=+2"], ["a=nan"], ["z=1"], ["a"], [str(tmp_path / "none.json")]):
        with pytest.raises(common.UserError):
            dynamics.parse_references(bad, ["a"])


def test_violations_and_report_by_hand():
    domains = [domain("t", "target"), domain("u", "target"), domain("c", "constraint"), domain("w", "watched")]
    assert dynamics.violations(domains, [9.0, 9.0, 1.00005, 9.0], [0, 0, 1.0, 0]) == {}  # within the tolerance
    assert dynamics.violations(domains, [9.0, 9.0, 1.25, 9.0], [0, 0, 1.0, 0]) == {"c": 0.25}

    def numbers(*losses):
        return {d.label: {"loss": loss, "nll": loss} for d, loss in zip(domains, losses)}

    before, best = numbers(2.0, 1.0, 1.0, 1.0), {"step": 4}
    report = dynamics.final_report(domains, before, numbers(1.5, 0.9, 1.0, 5.0), {}, best)
    assert report["feasible"] and report["reduction_percent"] == pytest.approx(100 * (1 - np.exp(-0.3)))  # mean change -0.6 / 2
    report = dynamics.final_report(domains, before, numbers(1.5, 0.9, 1.1, 5.0), {}, best)
    assert not report["feasible"] and report["reduction_percent"] == 0 and report["constraints"]["c"]["violation"] == pytest.approx(0.1)
    assert report["unconstrained_reduction_percent"] > 25
    assert dynamics.final_report(domains, before, numbers(1.5, 0.9, 1.1, 5.0), {"c": (0.1, True)}, best)["feasible"]
    assert not dynamics.final_report(domains, before, numbers(1.5, 0.9, 1.0, 5.0), {}, None)["feasible"]   # nothing was chosen
    assert not dynamics.final_report(domains, before, numbers(2.5, 0.9, 1.0, 5.0), {}, best)["feasible"]   # the total rose


# ---------------------------------------------------------------------------------------------------- probes


def test_probe_batches_hold_one_dataset_and_leave_no_cursor():
    examples = [common.Example(np.arange(3 + i), 1, i, 1) for i in range(20)]
    batches = dynamics.probe_batches(examples, 2, 8, seed=0, step=5, j=1)
    assert [len(batch) for batch in batches] == [8, 8] and len({e.row for batch in batches for e in batch}) == 16
    rows = [[e.row for e in batch] for batch in batches]
    assert rows == [[e.row for e in batch] for batch in dynamics.probe_batches(examples, 2, 8, 0, 5, 1)]
    assert rows != [[e.row for e in batch] for batch in dynamics.probe_batches(examples, 2, 8, 0, 6, 1)]
    small = dynamics.probe_batches(examples[:3], 2, 4, 0, 0, 0)  # fewer examples than the probe takes: over again
    assert sorted(np.bincount([e.row for batch in small for e in batch]).tolist()) == [2, 3, 3]


class Timers:
    """Stands in for common.Run where only the timer is used."""
    def timer(self, name):
        import contextlib
        return contextlib.nullcontext()


@pytest.mark.parametrize("warm", [False, True])
def test_probing_leaves_no_trace_and_measures_the_right_thing(tokenizer, warm):
    """Parameters, moments, learning rate, RNG and mode are as before, bit for bit; `after` is what a separate copy trained on the
    dataset's probe batches measures."""
    import copy
    args = SimpleNamespace(template="plain", max_length=512, micro_batch_size=4, dtype="fp32", validation_fraction=0.5, targets=["add"],
                           constraints=["copy"], accuracy=[], batch_size=4, seed=0, max_grad_norm=1.0)
    model = common.tiny_model(0).train()
    optimizer = common.make_optimizer(model, 1e-3, 0.0)
    examples = common.encode_datasets(common.load_data(["toy/add#20", "toy/copy#20"]), tokenizer, "plain", 512, quiet=True)
    domains = [dynamics.make_domain(dataset, args, tokenizer) for dataset in common.load_data(["toy/add#16", "toy/copy#16"], split="eval")]
    if warm:
        for batch in (examples[0][:4], examples[1][:4]):
            dynamics.backward(model, batch, args)
            common.optimizer_step(model, optimizer, 1e-3, 1.0)
    torch.manual_seed(3)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
    after = dynamics.probe(model, optimizer, examples, domains, 7, [1e-3, 5e-4], args, Timers())
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), model.state_dict().values())) and model.training
    assert torch.equal(before[2], torch.get_rng_state())
    moments = optimizer.state_dict()
    assert moments["param_groups"] == before[1]["param_groups"] and moments["state"].keys() == before[1]["state"].keys()
    assert all(torch.equal(value, moments["state"][i][key]) for i, state in before[1]["state"].items() for key, value in state.items())
    assert all(p.grad is None for p in model.parameters())
    for j in (1, 0):  # in the other order: one probe does not leak into the next
        clone = copy.deepcopy(model)
        own = common.make_optimizer(clone, 1e-3, 0.0)
        own.load_state_dict(copy.deepcopy(before[1]))
        for batch, rate in zip(dynamics.probe_batches(examples[j], 2, 4, 0, 7, j), [1e-3, 5e-4]):
            dynamics.backward(clone, batch, args)
            common.optimizer_step(clone, own, rate, 1.0)
        assert dynamics.measure(clone, domains, args).tolist() == after[:, j].tolist()
    assert (after[:, 0] != after[:, 1]).all()


def test_gradient_alignment_predicts_a_plain_gradient_step(tokenizer):
    """S_ij of `align` is the change of L_i by a small step of plain gradient descent on dataset j (finite differences)."""
    import copy
    args = SimpleNamespace(template="plain", max_length=512, micro_batch_size=4, dtype="fp32", validation_fraction=0.5, targets=["add"],
                           constraints=["copy"], accuracy=[], batch_size=8, seed=0, max_grad_norm=1.0)
    model = common.tiny_model(0).train()
    examples = common.encode_datasets(common.load_data(["toy/add#20", "toy/copy#20"]), tokenizer, "plain", 512, quiet=True)
    domains = [dynamics.make_domain(dataset, args, tokenizer) for dataset in common.load_data(["toy/add#16", "toy/copy#16"], split="eval")]
    lr = 1e-4
    slopes = dynamics.align(model, examples, domains, 0, [lr, lr], args, Timers())
    before = dynamics.measure(model, domains, args)
    for j in range(2):
        clone = copy.deepcopy(model)
        dynamics.backward(clone, sum(dynamics.probe_batches(examples[j], 2, 8, 0, 0, j), []), args)
        with torch.no_grad():
            for p in clone.parameters():
                p -= lr * p.grad
        assert dynamics.measure(clone, domains, args) - before == pytest.approx(slopes[:, j], rel=0.1)
    assert all(p.grad is None for p in model.parameters()) and model.training


# ---------------------------------------------------------------------------------------------------- the command

GOLDEN = {"loss": [5.53388, 4.59787, 4.18992], "eval": [5.57934, 4.40463], "slope": [-0.19235]}
QUICK = ["--model", "tiny", "--template", "plain", "--lr", "1e-3", "--eval_limit", "6", "--probe_steps", "1", "--log_every", "1"]
TOY = ["--data", "toy/add#40", "toy/copy#40", "toy/count", "--eval_data", "toy/add#24", "toy/copy#24", "toy/count#24", "--targets", "add",
       "--constraints", "copy", "--max_steps", "8", "--updates", "0,2,5"]


def run(folder, *flags):
    dynamics.main([*QUICK, "--output_dir", str(folder), *flags])
    return json.loads((Path(folder) / "summary.json").read_text())


def records(folder):
    """metrics.jsonl without the timers."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if not key.startswith("time/")} for line in lines]


def values(folder, key):
    return [record[key] for record in records(folder) if key in record]


def weights(folder, name="final"):
    return transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / name).state_dict()


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dynamics") / "run"
    return folder, run(folder, *TOY)


def test_run_folder(finished):
    folder, summary = finished
    assert {path.name for path in folder.iterdir()} == {"config.json", "metrics.jsonl", "summary.json", "losses.png", "weights.png", "slopes.png",
                                                         "prediction.png", "checkpoint", "best", "final"}
    assert summary["steps"] == 8 and summary["examples"] == 64 and summary["eval"]["count"]["tokens"] > 0
    assert {"train", "probe", "eval", "test"} <= set(summary["time"])
    config = json.loads((folder / "config.json").read_text())
    assert config["update_steps"] == [0, 2, 5] and config["validation_rows"] == 6 and config["flags"]["lora_rank"] == 0
    time = summary["time"]
    rounding = 0.0005 * (2 + summary["cost"]["total"]) / time["train"]  # summary.json gives seconds to the millisecond
    assert summary["cost"]["total"] == pytest.approx(1 + (time["probe"] + time["eval"]) / time["train"], abs=1.1 * rounding)


def test_metrics_are_consistent(finished):
    """Weights on the simplex; observed = difference of the losses at the updates; predicted = H S w with the logged S and w."""
    folder, _ = finished
    log = records(folder)
    updates = [record for record in log if "update/horizon" in record]
    assert [record["step"] for record in updates] == [0, 2, 5] and [record["update/horizon"] for record in updates] == [2, 3, 3]
    losses = {record["step"]: record for record in log if "eval/add/nll" in record}
    assert sorted(losses) == [0, 2, 5, 8]
    for record, after in zip(updates, (2, 5, 8)):
        mixture = {label: record[f"mixture/{label}"] for label in ("add", "copy", "count")}
        assert sum(mixture.values()) == pytest.approx(1) and min(mixture.values()) >= 0
        for label in ("add", "copy"):
            predicted = record["update/horizon"] * sum(record[f"slope/{label}/{j}"] * w for j, w in mixture.items())
            assert record[f"update/{label}/predicted"] == pytest.approx(predicted)
            observed = losses[after][f"eval/{label}/nll"] - losses[record["step"]][f"eval/{label}/nll"]
            assert losses[after][f"update/{label}/observed"] == pytest.approx(observed)
        assert "slope/count/add" not in record  # watched: reported, not part of the problem
    # between two updates nothing is drawn from a dataset of weight 0, also not by batches that were drawn ahead
    assert [record["step"] for record in log if "train/loss" in record] == list(range(1, 9))
    drawn = {0: dict.fromkeys(("add", "copy", "count"), 0.0)}
    for record in log:
        if "train/loss" in record:
            drawn[record["step"]] = {label: record[f"share/{label}"] * record["examples"] for label in drawn[0]}
    unused = [(record["step"], after, label) for record, after in zip(updates, (2, 5, 8)) for label in drawn[0] if record[f"mixture/{label}"] == 0]
    assert unused and all(drawn[after][label] == pytest.approx(drawn[first][label]) for first, after, label in unused)
    last = [record for record in log if "train/loss" in record][-1]
    assert sum(last[f"share/{label}"] for label in ("add", "copy", "count")) == pytest.approx(1)


def test_golden_first_losses(finished):
    """Recorded from this implementation on CPU: a change of data order, masks, initialisation, slopes or loss shows here."""
    folder, _ = finished
    assert values(folder, "train/loss")[:3] == pytest.approx(GOLDEN["loss"], abs=2e-4)
    assert values(folder, "eval/add/nll")[:2] == pytest.approx(GOLDEN["eval"], abs=2e-4)
    assert values(folder, "slope/add/copy")[:1] == pytest.approx(GOLDEN["slope"], abs=2e-4)


def test_the_chosen_checkpoint_is_the_best_feasible_one(finished):
    """From the logged validation losses: feasible where the constraint holds and the target fell; best the lowest target. final/ is
    best/, and what the report says is what final/ does on the test rows."""
    folder, summary = finished
    losses = [record for record in records(folder) if "eval/add/nll" in record]
    level = losses[0]["eval/copy/nll"]
    feasible = [record for record in losses if record["eval/copy/nll"] <= level + dynamics.FEASIBILITY_TOLERANCE
                and record["eval/add/nll"] < losses[0]["eval/add/nll"]]
    assert [record["step"] for record in losses if record["eval/feasible"]] == [record["step"] for record in feasible] != []
    assert summary["report"]["step"] == min(feasible, key=lambda record: record["eval/add/nll"])["step"]
    assert same(weights(folder), weights(folder, "best"))
    args = SimpleNamespace(template="plain", max_length=512, micro_batch_size=8, dtype="fp32", validation_fraction=0.5, targets=["add"],
                           constraints=["copy"], accuracy=[])
    dataset = common.load_data(["toy/add#24"], split="eval")[0]
    domain = dynamics.make_domain(dataset, args, common.tiny_tokenizer())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "final")
    assert dynamics.report_test(model, [domain], args)["add"]["nll"] == pytest.approx(summary["report"]["targets"]["add"]["after"], rel=1e-6)


def test_one_dataset_is_the_fixed_mixture_bit_for_bit(tmp_path):
    """With N = 1 every mixture is the same: if probing left anything behind, the weights would differ."""
    flags = ["--data", "toy/add#40", "--eval_data", "toy/add#20", "toy/copy#20", "--targets", "add", "--constraints", "copy", "--max_steps", "5",
             "--updates", "0,2,3"]
    run(tmp_path / "probed", *flags)
    run(tmp_path / "fixed", *flags, "--mixture", "uniform")
    assert values(tmp_path / "probed", "train/loss") == values(tmp_path / "fixed", "train/loss")
    assert values(tmp_path / "probed", "eval/copy/nll") == values(tmp_path / "fixed", "eval/copy/nll")
    assert same(weights(tmp_path / "probed"), weights(tmp_path / "fixed"))


def test_weights_are_followed(tmp_path):
    """All weight on one dataset by file: every example comes from it, and the loss is that of plain training on its batches."""
    (tmp_path / "mix.json").write_text(json.dumps({"add": 2, "copy": 0, "count": 0}))
    run(tmp_path / "run", *TOY, "--mixture", str(tmp_path / "mix.json"))
    last = records(tmp_path / "run")
    shares = [[record[f"share/{label}"] for label in ("add", "copy", "count")] for record in last if "train/loss" in record]
    assert shares == [[1.0, 0.0, 0.0]] * 8
    assert not (tmp_path / "run" / "slopes.png").exists() and not (tmp_path / "run" / "prediction.png").exists()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at, extra", [(4, []), (7, ["--save_every", "3"])])
def test_killed_and_resumed_is_bit_identical(tmp_path, monkeypatch, finished, at, extra):
    """Killed between updates, after a best checkpoint and after a regular one: drawn but unused batches, weights and best are kept."""
    log = common.Run.log

    def kill(self, step, values, line=None):
        log(self, step, values, line)
        if step == at and "train/loss" in values:
            raise Killed

    monkeypatch.setattr(common.Run, "log", kill)
    with pytest.raises(Killed):
        run(tmp_path / "run", *TOY, *extra)
    monkeypatch.setattr(common.Run, "log", log)
    state = torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)
    assert 0 < state["counts"]["step"] <= at and state["queue"] and state["best"]
    torch.rand(100)  # another place in the model's RNG
    run(tmp_path / "run", *TOY, *extra, "--resume")
    assert same(weights(tmp_path / "run"), weights(finished[0])) and same(weights(tmp_path / "run", "best"), weights(finished[0], "best"))
    assert records(tmp_path / "run") == records(finished[0])
    one, other = (json.loads((folder / "summary.json").read_text()) for folder in (tmp_path / "run", finished[0]))
    assert all(one[key] == other[key] for key in ("report", "validation", "eval", "eval_before", "examples", "tokens"))


def test_resume_refuses_what_changes_the_choice(finished, capsys):
    folder, _ = finished
    before = (folder / "summary.json").read_bytes()
    for flags, message in ((["--eval_every", "1"], "--eval_every was 0 and is now 1"), (["--targets", "count"], "--targets")):
        with pytest.raises(SystemExit) as exit:
            run(folder, *TOY, *flags, "--resume")
        assert exit.value.code == 2 and message in capsys.readouterr().err
    run(folder, *TOY, "--resume")
    assert "nothing to resume" in capsys.readouterr().out and (folder / "summary.json").read_bytes() == before


def test_accuracy_lora_gradient_damping_and_watched(tmp_path, write_jsonl):
    """Multiple-choice rows by 1 - accuracy, with a LoRA adapter, chosen and reloaded; gradient alignment with damping."""
    choices = write_jsonl("mc.jsonl", [{"question": f"Is {i} even?", "choices": ["yes", "no"], "answer": i % 2} for i in range(24)])
    summary = run(tmp_path / "run", "--data", "toy/add#20", "toy/copy#20", "--eval_data", "toy/add#20", choices, "--targets", "add",
                  "--constraints", "mc", "--accuracy", "mc", "--reference", "mc=1", "--max_steps", "4", "--updates", "0,2", "--lora_rank", "2")
    assert 0 <= summary["eval"]["mc"]["choice_accuracy"] <= 1 and summary["report"]["constraints"]["mc"]["reference"] == 1
    assert summary["report"]["constraints"]["mc"]["after"] == pytest.approx(1 - summary["eval"]["mc"]["choice_accuracy"])
    assert summary["report"]["feasible_on_validation"] and (tmp_path / "run" / "final" / "adapter_config.json").exists()
    best, final = ((tmp_path / "run" / name / "adapter_model.safetensors").read_bytes() for name in ("best", "final"))
    assert best == final
    errors = values(tmp_path / "run", "eval/mc/error")
    assert len(errors) == 3 and all(round(6 * error, 9) % 1 == 0 for error in errors)  # 6 validation questions
    summary = run(tmp_path / "gradient", "--data", "toy/add#20", "toy/copy#20", "--eval_data", "toy/add#20", "toy/copy#20", "--targets", "add",
                  "--constraints", "copy", "--max_steps", "4", "--updates", "0,2", "--mixture", "gradient", "--damping", "0.5")
    mixtures = [[record["mixture/add"], record["mixture/copy"]] for record in records(tmp_path / "gradient") if "update/horizon" in record]
    assert min(mixtures[0]) >= 0.25 and "slope/copy/add" in "".join(key for record in records(tmp_path / "gradient") for key in record)


def test_warns_of_prompts_that_are_trained_on(tmp_path, write_jsonl, capsys):
    file = write_jsonl("rows.jsonl", [{"instruction": f"Say {i}.", "input": "", "output": str(i)} for i in range(12)])
    run(tmp_path / "run", "--data", file, "--eval_data", f"held={file}", "--targets", "held", "--max_steps", "1")
    assert "12 of 12 rows of evaluation set 'held' have a prompt that is trained on" in capsys.readouterr().out


@pytest.mark.parametrize("flags, message", [
    ([], "--targets: name at least one"),
    (["--targets", "nothing"], "no such label in --eval_data; there are add, copy"),
    (["--targets", "add", "--constraints", "add"], "'add' is both in --targets and in --constraints"),
    (["--targets", "add", "--accuracy", "add"], "no multiple-choice row"),
    (["--targets", "add", "--updates", "sometimes"], "neither none, light, dense"),
    (["--targets", "add", "--updates", "0,4"], "a step outside of 0 .. 3"),
    (["--targets", "add", "--mixture", "best"], "expected dynamics, gradient, uniform"),
    (["--targets", "add", "--mixture", "none.json"], "--mixture none.json: expected {label: weight}"),
    (["--targets", "add", "--target_mass", "0.5"], "--target_mass goes with"),
    (["--targets", "copy", "--mixture", "uniform", "--target_mass", "0.5"], "no dataset serves a target"),
    (["--targets", "add", "--mixture", "uniform", "--target_mass", "0.5", "--target_data", "x"], "no such label in --data"),
    (["--targets", "add", "--constraints", "copy", "--reference", "copy=2%"], "expected a level like 1.25"),
    (["--targets", "add", "--reference", "copy=1"], "is no constraint"),
    (["--targets", "add", "--damping", "0.5", "--mixture", "uniform"], "--damping goes with"),
    (["--targets", "add", "--max_cost", "1"], "more than 1 is needed"),
    (["--targets", "add", "--validation_fraction", "1"], "cannot be split"),
])
def test_errors_are_one_line_and_leave_nothing(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as exit:
        run(tmp_path / "run", "--data", "toy/add#8", "--eval_data", "toy/add#8", "toy/copy#8", "--max_steps", "4", *flags)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit.value.code == 2 and error.startswith("error: ") and message in error and not (tmp_path / "run").exists()
