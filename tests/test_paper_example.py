"""examples/paper, on tiny models: what they learn from, how they compute, and that checkpoints read as others do."""

import csv
import json
import re
import runpy
import shutil
import sys
import sysconfig
import uuid
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from repflow.monitor import open_run
from repflow.monitor.offline.extraction import ExtractionOptions, extract
from repflow.monitor.offline.loading import load_model, load_tokenizer
from repflow.monitor.offline.tasks_kvpr import PROMPT, KeyValueRetrieval
from repflow.monitor.offline.tasks_length import PromptEncoder, encode_samples, fit_items

FOLDER = Path(__file__).parents[1] / "examples" / "paper"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parents[1] / "src"))  # of the processes that run.py starts


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of text: some of the standard library."""
    folder = tmp_path_factory.mktemp("text")
    for name in ("argparse", "ast", "cmd", "csv", "dis", "enum", "heapq", "inspect", "shlex", "uuid"):
        shutil.copy(Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py", folder)
    return folder


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        import_module("_corpus").prepare(folder, 1.0, text)
    return folder


@pytest.fixture
def corpus(corpus_folder: Path) -> Any:
    return import_module("_corpus").load(corpus_folder)


def test_tokens_give_the_text_back(corpus: Any):
    about = corpus.tokenizer.decode(corpus.train[:2000].tolist())
    assert "def " in about and corpus.tokenizer.encode(about) == corpus.train[:2000].tolist()
    assert 0 < len(corpus.validation) < len(corpus.train) and corpus.validation_bytes > len(corpus.validation)


def test_a_uuid_is_sixteen_pairs_of_digits_and_four_dashes(corpus: Any):
    sample = KeyValueRetrieval(items=5).sample(0)
    pieces = [corpus.tokenizer.decode([token]) for token in corpus.tokenizer.encode(sample.answer)]
    assert len(pieces) == 20 and "".join(pieces) == sample.answer and all(len(piece) in (1, 2) for piece in pieces)
    assert corpus.tokenizer.decode(corpus.tokenizer.encode(sample.prompt)) == sample.prompt
    # A word of letters that are digits is a word.
    assert corpus.tokenizer.decode(corpus.tokenizer.encode("def face(self):")[:1]) == "def"


@pytest.mark.parametrize("pairs", [1, 2, 5])
def test_samples_are_prompts_of_the_task_with_their_answers(corpus: Any, pairs: int):
    writer = import_module("_kvpr").PairWriter(corpus.tokenizer, CPU, seed=3)
    rows = writer.rows(3, 513, pairs)
    assert rows.tokens.shape == rows.weight.shape == (3, 513)
    seen: set[str] = set()
    for tokens, weight, answer, real in zip(rows.tokens, rows.weight, rows.answer, rows.real, strict=True):
        whole = corpus.tokenizer.decode(tokens[real])
        assert corpus.tokenizer.encode(whole) == tokens[real].tolist()
        answers: list[str] = []
        for sample in whole.split("<|endoftext|>")[:-1]:
            listed = re.findall(r'"(.{36})": "(.{36})"', sample)
            asked = re.findall(r'Key: "(.{36})"\nCorresponding value:(.{36})', sample)
            assert len(listed) == pairs and 1 <= len(asked) <= pairs and set(asked) <= set(listed)
            assert len(set(asked)) == len(asked)
            lines = ",\n ".join(f'"{key}": "{value}"' for key, value in listed)
            assert sample.startswith(PROMPT.format(pairs=lines, key=asked[0][0]) + asked[0][1])
            assert all(uuid.UUID(value).version == 4 for pair in listed for value in pair)
            answers += [value for _, value in asked]
            assert not seen & set(listed[0])
            seen |= set(listed[0])
        assert corpus.tokenizer.decode(tokens[answer]) == "".join(answers)
        assert (weight[answer] == 1).all() and (weight[~real] == 0).all()
        assert int((weight == 1).sum()) == 2 * int(answer.sum())  # keys that are asked for, and answers


def test_samples_that_do_not_fit_are_refused(corpus: Any):
    writer = import_module("_kvpr").PairWriter(corpus.tokenizer, CPU, seed=0)
    with pytest.raises(ValueError, match="expected room for 12 pairs and a question in 513 tokens"):
        writer.rows(1, 513, 12)


class Retriever(nn.Module):
    """Answers right, but for token number `wrong` of the answers; all prompts have so many tokens."""

    def __init__(self, prompts: list[list[int]], answers: list[list[int]], vocabulary: int, wrong: int | None) -> None:
        super().__init__()
        self.known = {tuple(prompt): answer for prompt, answer in zip(prompts, answers, strict=True)}
        self.length, self.vocabulary, self.wrong = len(prompts[0]), vocabulary, wrong

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        logits = torch.zeros(*input_ids.shape, self.vocabulary)
        for row, ids in enumerate(input_ids.tolist()):
            for place, token in enumerate(self.known[tuple(ids[: self.length])]):
                logits[row, self.length - 1 + place, (token + (place == self.wrong)) % self.vocabulary] = 1
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize(("wrong", "first", "whole"), [(None, 1, 1), (19, 1, 0), (0, 0, 0)])
def test_retrieval_is_judged_by_first_and_all_tokens(corpus: Any, wrong: int | None, first: int, whole: int):
    kvpr = import_module("_kvpr")
    task = KeyValueRetrieval(items=2, seed=kvpr.EVALUATION_SEED)
    drawn = [task.sample(index) for index in range(5)]
    prompts, answers = (
        [corpus.tokenizer.encode(getattr(sample, name)) for sample in drawn] for name in ("prompt", "answer")
    )
    model = Retriever(prompts, answers, len(corpus.tokenizer), wrong)
    found = kvpr.judge_retrieval(model, corpus.tokenizer, 2, 5, CPU, batch=2)
    assert (found.first, found.whole, found.prompt_tokens) == (first, whole, len(prompts[0]))


@pytest.mark.parametrize("tokens", [1, 8, 21])
def test_the_scan_is_the_recurrence(tokens: int):
    x, b, c = (torch.randn(2, tokens, *shape, dtype=torch.float64) for shape in ((3, 5), (4,), (4,)))
    dt, rate = torch.rand(2, tokens, 3, dtype=torch.float64), -torch.rand(3, dtype=torch.float64) * 20
    state, outputs = torch.zeros(2, 3, 4, 5, dtype=torch.float64), []
    for t in range(tokens):
        added = dt[:, t, :, None, None] * b[:, t, None, :, None] * x[:, t, :, None]
        state = state * (dt[:, t] * rate).exp()[..., None, None] + added
        outputs.append((c[:, t, None, :, None] * state).sum(2))
    got = import_module("_ssd").scan(x, dt, rate, b, c, chunk=8)
    torch.testing.assert_close(got, torch.stack(outputs, 1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("family", "mixers"), [("ssm", 3), ("hybrid", 2)])
def test_training_computes_what_transformers_does(family: str, mixers: int):
    models = import_module("_variants")
    model = models.build(family, "trained", models.TINY, 64, 0).eval()
    for name, parameter in model.named_parameters():  # not what they start at, which hides what they do
        if name.endswith((".D", "dt_bias", "conv1d.bias", "norm.weight")):
            nn.init.normal_(parameter)
    ids = torch.randint(0, 64, (2, 70))
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits
        assert import_module("_ssd").train_by_products(model) == mixers
        got = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=1e-3, atol=2e-5)


def test_without_norms_only_the_mean_is_taken_away(tmp_path: Path):
    models = import_module("_variants")
    model = models.build("transformer", "none", models.TINY, 64, 0).eval()
    ids = torch.randint(0, 64, (2, 40))
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), device="cpu").model
    with torch.no_grad():
        got = loaded(input_ids=ids).last_hidden_state
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.forward = lambda input: input - input.mean(-1, keepdim=True)
        torch.testing.assert_close(got, model.base_model(input_ids=ids).last_hidden_state, rtol=1e-4, atol=1e-4)
    assert got.std() > 0.5  # of the size that a norm would have brought it to


def test_families_have_alike_many_parameters():
    models = import_module("_variants")
    with torch.device("meta"):
        built = [models.build(family, "trained", models.FULL, 4096, 0) for family in models.FAMILIES]
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in built]
    assert all(47e6 < size < 49e6 for size in sizes)
    assert all(11 <= model.config.num_hidden_layers <= 16 for model in built)
    # causal_conv1d reads tokens that lie behind each other with gate and heads between them, at multiples of 8.
    mixers = [module for model in built for module in model.modules() if hasattr(module, "A_log")]
    assert mixers and all(mixer.in_proj.out_features % 8 == 0 for mixer in mixers)


def run_script(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(str(FOLDER / script), run_name="__main__")


@pytest.mark.parametrize(("family", "norms"), [("transformer", "frozen"), ("hybrid", "trained")])
def test_a_model_is_trained_watched_and_read(monkeypatch, corpus_folder: Path, tmp_path: Path, family: str, norms: str):
    out = tmp_path / "checkpoint"
    sizes = ("--tiny", "--rows", 2, "--steps", 20, "--learning-rate", 0.01, "--every", 5, "--samples", 1)
    run_script(
        monkeypatch, "train.py", "--family", family, "--norms", norms, *sizes, "--corpus", corpus_folder, "-o", out
    )
    with (out / "loss.csv").open(newline="") as file:
        curve = list(csv.DictReader(file))
    assert [int(row["step"]) for row in curve] == [10, 20]
    for name in ("text_loss", "answer_loss"):
        assert float(curve[0][name]) > float(curve[-1][name]) + 0.1
    found = json.loads((out / "training.json").read_text())
    assert found["steps"] == 20 and found["tokens"] == 20 * 2 * 512 and found["choices"]["norms"] == norms
    assert 0 < found["text"]["nats_per_token"] < found["text"]["nats_of_guessing"]
    assert [entry["pairs"] for entry in found["retrieval"]] == [2, 5, 9]
    with open_run(out / "run.db") as run:
        assert run.step.values.tolist() == [0, 5, 10, 15] and run.inter_token.notnull().all()
        assert run.answer_loss.values[0] > run.answer_loss.values[-1]
    loaded = load_model(str(out), device="cpu")
    norms_found = [module for module in loaded.model.modules() if isinstance(module, nn.LayerNorm)]
    assert all((module.weight == 1).all() and (module.bias == 0).all() for module in norms_found)
    encoder = PromptEncoder(load_tokenizer(str(out)), loaded.vocabulary)
    task = fit_items(lambda items: KeyValueRetrieval(items=items), 300, encoder, loaded.window)
    measured = extract(loaded, encode_samples(task, 4, encoder, 512), tmp_path / "found", ExtractionOptions())
    assert measured.snapshot.inter_token.isfinite().all() and measured.features([0]).shape == (1, 4, 32)


def test_all_variants_are_run_and_failures_told(monkeypatch, capsys, corpus_folder: Path, tmp_path: Path):
    shutil.copytree(corpus_folder, tmp_path / "work" / "corpus")
    options = ["--work", "work", "--results", "results", "--targets"]
    tiny = ["--tiny", "--steps", 2, "--rows", 2, "--samples", 1]
    with pytest.raises(SystemExit) as ended:
        run_script(monkeypatch, "run.py", "--variants", "transformer-no-norms", *options, *tiny)
    assert ended.value.code == 0, (
        capsys.readouterr().out + (tmp_path / "work/logs/transformer-no-norms.log").read_text()
    )
    kept = sorted(path.name for path in (tmp_path / "results" / "transformer-no-norms").iterdir())
    assert kept == ["loss.csv", "training.json"]
    # What is there is not made again; what fails is told.
    (tmp_path / "work" / "checkpoints" / "ssm").write_text("in the way")
    with pytest.raises(SystemExit) as ended:
        run_script(monkeypatch, "run.py", "--variants", "transformer-no-norms", "ssm", *options, *tiny)
    said = capsys.readouterr().out
    assert ended.value.code == 1 and "transformer-no-norms: trained" in said
    assert "ssm: failed; see work/logs/ssm.log" in said.replace("\n", " ")
    assert "FileExistsError" in (tmp_path / "work" / "logs" / "ssm.log").read_text()
    # Nor is what was made with other options taken for what is asked for now.
    whole = (tmp_path / "work/checkpoints/transformer-no-norms/training.json").read_bytes()
    for changed, told in (
        (["--rows", 4], "found one made with --rows 2, not 4; remove this folder to train it again, or name another"),
        (["--steps", 3, "--seed", 1], "found one made with --seed 0, not 1, --steps 2, not 3"),
    ):
        with pytest.raises(SystemExit, match=f"work/checkpoints/transformer-no-norms: expected .*{told}"):
            run_script(monkeypatch, "run.py", "--variants", "transformer-no-norms", *options, *tiny, *changed)
    with pytest.raises(SystemExit, match=r"work/corpus: expected the tokens of --text-mib 2\.0, found those of 1\.0"):
        run_script(monkeypatch, "run.py", "--variants", "ssm", *options, *tiny, "--text-mib", 2)
    assert (tmp_path / "work/checkpoints/transformer-no-norms/training.json").read_bytes() == whole


def test_a_trial_has_places_of_its_own(monkeypatch):
    """With tiny models nothing lands where results are published, and little text is read."""
    run = import_module("run")
    for given, work, results, mib in (
        (["--tiny"], "paper-work-tiny", Path("paper-work-tiny/results"), "1.0"),
        (["--tiny", "--work", "here", "--text-mib", "2"], "here", Path("here/results"), "2.0"),
        (["--tiny", "--results", "there"], "paper-work-tiny", Path("there"), "1.0"),
        ([], "paper-work", FOLDER / "results", "64.0"),
    ):
        monkeypatch.setattr(sys, "argv", ["run.py", *given, "--steps", "20"])
        options, passed = run.parse()
        assert (options.work, options.results) == (Path(work), results)
        assert passed == ["--steps", "20", "--text-mib", mib, *(["--tiny"] if "--tiny" in given else [])]


def test_models_may_have_times_of_their_own(monkeypatch, capsys):
    run = import_module("run")
    for words, of_ssm, of_others in (([], 70.0, 70.0), (["40"], 40.0, 40.0), (["ssm=190", "40"], 190.0, 40.0)):
        monkeypatch.setattr(sys, "argv", ["run.py", *(["--seconds", *words] if words else [])])
        found = run.parse()[0].seconds
        assert found == dict.fromkeys(run.VARIANTS, of_others) | {"ssm": of_ssm}
    for word, told in (
        ("mamba=3", "expected one of ssm, hybrid"),
        ("ssm=long", "expected a number, or NAME=NUMBER"),
    ):
        monkeypatch.setattr(sys, "argv", ["run.py", "--seconds", word])
        with pytest.raises(SystemExit):
            run.parse()
        assert told in capsys.readouterr().err.replace("\n", " ")


def test_enough_text_is_held_out(tmp_path: Path):
    """Of many small files more than one in fifty, for the loss on a row of tokens."""
    for number in range(60):
        (tmp_path / f"{number}.py").write_text(f"value_{number} = {number}\n" * 40)
    corpus = import_module("_corpus")
    corpus.prepare(tmp_path / "corpus", 1.0, tmp_path)
    assert corpus.load(tmp_path / "corpus").validation_bytes >= 2**14


def test_norms_are_of_the_transformer(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run_script(monkeypatch, "train.py", "--family", "ssm", "--norms", "none")
    assert "--norms: expected 'trained' for ssm and hybrid" in capsys.readouterr().err
