"""generate's loop for greedy decoding and sampling, with little of its own time per token.

transformers prepares each step's inputs anew: it copies ids and masks, and the logits of the whole
vocabulary in float32. Here text, mask and positions grow in place, greedy decoding looks at the
logits as they are, and processors and stopping criteria are called where there are any. Everything
else (beams, assistants, other caches and settings) goes to the loop of transformers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationMixin
from transformers.generation import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..models.cache import NAMES, cache_of, passing
from .room import LAYERS
from .step import DecodeStep

_OWN = ("_sample", "_prefill", "prepare_inputs_for_generation",
        "_update_model_kwargs_for_generation", "generate")  # fmt: skip
_KNOWN = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", *NAMES}
# Settings of another kind of generation, and the value with which they say nothing.
_PLAIN = {
    "num_beams": 1, "num_beam_groups": 1, "penalty_alpha": 0, "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None, "dola_layers": None, "constraints": None, "use_mtp": False,
    "force_words_ids": None, "stop_strings": None, "token_healing": False,
    "output_attentions": False, "output_hidden_states": False, "cache_implementation": None,
}  # fmt: skip
# Arguments of generate that only its own loops understand.
_OTHERS = ("custom_generate", "assistant_model", "synced_gpus", "trust_remote_code", "tokenizer",
           "assistant_tokenizer", "negative_prompt_ids")  # fmt: skip
_ROOM = 256  # tokens by which a text grows whose end is not known


def generate_with(model: Any, step: DecodeStep) -> Callable[..., Any] | None:
    """A `generate` for this model that runs `sample` where it can; None for a model without one, or
    with parts of its own. step: what decodes its tokens."""
    if not isinstance(model, GenerationMixin) or "generate" in model.__dict__:
        return None
    if any(getattr(type(model), name) is not getattr(GenerationMixin, name) for name in _OWN):
        return None
    original = model.generate

    @functools.wraps(original)
    def generate(*args: Any, **kwargs: Any) -> Any:
        if _is_plain(model, args, kwargs):
            streamer = kwargs.pop("streamer", None)
            kwargs["custom_generate"] = functools.partial(sample, streamer=streamer, step=step)
        return original(*args, **kwargs)

    return generate


def _is_plain(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if len(args) > 1 or any(kwargs.get(name) is not None for name in _OTHERS):
        return False
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return False
    config = kwargs.get("generation_config") or model.generation_config
    for name, nothing in _PLAIN.items():
        value = kwargs[name] if name in kwargs else getattr(config, name, None)
        if value is not None and value != nothing:
            return False
    return True


def sample(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any = None,
    step: DecodeStep | None = None,
    **model_kwargs: Any,
) -> Any:
    """What `GenerationMixin._sample` does, for the same arguments and with the same results.

    Where no code of the user's runs between two tokens, the step looks at the model once.
    """
    if streamer is not None:  # generate does not know of it
        streamer.put(input_ids)
    cache = next((model_kwargs[name] for name in NAMES if model_kwargs.get(name) is not None), None)
    positions = model_kwargs.get("position_ids")
    if (
        not set(model_kwargs) <= _KNOWN
        or not model_kwargs.get("use_cache")
        or (positions is not None and positions.dim() != 2)
        or not (cache is None or _is_dynamic(cache))
        or model.config.is_encoder_decoder
        or input_ids.device.type != "cpu"
        or input_ids.shape[0] == 0
    ):
        return type(model)._sample(
            model, input_ids, logits_processor, stopping_criteria, generation_config,
            streamer=streamer, **model_kwargs,
        )  # fmt: skip
    out = model._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=True)
    return _Loop(
        model, input_ids, logits_processor, stopping_criteria, generation_config, streamer,
        model_kwargs, step,
    ).run(out)  # fmt: skip


def _is_dynamic(cache: Any) -> bool:
    return isinstance(cache, DynamicCache) and all(type(layer) in LAYERS for layer in cache.layers)


def largest(scores: Tensor) -> Tensor:
    """The index of the largest number of each row [batch, n], the first of equals: int64 [batch].

    As torch.argmax, which compares number by number; numpy compares many at a time, and knows half
    precision by its bits, which are ordered as integers where the largest number is above zero.
    """
    if scores.dtype in (torch.float16, torch.bfloat16):
        bits = scores.view(torch.int16).numpy()
        found = [int(row.argmax()) for row in bits]
        if any(row[place] <= 0 for row, place in zip(bits, found, strict=True)):
            return scores.argmax(-1)
    else:
        found = [int(row.argmax()) for row in scores.numpy()]
    return torch.tensor(found)


class _Loop:
    def __init__(
        self,
        model: Any,
        input_ids: Tensor,
        processors: Any,
        criteria: Any,
        config: Any,
        streamer: Any,
        model_kwargs: dict[str, Any],
        step: DecodeStep | None,
    ) -> None:
        self.model, self.processors, self.config = model, processors, config
        self.streamer = streamer
        self.batch, self.length = input_ids.shape
        self.stop = _Stop(criteria, config._pad_token_tensor, self.batch)
        self.text = _Growing(input_ids, criteria.max_length)
        mask = model_kwargs.get("attention_mask")
        self.mask = None if mask is None else _Growing(mask, None)
        positions = model_kwargs.get("position_ids")
        self.positions = None if positions is None else positions[:, -1:] + 1
        self.arguments: dict[str, Any] = {"use_cache": True, "return_dict": True}
        if "logits_to_keep" in model_kwargs:
            self.arguments["logits_to_keep"] = model_kwargs["logits_to_keep"]
        wants = config.return_dict_in_generate
        self.scores: list[Tensor] | None = [] if wants and config.output_scores else None
        self.logits: list[Tensor] | None = [] if wants and config.output_logits else None
        # What a greedy choice needs no copy for.
        self.as_they_are = not (
            config.do_sample or len(processors) or self.scores is not None
            or self.logits is not None
        )  # fmt: skip

        hooked = model._forward_hooks or model._forward_pre_hooks
        self.alone = not (streamer is not None or len(processors) or self.stop.others or hooked)
        self.step = step

    def run(self, out: Any) -> Any:
        """All tokens behind a prompt's output, and what generate returns."""
        cache = cache_of(out)
        past = passing(self.model, cache)
        with ExitStack() as trust:
            while True:
                token = self.choose(out.logits[:, -1])
                del out  # a prompt's logits may be large
                token = self.stop.padded(token)
                self.text.append(token)
                if self.streamer is not None:
                    self.streamer.put(token)
                if self.stop.after(self.text.now, self.scores):
                    break
                out = self.model(input_ids=token.unsqueeze(1), **self.inputs(), **past)
                if self.alone and self.step is not None:  # it has looked at the model now
                    trust.enter_context(self.step.trust())
                    self.step = None
        if self.streamer is not None:
            self.streamer.end()
        text = self.text.now.clone() if self.text.is_larger else self.text.now
        if not self.config.return_dict_in_generate:
            return text
        names = GenerateDecoderOnlyOutput.__dataclass_fields__
        found: dict[str, Any] = {name: cache for name in NAMES if name in names}
        for name, kept in (("scores", self.scores), ("logits", self.logits)):
            found[name] = None if kept is None else tuple(kept)
        return GenerateDecoderOnlyOutput(
            sequences=text,  # type: ignore[arg-type]
            **found,
        )

    def choose(self, logits: Tensor) -> Tensor:
        """The next token of each sequence, [batch]."""
        if self.as_they_are:
            return largest(logits)
        logits = logits.to(copy=True, dtype=torch.float32)
        scores = self.processors(self.text.now, logits)
        if self.scores is not None:
            self.scores.append(scores)
        if self.logits is not None:
            self.logits.append(logits)
        if not self.config.do_sample:
            return largest(scores)
        return torch.multinomial(torch.softmax(scores, -1), 1).squeeze(1)

    def inputs(self) -> dict[str, Any]:
        """The arguments of the next forward, beside token and cache."""
        arguments = dict(self.arguments)
        if self.mask is not None:
            self.mask.append(1)
            arguments["attention_mask"] = self.mask.now
        if self.positions is not None:
            arguments["position_ids"] = self.positions
            self.positions = self.positions + 1
        return arguments


class _Growing:
    """A tensor [batch, n] that grows by columns; `now` is a view."""

    def __init__(self, start: Tensor, most: int | None) -> None:
        self.batch, self.length = start.shape
        self.buffer = start.new_empty(self.batch, max(most or 0, self.length + _ROOM))
        self.buffer[:, : self.length] = start

    @property
    def now(self) -> Tensor:
        return self.buffer[:, : self.length]

    @property
    def is_larger(self) -> bool:
        return self.buffer.shape[1] > self.length

    def append(self, column: Tensor | int) -> None:
        if self.length == self.buffer.shape[1]:
            larger = self.buffer.new_empty(self.batch, 2 * self.length)
            larger[:, : self.length] = self.buffer
            self.buffer = larger
        self.buffer[:, self.length] = column
        self.length += 1


class _Stop:
    """When sequences end: the two criteria that nearly all have, read off the tokens; the others by
    their own code."""

    def __init__(self, criteria: Iterable[Any], pad: Tensor | None, batch: int) -> None:
        self.criteria = list(criteria)
        read = (MaxLengthCriteria, EosTokenCriteria)
        self.others = [c for c in self.criteria if type(c) not in read]
        self.limits = [c for c in self.criteria if type(c) is MaxLengthCriteria]
        self.most = min((c.max_length for c in self.limits), default=None)
        ends = [c.eos_token_id for c in self.criteria if type(c) is EosTokenCriteria]
        self.ends = {int(token) for tokens in ends for token in tokens.reshape(-1)}
        # As transformers: any criterion with this attribute lets finished sequences be padded.
        self.pads = any(hasattr(c, "eos_token_id") for c in self.criteria)
        self.pad = pad
        self.open = torch.ones(batch, dtype=torch.bool)
        self.all_open = True

    def padded(self, token: Tensor) -> Tensor:
        if self.all_open or not self.pads:
            return token
        assert self.pad is not None  # else transformers refuses
        return torch.where(self.open, token, self.pad)

    def after(self, text: Tensor, scores: list[Tensor] | None) -> bool:
        """Whether all sequences are finished."""
        if self.ends:
            over = [token in self.ends for token in text[:, -1].tolist()]
            if any(over):
                self.open &= ~torch.tensor(over)
                self.all_open = False
        seen = None if scores is None else tuple(scores)
        for criterion in self.others:
            self.open &= ~torch.as_tensor(criterion(text, seen)).bool()
            self.all_open = False
        for limit in self.limits:
            if text.shape[1] - 1 == limit.max_position_embeddings:
                limit(text, seen)  # warns of a text longer than the model was made for
        if self.most is not None and text.shape[1] >= self.most:
            return True
        return not self.all_open and not bool(self.open.any())
