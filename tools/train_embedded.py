"""Train the two demo models that ship with moyu_ext: twin Llamas, one SwiGLU, one ReLU.

\b
    python tools/train_embedded.py tokenizer --data train_mix --work build/embedded
    python tools/train_embedded.py train --data train_mix --work build/embedded --act silu
    python tools/train_embedded.py train --data train_mix --work build/embedded --act relu
    python tools/train_embedded.py export --data train_mix --work build/embedded --act silu \
        --out python/moyu_ext/embedded/stories_silu

The twins differ in `hidden_act` alone: same initial weights, same batches, same dropout masks.
A killed `train` goes on from its last checkpoint when it is started again; another `--steps` then
sets another end, everything else must be the same. Seconds are CPU seconds.
"""

import json
import lzma
import math
import random
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import torch._inductor.config
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# Share of the rows of a batch. `True` marks domains whose documents are whole: they begin with BOS
# and end with EOS. The others are fragments of long texts, cropped at random.
DOMAINS = {
    "stories": (0.70, True),
    "gsm8k": (0.10, True),
    "book": (0.08, False),
    "state_union": (0.07, False),
    "inaugural": (0.05, False),
}
PAD, BOS, EOS = range(3)
SPECIAL = ["<pad>", "<s>", "</s>"]
VOCABULARY = 2048
CONTEXT = 512

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, rich_markup_mode=None)
Data = Annotated[Path, typer.Option(help="Folder with docs.json.xz and heldout/stories.txt.")]
Work = Annotated[Path, typer.Option(help="Folder for the tokenizer and the checkpoints.")]
Act = Annotated[str, typer.Option(help="hidden_act of the model: silu or relu.")]


def load_documents(data: Path) -> dict[str, list[str]]:
    """The training documents of `DOMAINS`; every other domain of the file is left out."""
    documents: dict[str, list[str]] = {domain: [] for domain in DOMAINS}
    with lzma.open(data / "docs.json.xz", "rt", encoding="utf-8") as file:
        for domain, text in json.load(file):
            if domain in documents:
                documents[domain].append(text.strip())
    return documents


def load_heldout(data: Path) -> list[str]:
    text = (data / "heldout" / "stories.txt").read_text(encoding="utf-8")
    return [story.strip() for story in text.split("<|endoftext|>") if story.strip()]


def build_tokenizer(documents: dict[str, list[str]]) -> Tokenizer:
    """Byte-level BPE; stories count three times, digits stand alone, BOS is put in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [text for domain in DOMAINS for text in documents[domain]]
    tokenizer.train_from_iterator(texts + 2 * documents["stories"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


def build_config(act: str) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        hidden_act=act,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def build_model(act: str, dropout: float) -> LlamaForCausalLM:
    """The plain Hugging Face model, with dropout hooked onto what enters the residual stream.

    One mask per row, shared by its positions: a mask per token would cost a quarter of the step.
    """
    model = LlamaForCausalLM(build_config(act))

    def drop(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        return output * nn.functional.dropout(
            torch.ones_like(output[:, :1]), dropout, module.training
        )

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(drop)
        layer.mlp.down_proj.register_forward_hook(drop)
    model.model.embed_tokens.register_forward_hook(drop)
    return model


def sample_batch(
    tokens: dict[str, list[list[int]]], rows: int, length: int, rng: random.Random
) -> Tensor:
    """Rows of `length` + 1 tokens, each of one domain and starting at a document's start."""
    batch = []
    for _ in range(rows):
        domain = rng.choices(list(DOMAINS), [share for share, _ in DOMAINS.values()])[0]
        row: list[int] = []
        while len(row) <= length:
            document = rng.choice(tokens[domain])
            whole = DOMAINS[domain][1]
            start = 0 if whole else rng.randrange(max(1, len(document) - length))
            row += document[start:]
        batch.append(row[: length + 1])
    return torch.tensor(batch)


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, stories: list[list[int]], bf16: bool = False) -> float:
    """Nats per token over whole stories, each on its own, cut at CONTEXT + 1 tokens."""
    model.eval()
    total, count = 0.0, 0
    ordered = sorted((story[: CONTEXT + 1] for story in stories), key=len)
    for first in range(0, len(ordered), 8):
        group = ordered[first : first + 8]
        rows = torch.full((len(group), len(group[-1])), PAD)
        for row, story in zip(rows, group, strict=True):
            row[: len(story)] = torch.tensor(story)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits.float()
        targets = rows[:, 1:].flatten()
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 1), targets, ignore_index=PAD, reduction="sum"
        )
        total += losses.item()
        count += int((targets != PAD).sum())
    model.train()
    return total / count


def encode_heldout(data: Path, tokenizer: Tokenizer) -> tuple[list[list[int]], list[list[int]]]:
    """Validation stories, which pick the checkpoint, and test stories, which nothing sees."""
    stories = [[*tokenizer.encode(text).ids, EOS] for text in load_heldout(data)]
    return stories[0::2], stories[1::2]


@app.command(name="tokenizer")
def train_tokenizer(data: Data, work: Work) -> None:
    """Train the tokenizer that both models share: WORK/tokenizer.json."""
    work.mkdir(parents=True, exist_ok=True)
    build_tokenizer(load_documents(data)).save(str(work / "tokenizer.json"))


@app.command()
def train(
    data: Data,
    work: Work,
    act: Act,
    steps: Annotated[int, typer.Option(help="Steps of the whole schedule.")] = 3000,
    rows: Annotated[int, typer.Option(help=f"Sequences of {CONTEXT} tokens in a batch.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Peak; falls linearly to 0.")] = 3e-3,
    weight_decay: Annotated[float, typer.Option(help="AdamW's, on matrices only.")] = 0.1,
    dropout: Annotated[float, typer.Option(help="Dropout into the residual stream.")] = 0.1,
    short: Annotated[float, typer.Option(help="Share of steps on rows half as long.")] = 0.7,
    evaluate_every: Annotated[int, typer.Option(help="Steps between held-out losses.")] = 200,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    seed: Annotated[int, typer.Option(help="Seeds weights, batches and dropout.")] = 0,
    threads: Annotated[int, typer.Option(help="Threads of PyTorch.")] = 1,
    bf16: Annotated[bool, typer.Option(help="Autocast to bfloat16.")] = True,
    compiled: Annotated[bool, typer.Option(help="Use torch.compile.")] = True,
) -> None:
    """Train one twin; writes WORK/ACT.pt (to resume) and WORK/ACT.best.pt (for export)."""
    settings = {name: value for name, value in locals().items() if name not in ("data", "work")}
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    tokens = {
        domain: [
            [*encoding.ids, EOS] if DOMAINS[domain][1] else encoding.ids[1:]
            for encoding in tokenizer.encode_batch(texts)
        ]
        for domain, texts in load_documents(data).items()
    }
    validation, _ = encode_heldout(data, tokenizer)

    model = build_model(act, dropout)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, lr=learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True
    )
    warmup = max(1, steps // 50)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup))
    )
    step, seconds, best = 0, 0.0, math.inf
    checkpoint = work / f"{act}.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["settings"] | {"steps": steps} != settings:
            raise typer.BadParameter(f"{checkpoint} was trained with {state['settings']}")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["rng"])
        step, seconds, best = state["step"], state["seconds"], state["best"]

    def save(path: Path, **more: Any) -> None:
        info = {"step": step, "seconds": seconds, "best": best, "settings": settings}
        partial = path.with_suffix(".partial")
        torch.save({"model": model.state_dict(), **info, **more}, partial)
        partial.replace(path)  # a kill leaves the old checkpoint or the new one, never half

    def loss_of(batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    torch._inductor.config.fallback_random = True  # PyTorch's own generator: the same masks
    batch_loss = torch.compile(loss_of, dynamic=False) if compiled else loss_of
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn()) as progress:
        task = progress.add_task(act, total=steps, completed=step)
        model.train()
        while step < steps:
            began = time.process_time()
            halves = 2 if step < short * steps else 1
            rng = random.Random(f"{seed} {step}")
            loss = batch_loss(sample_batch(tokens, rows * halves, CONTEXT // halves, rng))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            seconds += time.process_time() - began
            progress.update(task, completed=step, description=f"{act} loss {loss.item():.3f}")
            if step % evaluate_every == 0 or step == steps:
                heldout = mean_loss(model, validation, bf16)
                print(f"{step=} {seconds=:.0f} loss={loss.item():.4f} {heldout=:.4f}", flush=True)
                if heldout < best:
                    best = heldout
                    save(work / f"{act}.best.pt")
            if step % save_every == 0 or step == steps:
                more = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
                save(checkpoint, rng=torch.get_rng_state(), **more)


@app.command()
def export(
    data: Data,
    work: Work,
    act: Act,
    out: Annotated[Path, typer.Option(help="Hugging Face directory to write.")],
) -> None:
    """Write the best checkpoint in bfloat16 with its tokenizer and held-out perplexity."""
    state = torch.load(work / f"{act}.best.pt", weights_only=True)
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    model = LlamaForCausalLM(build_config(act))
    model.load_state_dict(state["model"])
    validation, test = encode_heldout(data, tokenizer)
    perplexity = {
        "validation": math.exp(mean_loss(model, validation)),
        "test": math.exp(mean_loss(model, test)),
    }
    model.to(torch.bfloat16)
    perplexity["test_bfloat16"] = math.exp(mean_loss(model, test))
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[PAD],
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[EOS],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(out)
    file = out / "tokenizer.json"  # on one line, which is less than half the size
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n", "utf-8")
    info = {
        "step": state["step"],
        "tokens": state["step"] * state["settings"]["rows"] * CONTEXT,
        "seconds": round(state["seconds"]),
        "parameters": model.num_parameters(),
        "heldout_perplexity": perplexity,
        "domains": {domain: share for domain, (share, _) in DOMAINS.items()},
        "settings": state["settings"],
    }
    (out / "train_info.json").write_text(json.dumps(info, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(info, indent=2))


if __name__ == "__main__":
    app()
