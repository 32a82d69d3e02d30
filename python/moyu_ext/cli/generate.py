"""`moyu generate`: stream text from a patched model, and compare with the dense one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigurationError
from . import common

if TYPE_CHECKING:
    from torch import Tensor


@dataclasses.dataclass
class _Run:
    """One generation: the ids with the prompt, and when each step ended (seconds)."""

    ids: Tensor  # [1, prompt + new]
    times: list[float]

    @property
    def tokens_per_second(self) -> float:
        """Decode only: the prompt and the token that it gives are not counted."""
        steps, seconds = len(self.times) - 1, self.times[-1] - self.times[0]
        return steps / seconds if steps > 0 else float("nan")


def generate(
    model: common.Model,
    prompt: Annotated[
        str,
        typer.Option("--prompt", "-p", help="The text to continue.", show_default=False),
    ],
    method: Annotated[
        str | None,
        typer.Option(
            help="Which neurons to compute: lossless, qrida, tda, stda, srida, roda, roda-online, "
            "rida, dense (see docs/methods.md). Default: what the thresholds, router or experts "
            "were made for, else lossless, which changes no answer."
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(help="Fraction of neurons to keep, in (0, 1]; for methods that rank."),
    ] = None,
    score: Annotated[
        str | None,
        typer.Option(help="The method's score: product or gate (tda), contribution or griffin."),
    ] = None,
    thresholds: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="What `moyu calibrate` wrote; for methods that compare.",
        ),
    ] = None,
    router: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="What `moyu train-router` wrote; for roda and roda-online."
        ),
    ] = None,
    experts: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="What `moyu split-experts` wrote; for rida."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="LOSS",
            help="The loss you allow: mean KL per token in nats, such as 0.01, or a rise of "
            "perplexity, such as 1%. Found the first time, remembered afterwards.",
        ),
    ] = None,
    tuned: Annotated[
        Path | None, typer.Option(metavar="DIR", help="What `moyu tune` wrote.")
    ] = None,
    router_bits: Annotated[
        int | None, typer.Option(help="For qrida: bits of its copies of gate and up, 1 to 4.")
    ] = None,
    guard: Annotated[
        str | None,
        typer.Option(
            help="For qrida: watch measures on one token in 64 what is lost; hold also keeps it "
            "where the thresholds' calibration put it; off."
        ),
    ] = None,
    projections: Annotated[
        bool,
        typer.Option(
            "--projections", help="Also attention's and the head's linear layers by our GEMV."
        ),
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 128,
    sample: Annotated[
        bool, typer.Option("--sample", help="Sample, rather than take the likeliest token.")
    ] = False,
    temperature: Annotated[
        float, typer.Option(help="With --sample: above 1 bolder, below 1 safer.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="With --sample: the same seed, the same text.")] = 0,
    compare: Annotated[
        bool, typer.Option(help="Also run the dense model: its speed, and the agreement.")
    ] = True,
    bits: common.Bits = None,
    group: common.Group = None,
    dtype: common.Dtype = "auto",
    device: common.Device = "cpu",
    json: common.Json = None,
) -> None:
    """Stream text from a patched model.

    Then print its speed, realised density and agreement with the dense model. The text goes to
    stdout, the figures to stderr.

    \b
    Examples
        moyu generate stories_silu -p "Once upon a time, there was a small dog"
        moyu generate stories_silu -p "One day" --budget 0.01
        moyu generate stories_silu -p "One day" --method srida --density 0.3
        moyu calibrate stories_silu --out thresholds
        moyu generate stories_silu -p "One day" --thresholds thresholds
        moyu generate ./Llama-2-7b-hf -p "The capital of France is" --bits 8
        moyu generate model.gguf -p "The capital of France is"
    """
    common.check_json(json)
    if temperature <= 0:
        raise ConfigurationError(f"--temperature is {temperature}; expected a number above 0")
    _check_prompt(prompt)
    options = {
        "thresholds": thresholds,
        "density": density,
        "score": score,
        "router": router,
        "experts": experts,
        "bits": router_bits,
        "guard": guard,
    }
    chosen = _method(method, options, budget, tuned)
    lm, tokenizer = common.load_model(model, dtype, device, bits, group)
    encoded = tokenizer(prompt, return_tensors="pt").to(lm.device)
    if encoded["input_ids"].shape[-1] == 0:
        raise ConfigurationError("--prompt is empty; give at least one word to continue")
    context = encoded["input_ids"].shape[-1]
    from ..calibration.budget import patch
    from ..patching.patch import report, unpatch

    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": sample}
    if sample:
        settings |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    patch(lm, chosen, budget=budget, projections=projections)
    run = _generate(lm, encoded, settings, seed, tokenizer, _print)
    used = report(lm)
    result: dict[str, Any] = {
        "command": "generate",
        "model": model,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "device": str(lm.device),
        "method": used.method,
        "projections": used.projections,
        "prompt_tokens": context,
        "new_tokens": run.ids.shape[-1] - context,
        "text": tokenizer.decode(run.ids[0], skip_special_tokens=True),
        "density": used.density,
        "added_bytes": used.added_bytes,
        "bytes_share": used.share,
        "guard_cett": used.cett,
        "guard_recall": used.recall,
        "tokens_per_second": run.tokens_per_second,
    }
    if compare:
        from ..evaluation.agreement import agreement, choices

        ours = choices(lm, run.ids, context)
        unpatch(lm)
        dense = _generate(lm, encoded, settings, seed, tokenizer, lambda text: None)
        result["dense_tokens_per_second"] = dense.tokens_per_second
        result["speedup"] = run.tokens_per_second / dense.tokens_per_second
        result["agreement"] = agreement(ours, choices(lm, run.ids, context)).item()
    if used.budget is not None:
        typer.echo(f"\n{used.budget}", err=True)
    _summary(result, used.cost() if used.share < 1 else None)
    common.write_json(json, result)


def _method(
    name: str | None, options: dict[str, Any], budget: str | None, tuned: Path | None
) -> Any:
    """The method asked for; None where a budget is to find it."""
    from ..calibration.tune import nats
    from ..calibration.tuned import Tuned

    if budget is None and tuned is None:
        return common.build_method(name, **options)
    given = {"method": name, **options, "budget": budget, "tuned": tuned}
    names = [f"--{key.replace('_', '-')}" for key, value in given.items() if value is not None]
    if len(names) > 1:
        raise ConfigurationError(
            f"{' and '.join(names)} are given; a budget finds its own method: give one of them"
        )
    if tuned is not None:
        return Tuned.from_pretrained(tuned).method()
    nats(budget)
    return None


def _check_prompt(prompt: str) -> None:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # bytes of an argument come as surrogates
        raise ConfigurationError(
            f"--prompt {prompt!r} is not UTF-8 text; write it in UTF-8, and check that LANG names "
            "a UTF-8 locale"
        ) from error


def _print(text: str) -> None:
    typer.echo(text, nl=False)


def _generate(
    model: Any,
    encoded: Any,
    settings: dict[str, Any],
    seed: int,
    tokenizer: Any,
    show: Callable[[str], None],
) -> _Run:
    import torch
    from transformers import TextStreamer

    times: list[float] = []

    class Streamer(TextStreamer):
        def put(self, value: Any) -> None:
            times.append(time.perf_counter())
            super().put(value)

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            show(text + ("\n" if stream_end else ""))

    torch.manual_seed(seed)
    streamer = Streamer(tokenizer, skip_special_tokens=True)
    ids = model.generate(**encoded, **settings, streamer=streamer)
    return _Run(ids, times[1:])  # the first is the prompt itself


def _summary(result: dict[str, Any], cost: str | None) -> None:
    lines = [
        "",
        f"method      {result['method']}",
        f"tokens      {result['prompt_tokens']} in the prompt, {result['new_tokens']} generated",
        f"density     {_number(result['density'], '.1%')} of the neurons were computed per token",
        f"speed       {_number(result['tokens_per_second'], '.1f')} tokens/s",
    ]
    if cost is not None:
        lines.insert(4, f"cost        {cost}")
    if result["guard_cett"] == result["guard_cett"]:
        lines.insert(
            4,
            f"guard       CETT {result['guard_cett']:.3f}, {result['guard_recall']:.1%} of the "
            "neurons that matter most were found",
        )
    if "speedup" in result:
        lines[-1] += (
            f", dense {_number(result['dense_tokens_per_second'], '.1f')}"
            f" ({_number(result['speedup'], '.2f')}x)"
        )
        lines.append(
            f"agreement   {_number(result['agreement'], '.1%')} of the next tokens are those that "
            "the dense model takes after the same text"
        )
    for line in lines:
        typer.echo(line, err=True)


def _number(value: float, form: str) -> str:
    return "-" if value != value else format(value, form)
