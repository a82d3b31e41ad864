"""Runs of the scripts seen from outside: what reaches the loss and the optimizer, step by step."""

import importlib
from dataclasses import dataclass, field

import pytest
import torch

import common
import sftmix

TOKENIZER = common.tiny_tokenizer()  # of all models that conftest.model_folder saves


def text(ids):
    return TOKENIZER.decode(ids, skip_special_tokens=True)


@dataclass
class Loss:
    """A call of sftmix.sftmix_loss."""

    texts: list[str]  # the response of each example, "" for a missing partner
    lam: list[float]
    mu: float
    sums: list[float]  # loss, ntp, mixup


@dataclass
class Step:
    """An optimizer step."""

    micros: list[list[list[int]]] = field(default_factory=list)  # ids by micro-batch and example
    texts: list[str] = field(default_factory=list)  # the responses trained on
    losses: list[Loss] = field(default_factory=list)
    dtypes: set = field(default_factory=set)  # what the layers under the head compute in
    rates: set = field(default_factory=set)  # learning rates when AdamW steps
    norm: float = 0.0
    before: dict = field(default_factory=dict)  # name -> weights; likewise the next three
    gradients: dict = field(default_factory=dict)
    after: dict = field(default_factory=dict)
    moments: dict = field(default_factory=dict)  # Adam's first
    model: torch.nn.Module = None

    @property
    def pairs(self):
        """[(confident response, unconfident response, λ)]"""
        found = []
        for loss in self.losses:
            half = len(loss.texts) // 2
            found += zip(loss.texts[:half], loss.texts[half:], loss.lam)
        return found


def copied(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def traced(script, *flags):
    """Run `python <script>.py flags` -> its optimizer steps. What is done without a gradient
    (evaluation, perplexities) is not in them."""
    steps, now = [], Step()
    originals = {name: getattr(common, name) for name in SPIES}
    sftmix_loss, adamw_step = sftmix.sftmix_loss, torch.optim.AdamW.step

    def check_gradients(*args):
        originals["check_gradients"](*args)
        now.__init__()

    def collate(examples, device):
        if torch.is_grad_enabled():
            present = [example for example in examples if example is not None]
            now.micros.append([example.ids.tolist() for example in present])
            now.texts.extend(text(example.ids[example.start :]) for example in present)
        return originals["collate"](examples, device)

    def response_states(model, *rest):
        linear = next(m for m in model.modules() if isinstance(m, torch.nn.Linear))
        seen = set()
        hook = linear.register_forward_hook(lambda *call: seen.add(call[2].dtype))
        found = originals["response_states"](model, *rest)
        hook.remove()
        if torch.is_grad_enabled():
            now.dtypes |= seen
        return found

    def loss(hidden, targets, lengths, lam, weight, mu, *more, **options):
        sums = sftmix_loss(hidden, targets, lengths, lam, weight, mu, *more, **options)
        texts = [text(part) for part in targets.split(list(map(int, lengths)))]
        now.losses.append(Loss(texts, lam.tolist(), mu, [value.item() for value in sums]))
        return sums

    def step(optimizer, *args):
        now.rates |= {group["lr"] for group in optimizer.param_groups}
        return adamw_step(optimizer, *args)

    def optimizer_step(model, optimizer, lr, max_grad_norm):
        named = [(name, p) for name, p in model.named_parameters() if p.grad is not None]
        now.before, now.model = copied(model), model
        now.gradients = {name: p.grad.clone() for name, p in named}
        now.norm = originals["optimizer_step"](model, optimizer, lr, max_grad_norm)
        now.after = copied(model)
        now.moments = {name: optimizer.state[p]["exp_avg"].clone() for name, p in named}
        steps.append(Step(**vars(now)))
        now.__init__()
        return steps[-1].norm

    spies = check_gradients, collate, response_states, optimizer_step
    with pytest.MonkeyPatch.context() as patch:
        for spy in spies:
            patch.setattr(common, spy.__name__, spy)
        patch.setattr(sftmix, "sftmix_loss", loss)
        patch.setattr(torch.optim.AdamW, "step", step)
        importlib.import_module(script).main([*flags])
    return steps


SPIES = ("check_gradients", "collate", "response_states", "optimizer_step")
