"""The methods' rules in generation, by masking neurons of an unpatched model in plain PyTorch.

One sequence at a time, without padding, without a cache and without state: the whole text goes
through the model at once, and a hook on W_down's input zeroes what the rule forbids, token by
token. It shares no code with the package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Mlp:
    """down: the module whose input is a(x); gate: the module whose output is act(W_gate x)."""

    down: nn.Linear
    act: nn.Module
    gated: bool


def mlps(model: nn.Module) -> list[Mlp]:
    found = []
    for module in model.modules():
        if hasattr(module, "gate_proj"):
            found.append(Mlp(module.down_proj, module.act_fn, True))
        elif hasattr(module, "fc1") and hasattr(module, "fc2"):
            found.append(Mlp(module.fc2, module.activation_fn, False))
    return found


@dataclass
class Rule:
    """Which neurons a token may use, from a [S, f], act(gate) [S, f], column norms [f].

    `per_token`: the answer for token t uses token t only. Otherwise `seen` (bool [S]) are the
    tokens that the statistic holds.
    """

    keep: Callable[[int, Tensor, Tensor, Tensor, Tensor], Tensor]
    per_token: bool


def tda(epsilon: float | Sequence[float], score: str = "product") -> Rule:
    def keep(layer: int, a: Tensor, gate: Tensor, c: Tensor, seen: Tensor) -> Tensor:
        eps = epsilon if isinstance(epsilon, float) else epsilon[layer]
        return (gate.abs() if score == "gate" else a.abs() * c) >= eps

    return Rule(keep, True)


def stda(epsilon: float | Sequence[float]) -> Rule:
    def keep(layer: int, a: Tensor, gate: Tensor, c: Tensor, seen: Tensor) -> Tensor:
        eps = epsilon if isinstance(epsilon, float) else epsilon[layer]
        norms = a[seen].abs() * c
        return norms.pow(2).mean(0).sqrt() >= eps

    return Rule(keep, False)


def srida(density: float, score: str = "contribution") -> Rule:
    def keep(layer: int, a: Tensor, gate: Tensor, c: Tensor, seen: Tensor) -> Tensor:
        rows = a[seen]
        if score == "griffin":
            s = (rows / rows.norm(dim=1, keepdim=True)).norm(dim=0)
        else:
            s = (rows.abs() * c).pow(2).mean(0).sqrt()
        top = s.argsort(descending=True, stable=True)[: round(density * len(s))]
        out = torch.zeros_like(s, dtype=torch.bool)
        out[top] = True
        return out

    return Rule(keep, False)


@contextmanager
def masked(model: nn.Module, rule: Rule, governed: Tensor, learned: Tensor) -> Iterator[None]:
    """Within the block, a forward over one sequence [1, S] obeys the rule at `governed` tokens.

    learned: bool [S], tokens of the statistic; a token's set comes from those before it.
    """
    handles = []
    gates: dict[int, Tensor] = {}

    def watch(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            gates[layer] = out.detach().reshape(len(governed), -1).float()

        return hook

    def zero(layer: int, mlp: Mlp) -> Callable[..., tuple[Tensor]]:
        c = mlp.down.weight.detach().float().norm(dim=0)

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            a = args[0].detach().reshape(len(governed), -1).float()
            keep = torch.ones_like(a, dtype=torch.bool)
            if rule.per_token:
                chosen = rule.keep(layer, a, gates[layer], c, learned)
                keep[governed] = chosen[governed]
            else:
                known: dict[int, Tensor] = {}
                for t in governed.nonzero().flatten().tolist():
                    n = int(learned[:t].sum())
                    if n not in known:
                        seen = learned & (torch.arange(len(learned)) < t)
                        known[n] = rule.keep(layer, a, gates[layer], c, seen)
                    keep[t] = known[n]
            return (args[0] * keep.view(args[0].shape).to(args[0].dtype),)

        return hook

    for layer, mlp in enumerate(mlps(model)):
        handles.append(mlp.act.register_forward_hook(watch(layer)))
        handles.append(mlp.down.register_forward_pre_hook(zero(layer, mlp)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def roles(rule: Rule, length: int, prompt: int, min_prompt: int = 8) -> tuple[Tensor, Tensor]:
    """(governed, learned) of a sequence: a prompt in one forward, then token by token.

    A per-token rule governs what comes after the prompt. A sequence-level rule learns from the
    prompt and, while it has seen fewer
    than `min_prompt` tokens, from the tokens after it.
    """
    t = torch.arange(length)
    if rule.per_token:
        return t >= prompt, torch.zeros(length, dtype=torch.bool)
    learned = t < max(prompt, min_prompt)
    return ~learned, learned


@torch.no_grad()
def logits(
    model: nn.Module,
    ids: Tensor,
    rule: Rule,
    governed: Tensor,
    learned: Tensor,
) -> Tensor:
    """Logits [S, vocabulary] of one sequence ids [S]."""
    with masked(model, rule, governed, learned):
        return model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0].float()


def greedy(model: nn.Module, ids: Tensor, rule: Rule, new: int, min_prompt: int = 8) -> Tensor:
    """Greedy continuation of ids [P] by `new` tokens: [P + new]."""
    prompt = len(ids)
    for _ in range(new):
        governed, learned = roles(rule, len(ids), prompt, min_prompt)
        step = logits(model, ids, rule, governed, learned)[-1]
        ids = torch.cat([ids, step.argmax().unsqueeze(0)])
    return ids


@torch.no_grad()
def quantiles(
    model: nn.Module, ids: Tensor, q: float = 0.5, score: str = "product", rms: bool = False
) -> list[float]:
    """Per layer, the q-quantile of the score over the tokens of ids [S] in a dense forward."""
    found: list[float] = []

    def keep(layer: int, a: Tensor, gate: Tensor, c: Tensor, seen: Tensor) -> Tensor:
        values = gate.abs() if score == "gate" else a.abs() * c
        if rms:
            values = values.pow(2).mean(0).sqrt()
        found.append(float(values[values > 0].quantile(q)))  # half of what a ReLU lets through
        return torch.ones_like(a, dtype=torch.bool)

    everything = torch.ones(len(ids), dtype=torch.bool)
    logits(model, ids, Rule(keep, True), everything, everything)
    return found
