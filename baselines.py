"""What a sampler is, and the dynamic baselines of DynamixSFT's table.

  Sampler    what dynamix_sft.py asks for its mixture; --sampling names one
  MultiDDS   (arXiv 2004.06748) rewards a dataset by how well its gradient agrees with held-out ones
  MultiUAT   (arXiv 2109.02284) rewards it by the model's uncertainty on held-out rows
  HBO        (arXiv 2505.12300) rewards it by gradient norms, and within it groups of difficulty
All three learn by the same actor. The loop, the data order and the cost are dynamix_sft.py's; what
the papers leave open, and what we chose: docs/dynamix_sft.md.

Shapes: K datasets (arms), N examples of all of them, n of one, G groups of all datasets, M passes,
b examples of a batch, R response tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from argparse import Namespace
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import common
import ranks
from data import Example, UserError, data_rng

ACTOR_STEPS = 200  # of the actor's optimizer, an update
GROUPS, FEWEST = 4, 8  # of difficulty in a dataset; a dataset of fewer rows is one group
NORM_EXAMPLES, RATIO_EXAMPLES = 8, 16  # of a group, for HBO's global and local rewards
MOST_HELD_OUT, HELD_OUT_SHARE = 32, 10  # rows of a dataset; one row in ten


# ---- What a sampler is ---------------------------------------------------------------------------
class Sampler:
    """Decides with which probability each dataset is drawn. This one: in proportion to its size.

    Given    arms {label: examples}, the K datasets in order, to be read only; args, the flags.
    Asked    mixture() at the start and after every update; update() after every --update_every
             steps but the last, where `every`, the default of that flag, is not 0.
    Returns  probabilities (K,); of an update the rewards (K,) that led to it, which are logged.
    Kept     state(), a dict of arrays, is what a checkpoint has of it; load() takes it back.

    values (K,) is logged beside the mixture. parts: of each dataset the groups of its examples that
    are trained on, as index arrays; None until split() has looked at the model before training."""

    every = 0

    def __init__(self, arms: dict[str, Sequence[Example]], args: Namespace):
        self.arms, self.args, self.labels = arms, args, list(arms)
        self.values = np.zeros(len(arms))
        self.train_on([np.arange(len(examples)) for examples in arms.values()])

    def train_on(self, rows: list[np.ndarray]) -> None:
        """Of each dataset these examples, in one group."""
        self.parts = [[part] for part in rows]
        self.sizes = np.array([len(part) for part in rows])
        self.proportions = self.sizes / self.sizes.sum()

    def mixture(self) -> np.ndarray:
        return self.proportions

    def update(self, model, optimizer, step: int, lr: float) -> np.ndarray:
        """Look at the model after `step` steps and leave it as it is; lr: of the next step."""
        raise NotImplementedError

    def state(self) -> dict[str, np.ndarray]:
        return {"values": self.values}

    def load(self, state: dict[str, np.ndarray]) -> None:
        self.values = state["values"]

    # What a sampler with groups of its own needs besides.
    def split(self, model) -> None:
        """Make the parts, before the first step."""

    def group_mixture(self) -> np.ndarray:
        """Probability of every group, all of a dataset's before the next one's -> (G,)"""
        return self.mixture()

    def groups(self) -> list[np.ndarray]:
        """Their examples, as indices into all examples, dataset after dataset."""
        lengths = [len(examples) for examples in self.arms.values()]
        starts, result = np.cumsum(lengths) - lengths, []
        for start, parts in zip(starts, self.parts):
            result += [start + part for part in parts]
        return result

    def metrics(self) -> dict[str, float]:
        """What is logged with the mixture."""
        record = common.by_label("value", self.labels, self.values)
        return record | common.by_label("mixture", self.labels, self.mixture())


class Uniform(Sampler):
    """Every dataset equally often."""

    def mixture(self) -> np.ndarray:
        return np.full(len(self.labels), 1 / len(self.labels))


class Fixed(Sampler):
    """By the weights in a file. A resumed run goes on with those of its start."""

    def __init__(self, arms: dict[str, Sequence[Example]], args: Namespace):
        super().__init__(arms, args)
        self.weights = common.read_weights(args.sampling, "--sampling", self.labels)

    def mixture(self) -> np.ndarray:
        return self.weights

    def state(self) -> dict[str, np.ndarray]:
        return {"weights": self.weights}

    def load(self, state: dict[str, np.ndarray]) -> None:
        self.weights = state["weights"]


@contextlib.contextmanager
def no_trace(model) -> Iterator[None]:
    """What is measured inside, with or without gradients, in whichever mode, leaves the model's
    modes and the RNG as they were, and no gradient."""
    rng, modes = common.rng_state(), [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        model.zero_grad(set_to_none=True)
        ranks.reshard(common.causal_lm(model))
        common.set_rng_state(rng)


def total_variation(probabilities, sizes) -> float:
    """How far a mixture is from the sizes' shares: 1/2 Σ |p - s/Σs|, 0 to 1. (K,), (K,)"""
    sizes = np.asarray(sizes, dtype=np.float64)
    return float(np.abs(probabilities - sizes / sizes.sum()).sum() / 2)


# ---- The actor of all three ----------------------------------------------------------------------
def softmax(logits) -> np.ndarray:
    """(K,) -> (K,), sums to 1."""
    weights = np.exp(np.asarray(logits, dtype=np.float64) - np.max(logits))
    return weights / weights.sum()


def actor_start(sizes) -> np.ndarray:
    """An actor at the sizes' shares: w = log p0. sizes (K,) positive -> (4, K) float64, rows: w,
    Adam's two moments, Adam's steps so far."""
    sizes = np.asarray(sizes, dtype=np.float64)
    return np.stack([np.log(sizes / sizes.sum()), *np.zeros((3, len(sizes)))])


def actor_gradient(logits, rewards) -> np.ndarray:
    """Of -Σ_k r_k log softmax(w)_k, which is p Σr - r: 0 where p = r / Σr. (K,), (K,) -> (K,)"""
    return softmax(logits) * np.sum(rewards) - rewards


def actor_update(actor, rewards, steps: int = ACTOR_STEPS, lr: float = 1e-4) -> np.ndarray:
    """The actor after `steps` of Adam (β 0.9 and 0.999, ε 1e-8) on rewards that stay. The objective
    is an expectation: nothing is drawn. A logit moves by steps · lr at most, more after a change of
    sign.

    actor (4, K), rewards (K,) -> (4, K). Raises ValueError where a reward is not finite."""
    logits, mean, square, taken = np.array(actor, dtype=np.float64)
    rewards = np.asarray(rewards, dtype=np.float64)
    if rewards.shape != logits.shape or not np.isfinite(rewards).all():
        raise ValueError(f"expected {len(logits)} finite rewards, found {rewards}")
    for _ in range(steps):
        gradient = actor_gradient(logits, rewards)
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        taken = taken + 1
        direction = mean / (1 - 0.9**taken) / (np.sqrt(square / (1 - 0.999**taken)) + 1e-8)
        logits = logits - lr * direction
    return np.stack([logits, mean, square, taken])


class ActorSampler(Sampler):
    """A sampler whose mixture is the softmax of an actor that learns from rewards."""

    def train_on(self, rows: list[np.ndarray]) -> None:
        super().train_on(rows)
        self.load({"actor": actor_start(self.sizes)})

    def mixture(self) -> np.ndarray:
        return softmax(self.values)

    def update(self, model, optimizer, step: int, lr: float) -> np.ndarray:
        with no_trace(model):
            rewards = self.rewards(model, step)
        self.load({"actor": actor_update(self.state()["actor"], rewards, lr=self.args.actor_lr)})
        return rewards

    def rewards(self, model, step: int) -> np.ndarray:
        """Of all datasets after `step` steps -> (K,). Raises UserError naming a dataset."""
        raise NotImplementedError

    def state(self) -> dict[str, np.ndarray]:
        return {"actor": self.actor}

    def load(self, state: dict[str, np.ndarray]) -> None:
        self.actor, self.values = state["actor"], state["actor"][0]


def check_finite(value: float, label: str, step: int) -> float:
    """Raises UserError where the value is not finite, naming dataset and step."""
    if not math.isfinite(value):
        advice = "training diverged; lower --lr (the last checkpoint is kept)"
        raise UserError(f"reward of dataset {label!r} after step {step}: {value}; {advice}")
    return value


# ---- MultiDDS and MultiUAT: held-out rows --------------------------------------------------------
def held_out_rows(size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a dataset of `size` >= 2 that are set aside, one in ten, at least 1 and at most 32,
    and those that are trained on -> two index arrays, in order."""
    order = rng.permutation(size)
    count = max(1, min(MOST_HELD_OUT, size // HELD_OUT_SHARE))
    return np.sort(order[:count]), np.sort(order[count:])


class HeldOutSampler(ActorSampler):
    """An actor whose rewards are measured on rows that are set aside from training."""

    def __init__(self, arms: dict[str, Sequence[Example]], args: Namespace):
        super().__init__(arms, args)
        self.held_out, trained = [], []
        for k, (label, examples) in enumerate(arms.items()):
            if len(examples) < 2:
                problem = "has one row, of which none can be held out; leave it out, or add rows"
                raise UserError(f"--sampling {args.sampling}: dataset {label!r} {problem}")
            held, others = held_out_rows(len(examples), data_rng(args.seed, "held_out", k))
            self.held_out.append(held)
            trained.append(others)
        self.train_on(trained)
        counts = [f"{len(held)} of {label}" for held, label in zip(self.held_out, arms)]
        print(f"data  held out from training, for the rewards: {', '.join(counts)}")

    def some(self, k: int, rows: np.ndarray, *position) -> list[Example]:
        """--reward_batch_size of these rows of dataset k, or all where there are fewer. position:
        what the draw depends on besides the seed."""
        rng = data_rng(self.args.seed, self.args.sampling, *position, k)
        chosen, examples = rng.permutation(rows), self.arms[self.labels[k]]
        return [examples[i] for i in chosen[: self.args.reward_batch_size]]


def inner(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Σ one · other over all parameters and ranks, summed in float64."""
    products = []
    for a, b in zip(one, other, strict=True):
        products.append((ranks.local(a) * ranks.local(b)).sum(dtype=torch.float64))
    return float(ranks.all_sum(torch.stack(products).sum()))


def gradients(model, examples: Sequence[Example], args: Namespace) -> list[Tensor]:
    """Of the mean loss over the response tokens, parameter by parameter; the model's own, valid
    until the next call."""
    model.zero_grad(set_to_none=True)
    common.backward(model, examples, args)
    parameters = common.trainable(model)
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


def add_direction(total: Sequence[Tensor], gradient: Sequence[Tensor], share: float) -> float:
    """total += share · g / |g|, in place -> |g|. A gradient of norm 0 has no direction."""
    norm = math.sqrt(inner(gradient, gradient))
    for sum_, part in zip(total, gradient):
        sum_.add_(part, alpha=share / norm if norm else 0.0)
    return norm


def mean_cosine(direction: Sequence[Tensor], gradient: Sequence[Tensor]) -> float:
    """r = <g, h> / |h|: the mean over i of cos(g_i, h), where direction is the mean g of all
    g_i / |g_i|. Tensors parameter by parameter. 0 where h has norm 0."""
    norm = math.sqrt(inner(gradient, gradient))
    return inner(direction, gradient) / norm if norm else 0.0


class MultiDDS(HeldOutSampler):
    """r_j: mean over i of the cosine between the gradient of a training batch of dataset j and that
    of a held-out batch of dataset i. K + K backward passes and two gradients in memory: the mean
    held-out direction, and the one that is being taken."""

    every = 1000

    def rewards(self, model, step: int) -> np.ndarray:
        direction = [torch.zeros_like(p) for p in common.trainable(model)]
        rewards, share = np.zeros(len(self.labels)), 1 / len(self.labels)
        for k, label in enumerate(self.labels):
            batch = self.some(k, self.held_out[k], step, 0)
            norm = add_direction(direction, gradients(model, batch, self.args), share)
            check_finite(norm, label, step)
        for k, label in enumerate(self.labels):
            batch = self.some(k, self.parts[k][0], step, 1)
            rewards[k] = mean_cosine(direction, gradients(model, batch, self.args))
            check_finite(rewards[k], label, step)
        return rewards


@torch.no_grad()
def prediction(hidden: Tensor, head: common.Head) -> tuple[Tensor, Tensor]:
    """Of the model's prediction at every response token: entropy -Σ_v p_v log p_v (nats), and the
    log of its largest probability. (R, H) -> (R,), (R,) fp32, a chunk of logits at a time."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    entropy, log_max = torch.empty((2, len(hidden)), dtype=wide, device=hidden.device)
    for (rows,) in common.row_blocks(len(hidden), head):
        log_p = torch.log_softmax(head.logits(hidden[rows]), 1)  # (r, V)
        entropy[rows], log_max[rows] = -(log_p.exp() * log_p).sum(1), log_p.amax(1)
    return entropy, log_max


def expected_entropy(entropy) -> float:
    """ENTTP: mean over passes and examples. entropy (M, b): mean over an example's tokens, nats."""
    return float(np.mean(entropy))


def expected_probability(log_max) -> float:
    """EXPTP: 1 - mean over passes and examples of exp(mean log max-probability). log_max (M, b):
    mean over an example's tokens of the log of the prediction's largest probability."""
    return float(1 - np.exp(log_max).mean())


@torch.no_grad()
def predictions(model, examples: Sequence[Example], args: Namespace) -> np.ndarray:
    """One pass in the mode that the model is in -> (2, b): each example's mean entropy and mean log
    max-probability over its response tokens."""
    result, lengths = np.zeros((2, len(examples))), [len(example.ids) for example in examples]
    size = 2 * args.micro_batch_size
    for part in common.micro_batches(range(len(examples)), lengths, size):
        batch = common.collate([examples[i] for i in part], model.device)
        found = prediction(*common.response_states(model, batch, args.dtype))
        for row, tokens in enumerate(found):
            by_example = tokens.double().cpu().split(batch.response_lengths.tolist())
            result[row, part] = [own.mean().item() for own in by_example]
    return ranks.all_sum(result)


def monte_carlo(model, examples: Sequence[Example], args: Namespace) -> np.ndarray:
    """--mc_passes with dropout on -> (2, M, b); one, M = 1, where the model drew no random number,
    since all would be equal."""
    model.train()
    before = common.rng_state()
    passes = [predictions(model, examples, args)]
    if ranks.all_max(np.array([not common.same_rng(before)])).any():
        passes += [predictions(model, examples, args) for _ in range(args.mc_passes - 1)]
    return np.stack(passes, axis=1)


class MultiUAT(HeldOutSampler):
    """r_k: the model's uncertainty on a held-out batch of dataset k, with dropout, no gradient."""

    every = 1000

    def __init__(self, arms: dict[str, Sequence[Example]], args: Namespace):
        super().__init__(arms, args)
        self.said = False

    def rewards(self, model, step: int) -> np.ndarray:
        rewards = np.zeros(len(self.labels))
        for k, label in enumerate(self.labels):
            batch = self.some(k, self.held_out[k], step)
            entropy, log_max = monte_carlo(model, batch, self.args)  # (M, b) each
            if not self.said and len(entropy) < self.args.mc_passes:
                tqdm.write("reward: the model has no dropout: one pass, since all would be equal")
                self.said = True
            by_entropy = self.args.uncertainty == "entropy"
            value = expected_entropy(entropy) if by_entropy else expected_probability(log_max)
            rewards[k] = check_finite(value, label, step)
        return rewards


# ---- HBO: two levels -----------------------------------------------------------------------------
def cut(values: np.ndarray, counts) -> list[np.ndarray]:
    """Split along the last axis into parts of these lengths."""
    return np.split(values, np.cumsum(counts)[:-1], axis=-1)


def instruction_following_difficulty(loss, loss_alone) -> np.ndarray:
    """IFD = PPL(y|x) / PPL(y). loss, loss_alone (n,): mean loss per response token (nats) with and
    without the instruction. Above 1 the instruction does not help. -> (n,)"""
    difference = np.asarray(loss, dtype=np.float64) - np.asarray(loss_alone, dtype=np.float64)
    return np.exp(np.minimum(difference, 700))


def difficulty_groups(difficulty, count: int = GROUPS, fewest: int = FEWEST) -> list[np.ndarray]:
    """Cut a dataset into `count` groups of near-equal size, the easiest first; one group where it
    has fewer than `fewest` rows. difficulty (n,) -> index arrays, each in order."""
    order = np.argsort(difficulty, kind="stable")
    sizes = common.deal(len(order), count if len(order) >= fewest else 1)
    return [np.sort(part) for part in cut(order, sizes)]


def perplexity_ratios(loss, start_loss, groups: list) -> np.ndarray:
    """Local rewards r_m = PPL(y|x; θ) / PPL(y|x; θ_0), the mean over a group's examples, divided by
    its mean over the groups. loss, start_loss (b,): mean loss per response token of each example
    now and before training; groups: index arrays into them -> (M,)"""
    difference = np.asarray(loss, dtype=np.float64) - np.asarray(start_loss, dtype=np.float64)
    ratios = np.exp(np.minimum(difference, 700))
    means = np.array([ratios[part].mean() for part in groups])
    return means / means.mean()


def response_alone(example: Example) -> Example:
    """The response behind the first token of its example, which has the place of a BOS: the same
    tokens are supervised."""
    return Example(np.concatenate([example.ids[:1], example.ids[example.start :]]), 1, example.row)


def whole_text(example: Example) -> Example:
    """All its tokens but the first supervised."""
    return Example(example.ids, 1, example.row)


def mean_losses(model, examples: Sequence[Example], args: Namespace, progress="") -> np.ndarray:
    """Mean loss per response token (nats) of each example, in evaluation mode -> (n,)"""
    size = 2 * args.micro_batch_size
    nll, tokens, _ = common.score(model, examples, size, args.dtype, progress)
    return nll / tokens


class HBO(ActorSampler):
    """A global actor over the datasets, r_k the mean norm of single examples' gradients over the
    groups; a local one in each dataset over its groups of difficulty. Draws k, then the group."""

    every = 200

    def __init__(self, arms: dict[str, Sequence[Example]], args: Namespace):
        super().__init__(arms, args)
        self.parts = None

    def split(self, model) -> None:
        """Two passes over the data, with the model before training."""
        losses, alone = [], []
        with no_trace(model):
            for label, examples in self.arms.items():
                losses.append(mean_losses(model, examples, self.args, f"difficulty of {label}"))
                bare = [response_alone(example) for example in examples]
                alone.append(mean_losses(model, bare, self.args, f"responses of {label}"))
        self.start_loss = np.concatenate(losses)
        self.difficulty = instruction_following_difficulty(self.start_loss, np.concatenate(alone))
        self.regroup()
        self.local = np.hstack([actor_start([*map(len, parts)]) for parts in self.parts])
        means = [own.mean() for own in cut(self.difficulty, self.sizes)]
        found = [f"{label} {mean:.3f}" for label, mean in zip(self.labels, means)]
        print(f"hbo   mean difficulty PPL(y|x) / PPL(y): {', '.join(found)}")

    def regroup(self) -> None:
        self.parts = [difficulty_groups(own) for own in cut(self.difficulty, self.sizes)]

    def by_dataset(self, local: np.ndarray) -> list[np.ndarray]:
        """(..., G) -> of each dataset (..., M_k)."""
        return cut(local, [*map(len, self.parts)])

    def update(self, model, optimizer, step: int, lr: float) -> np.ndarray:
        self.local_rewards = []
        rewards, actors = super().update(model, optimizer, step, lr), []
        for actor, own in zip(self.by_dataset(self.local), self.local_rewards):
            actors.append(actor_update(actor, own, lr=self.args.actor_lr))
        self.local = np.hstack(actors)
        return rewards

    def rewards(self, model, step: int) -> np.ndarray:
        rewards, start_losses = np.zeros(len(self.labels)), cut(self.start_loss, self.sizes)
        model.eval()
        for k, (label, examples) in enumerate(self.arms.items()):
            chosen = []
            for m, part in enumerate(self.parts[k]):
                chosen.append(data_rng(self.args.seed, "hbo", step, k, m).permutation(part))
            norms = []
            for part in chosen:
                few = [examples[i] for i in part[:NORM_EXAMPLES]]
                norms.append(np.mean(gradient_norms(model, few, self.args)))
            rewards[k] = check_finite(np.mean(norms), label, step)
            chosen = [part[:RATIO_EXAMPLES] for part in chosen]
            rows = np.concatenate(chosen)
            losses = mean_losses(model, [examples[i] for i in rows], self.args)
            groups = cut(np.arange(len(rows)), [*map(len, chosen)])
            own = perplexity_ratios(losses, start_losses[k][rows], groups)
            check_finite(own.sum(), label, step)
            self.local_rewards.append(own)
        return rewards

    def group_mixture(self) -> np.ndarray:
        parts = zip(self.mixture(), self.by_dataset(self.local[0]))
        return np.concatenate([p * softmax(logits) for p, logits in parts])

    def metrics(self) -> dict[str, float]:
        """group/<label>/<m>: probability of group m within its dataset, 1 the easiest."""
        record = super().metrics()
        for label, logits in zip(self.labels, self.by_dataset(self.local[0])):
            record |= common.by_label(f"group/{label}", range(1, 1 + len(logits)), softmax(logits))
        return record

    def state(self) -> dict[str, np.ndarray]:
        own = {"local": self.local, "difficulty": self.difficulty, "start_loss": self.start_loss}
        return super().state() | own

    def load(self, state: dict[str, np.ndarray]) -> None:
        super().load(state)
        if "local" in state:  # a checkpoint's
            self.local, self.difficulty = state["local"], state["difficulty"]
            self.start_loss = state["start_loss"]
            self.regroup()


def gradient_norms(model, examples: Sequence[Example], args: Namespace) -> list[float]:
    """|∇ℓ(x)| of each example alone, ℓ the mean loss over its whole text."""
    norms = []
    for example in examples:
        found = gradients(model, [whole_text(example)], args)
        norms.append(math.sqrt(inner(found, found)))
    return norms
