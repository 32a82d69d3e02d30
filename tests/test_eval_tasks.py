"""lm-eval tasks: reading the data folder, scoring under a method, and lm-eval's own numbers."""

from pathlib import Path

import pytest
import torch
from moyu_ext.cli.common import load_model
from moyu_ext.errors import ConfigurationError
from moyu_ext.evaluation import task_data
from moyu_ext.evaluation.rouge import load_items, rouge, summarise, truncate
from moyu_ext.evaluation.statistics import bootstrap, sign_flip_p
from moyu_ext.evaluation.tasks import (
    TASKS,
    number_matches,
    run_tasks,
    score_pairs,
    true_mass,
)
from moyu_ext.methods import QRIDA, SRIDA, TDA
from moyu_ext.models.cache import cache_of, passing

from moyu_ext import patch, unpatch


def decoded(model, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """All but the context's last token at once, then token by token."""
    ids, total, greedy = [*context, *continuation], 0.0, True
    with torch.no_grad():
        start = len(context) - 1
        cache = cache_of(model(torch.tensor([ids[:start]]), use_cache=True))
        for place in range(start, len(ids) - 1):
            out = model(torch.tensor([ids[place : place + 1]]), **passing(model, cache))
            scores = out.logits[0, -1].double().log_softmax(-1)
            total += scores[ids[place + 1]].item()
            greedy &= int(scores.argmax()) == ids[place + 1]
    return total, greedy


@pytest.mark.parametrize("method", [None, TDA(0.4), SRIDA(0.4), QRIDA(0.4)], ids=repr)
def test_scores_are_those_of_decoding(tiny, prompt, method) -> None:
    model = tiny()
    ids = prompt(60)[0].tolist()
    pairs = [(ids[:20], ids[20:23]), (ids[5:40], ids[40:41]), (ids[:12], ids[12:30])]
    if method is not None:
        patch(model, method)
    expected = [decoded(model, *pair) for pair in pairs]
    found = score_pairs(model, pairs, 256)
    assert [value for value, _ in found] == pytest.approx([v for v, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("method", [TDA(0.4), SRIDA(0.4), QRIDA(0.4)], ids=repr)
def test_answers_of_one_token_do_not_score_like_dense(tiny, prompt, method) -> None:
    """MMLU's letters: a patch that governs only what follows them would never be seen."""
    model = tiny()
    pairs = [(row.tolist()[:19], row.tolist()[19:]) for row in prompt(20, 6)]
    dense = torch.tensor([value for value, _ in score_pairs(model, pairs, 256)])
    patch(model, method)
    ours = torch.tensor([value for value, _ in score_pairs(model, pairs, 256)])
    unpatch(model)
    assert (ours - dense).abs().min() > 1e-4


def test_long_contexts_lose_their_beginning(tiny, prompt) -> None:
    model = tiny()
    ids = prompt(60)[0].tolist()
    cut = score_pairs(model, [(ids[30:50], ids[50:60])], 30)
    assert score_pairs(model, [(ids[:50], ids[50:60])], 30) == cut
    with pytest.raises(ConfigurationError, match="a continuation of 30 tokens leaves no context"):
        score_pairs(model, [(ids[:5], ids[5:35])], 30)


def test_every_task_reads_the_data_folder(data_dir: Path) -> None:
    sizes = {
        "mmlu": 14042,
        "truthfulqa_mc1": 790,
        "truthfulqa_mc2": 790,
        "winogrande": 1267,
        "gsm8k": 1319,
        "hellaswag": 10042,
        "arc_easy": 2376,
        "arc_challenge": 1172,
        "piqa": 1838,
        "openbookqa": 500,
        "social_iqa": 1954,
        "boolq": 3270,
    }
    for name, task in TASKS.items():
        documents = task.load(data_dir)
        assert len(documents) >= 0.99 * sizes.get(name, 50), (name, len(documents))
        for document in documents[:200]:
            if task.kind == "choice":
                assert 0 <= document["gold"] < len(document["choices"])
                assert len(set(document["choices"])) > 1 and document["query"]
            elif task.kind == "mc2":
                assert len(document["gold"]) == len(document["choices"])
                assert 0 < sum(document["gold"]) < len(document["gold"])
            elif task.kind == "endings":
                first, second = document["contexts"]
                assert first != second and document["ending"] and document["gold"] in (0, 1)
            else:
                assert document["query"] and document["target"]
    # A limit of MMLU sees every subject once before it sees one twice.
    assert len({d["group"] for d in task_data.mmlu(data_dir)[:57]}) == 57
    shown = task_data.gsm8k(data_dir)[0]["query"]
    assert shown.count("Question:") == 4 and shown.count("####") == 3 and shown.endswith("Answer:")


def test_choices_are_taken_out_of_instructions() -> None:
    text = "Please choose: question: Why?\n\nAnswer1: a b Answer2: c\n\nAnswer format: answer1"
    assert task_data.numbered_choices(text) == ("Why?", ["a b", "c"])
    with pytest.raises(ValueError, match="no choices"):
        task_data.numbered_choices("question: Why?")


def test_last_words_are_not_in_their_passage_s_end() -> None:
    words = [f"w{i}" for i in range(100)]
    words[70] = "end."
    (document,) = task_data.last_words([" ".join(words), "too short."])
    assert document["target"] == "end"
    assert document["query"].split()[-1] == "w69" and len(document["query"].split()) == 60


@pytest.mark.parametrize(
    ("answer", "target", "right"),
    [
        ("3 * 4 = 12\n#### 12", "12", 1.0),
        ("#### 1,200.", "1200", 1.0),
        ("#### $5", "5", 1.0),
        ("#### -3 and more", "-3", 1.0),
        ("12", "12", 0.0),
        ("#### 12 #### 13", "13", 0.0),
        ("####", "12", 0.0),
        ("", "12", 0.0),
    ],
)
def test_gsm8k_wants_the_number_behind_the_mark(answer: str, target: str, right: float) -> None:
    assert number_matches({"target": target}, [answer]) == {"exact_match": right}


def test_mc2_is_the_mass_on_true_answers() -> None:
    scores = [(torch.tensor(p).log().item(), False) for p in (0.2, 0.1, 0.1)]
    assert true_mass({"gold": [1, 0, 1]}, scores)["acc"] == pytest.approx(0.75)


def test_significance() -> None:
    g = torch.Generator().manual_seed(0)
    assert sign_flip_p(torch.randn(200, generator=g) + 0.5) < 0.001
    assert sign_flip_p(torch.randn(200, generator=g)) > 0.01
    assert sign_flip_p(torch.zeros(20)) == 1
    # Four differences of one sign: 2 of 16 flips are as extreme.
    assert sign_flip_p(torch.ones(4), rounds=20000) == pytest.approx(1 / 8, abs=0.01)
    interval = bootstrap(torch.arange(100.0), rounds=4000)
    assert interval.mean == 49.5
    half = 1.96 * torch.arange(100.0).std().item() / 10
    assert interval.low == pytest.approx(49.5 - half, abs=1)
    assert interval.high == pytest.approx(49.5 + half, abs=1)


def test_prompts_are_cut_in_the_middle() -> None:
    assert truncate([1, 2, 3], 3) == [1, 2, 3]
    assert truncate(range(10), 4) == [0, 1, 8, 9]
    assert truncate(range(10), 5, first=1) == [0, 6, 7, 8, 9]


def test_rouge_of_known_texts() -> None:
    pytest.importorskip("rouge_score")
    found = rouge(["the cat sat", "nothing"], ["the cat sat down", "other words"])
    assert found["rouge1"] == pytest.approx([6 / 7, 0])  # 3 of 3, 3 of 4
    assert found["rouge2"] == pytest.approx([4 / 5, 0])  # 2 of 2, 2 of 3
    with pytest.raises(ConfigurationError, match="1 predictions for 2 references"):
        rouge(["a"], ["a", "b"])


@pytest.mark.parametrize("name", ["xsum", "xsum-1shot", "cnn_dailymail"])
def test_summaries_are_written_from_held_out_prompts(data_dir: Path, name: str) -> None:
    items = load_items(data_dir, name, 2)
    assert len(items) == 2 and all(item.reference and item.stop for item in items)
    model, tokenizer = load_model("stories_silu")
    texts = summarise(model, tokenizer, items, 48, 6)
    assert all(isinstance(text, str) for text in texts)
    with pytest.raises(ConfigurationError, match="summary set is 'x'; expected one of xsum"):
        load_items(data_dir, "x")
    with pytest.raises(ConfigurationError, match=r"there is no .*pass --data"):
        load_items(data_dir / "bench", name)


@pytest.mark.slow
def test_lm_eval_gives_what_the_scores_say(data_dir: Path) -> None:
    """Accuracies recomputed from `score_pairs` by hand; generation and word tasks run."""
    pytest.importorskip("lm_eval")
    model, tokenizer = load_model(str(data_dir / "models" / "mix4m_silu"))
    patch(model, SRIDA(0.3))
    names = ["arc_easy", "winogrande", "truthfulqa_mc2", "gsm8k", "last_word", "mmlu"]
    found = {score.task: score for score in run_tasks(model, tokenizer, names, data_dir, 4)}
    assert all(score.documents == 4 for score in found.values())
    assert found["gsm8k"].metric == "exact_match"

    def pair(context: str, ending: str) -> tuple[list[int], list[int]]:
        whole = tokenizer.encode(context + ending)
        front = tokenizer.encode(context)
        return front, whole[len(front) :]

    longest = model.config.max_position_embeddings
    right = []
    for document in TASKS["arc_easy"].load(data_dir)[:4]:
        pairs = [pair(document["query"], " " + choice) for choice in document["choices"]]
        scores = [value for value, _ in score_pairs(model, pairs, longest)]
        right.append(float(scores.index(max(scores)) == document["gold"]))
    assert found["arc_easy"].per_document == right
    right = []
    for document in TASKS["winogrande"].load(data_dir)[:4]:
        pairs = [pair(context, " " + document["ending"]) for context in document["contexts"]]
        scores = [value for value, _ in score_pairs(model, pairs, longest)]
        right.append(float(scores.index(max(scores)) == document["gold"]))
    assert found["winogrande"].per_document == right
    masses = []
    for document in TASKS["truthfulqa_mc2"].load(data_dir)[:4]:
        pairs = [pair(document["query"], " " + choice) for choice in document["choices"]]
        masses.append(true_mass(document, score_pairs(model, pairs, longest))["acc"])
    assert found["truthfulqa_mc2"].per_document == pytest.approx(masses, abs=1e-5)
