"""An extraction from samples to statistics and features, and everything that may end it on the way."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from repflow.monitor import RepflowWarning
from repflow.monitor.offline import BeyondWindowError, OfflineError
from repflow.monitor.offline.batching import pad
from repflow.monitor.offline.extracted import Extraction
from repflow.monitor.offline.extraction import ExtractionOptions, extract
from repflow.monitor.offline.loading import LoadedModel, load_model
from repflow.monitor.offline.recorder import StateRecorder
from repflow.monitor.offline.tasks_length import EncodedSamples
from tests.monitor.offline import extraction_process, tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model"), "gpt_neox")


@pytest.fixture(scope="module")
def samples() -> EncodedSamples:
    return extraction_process.samples(24)


@pytest.fixture
def loaded(checkpoint: Path) -> LoadedModel:
    return load_model(str(checkpoint))


def out_of_memory_above(
    loaded: LoadedModel, rows: int, error: type[RuntimeError] = torch.OutOfMemoryError
) -> list[int]:
    """Plant it in the last block; returns the rows of every forward that gets there."""
    seen: list[int] = []

    def planted(module: Any, args: tuple[Tensor, ...]) -> None:
        seen.append(len(args[0]))
        if len(args[0]) > rows:
            raise error("CUDA out of memory" if error is not RuntimeError else "DefaultCPUAllocator: not enough memory")

    loaded.model.layers[2].register_forward_pre_hook(planted)  # pyright: ignore
    return seen


def equal(one: Extraction, other: Extraction) -> bool:
    states = range(4)
    return torch.equal(one.snapshot.sums, other.snapshot.sums) and torch.equal(
        one.features(states), other.features(states)
    )


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_statistics_and_features(kind: str, samples: EncodedSamples, tmp_path: Path):
    loaded = load_model(str(tiny.save(tmp_path / "model", kind)))
    found = extract(loaded, samples, tmp_path / "out", ExtractionOptions(batch_tokens=900), about={"task": "kvpr"})
    assert len(list((tmp_path / "out").glob("0*.pt"))) > 3
    features, total = found.features([3, 0]), None
    with StateRecorder(loaded.model, features=True) as recorder:
        total = recorder.layout.zeros()
        for index, row in enumerate(samples.ids):
            measured = recorder.measure(*pad([row]))
            assert measured.features is not None
            torch.testing.assert_close(features[:, index], measured.features[[3, 0], 0], rtol=1e-4, atol=1e-5)
            recorder.layout.merge_(total, measured.sums)
        expected = recorder.layout.values(total)
    assert (found.snapshot.tokens, found.snapshot.sequences) == (sum(map(len, samples.ids)), 24)
    for name in ("inter_token", "update_inter_token", "adjacent", "v_loc", "v_glob", "cka"):
        torch.testing.assert_close(getattr(found.snapshot, name), expected[name], rtol=1e-4, atol=1e-5, msg=name)
    np.testing.assert_array_equal(found.labels, samples.labels)
    np.testing.assert_array_equal(found.contexts, samples.contexts)
    np.testing.assert_array_equal(found.tokens, [len(row) for row in samples.ids])
    assert found.choices["task"] == "kvpr"
    assert (found.choices["states"], found.choices["cka_estimator"]) == ("residual", "unbiased")


def test_statistics_alone(loaded: LoadedModel, samples: EncodedSamples, tmp_path: Path):
    found = extract(loaded, samples, tmp_path, ExtractionOptions(features=False, metrics=("inter_token",)))
    assert found.snapshot.inter_token.isfinite().all()
    assert found.snapshot.v_loc.isnan() and found.snapshot.cka.isnan().all()
    with pytest.raises(OfflineError, match="expected the features of last tokens, and none were kept"):
        found.features([0])


def test_what_is_done_is_not_done_again(loaded: LoadedModel, samples: EncodedSamples, tmp_path: Path):
    """Neither when it is finished, nor, as far as possible, when files are lost or damaged."""
    first = extract(loaded, samples, tmp_path, extraction_process.OPTIONS)
    seen = out_of_memory_above(loaded, 10**9)
    assert equal(extract(loaded, samples, tmp_path, extraction_process.OPTIONS), first)
    assert seen == []
    whole = (tmp_path / "000003.pt").read_bytes()
    for number in (1, 3, 5):  # `first` reads them still
        (tmp_path / f"00000{number}.pt").unlink()
    (tmp_path / "000003.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "000005.pt").write_bytes(b"a shopping list")
    (tmp_path / "000007.partial").write_bytes(b"left by a kill")
    with pytest.warns(RepflowWarning, match=r"00000[35]\.pt is damaged \(.*\); the batch is measured again") as caught:
        again = extract(loaded, samples, tmp_path, extraction_process.OPTIONS)
    assert len(caught) == 2
    assert len(seen) == 3
    assert equal(again, first)
    assert (tmp_path / "000003.pt").read_bytes() == whole


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.97])
def test_damaged_samples_are_written_again(share: float, loaded: LoadedModel, samples: EncodedSamples, tmp_path: Path):
    first = extract(loaded, samples, tmp_path, extraction_process.OPTIONS)
    whole = (tmp_path / "samples.pt").read_bytes()
    (tmp_path / "samples.pt").write_bytes(whole[: int(share * len(whole))] or b"a shopping list")
    with (
        pytest.warns(RepflowWarning, match=r"samples\.pt is damaged \(\w+\); it is written again"),
        pytest.raises(OfflineError, match=r"samples\.pt is damaged .*; start the extraction again"),
    ):
        Extraction.open(tmp_path)
    seen = out_of_memory_above(loaded, 10**9)
    again = extract(loaded, samples, tmp_path, extraction_process.OPTIONS)
    assert equal(again, first) and np.array_equal(again.labels, first.labels)
    assert seen == []


@pytest.mark.parametrize("content", ["", '{"key": {"parts": 8', '{"key": {}, "about": {}}', "[]"])
def test_parts_of_which_nothing_is_known_are_measured_again(
    content: str, loaded: LoadedModel, samples: EncodedSamples, tmp_path: Path
):
    first = extract(loaded, samples, tmp_path, extraction_process.OPTIONS)
    (tmp_path / "extraction.json").write_text(content)
    (tmp_path / "thesis.pt").write_text("years of work")
    with pytest.raises(OfflineError, match=r"found a damaged extraction\.json .*\. Start the extraction again"):
        Extraction.open(tmp_path)
    with (
        pytest.warns(RepflowWarning, match=r"extraction\.json is damaged .*: the extraction starts anew"),
        pytest.raises(OfflineError, match="expected an empty folder"),
    ):
        extract(loaded, samples, tmp_path, extraction_process.OPTIONS)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.pt"]
    (tmp_path / "thesis.pt").unlink()
    assert equal(extract(loaded, samples, tmp_path, extraction_process.OPTIONS), first)


def test_an_unfinished_extraction(loaded: LoadedModel, samples: EncodedSamples, tmp_path: Path):
    extract(loaded, samples, tmp_path, extraction_process.OPTIONS)
    (tmp_path / "000002.pt").unlink()
    with pytest.raises(OfflineError, match=r"expected [0-9]+ parts, found [0-9]+; part 2 is the first that is missing"):
        Extraction.open(tmp_path)
    with pytest.raises(OfflineError, match=r"expected the folder of an extraction, found no extraction\.json"):
        Extraction.open(tmp_path / "absent")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("options", "states is 'residual', not 'hf'"),
        ("samples", "samples is 24, not 23"),
        ("prompts", "samples_hash is '[0-9a-f]+', not '[0-9a-f]+'"),
        ("weights", "weights_hash is '[0-9a-f]+', not '[0-9a-f]+'"),
    ],
)
def test_a_folder_of_another_extraction(
    change: str, told: str, loaded: LoadedModel, samples: EncodedSamples, tmp_path: Path
):
    extract(loaded, samples, tmp_path)
    options = ExtractionOptions(states="hf") if change == "options" else ExtractionOptions()
    if change == "samples":
        samples = extraction_process.samples(23)
    if change == "prompts":
        samples = extraction_process.samples(24)
        samples.ids[7][3] += 1
    if change == "weights":
        with torch.no_grad():
            loaded.model.layers[1].mlp.dense_h_to_4h.weight[0, 0] += 1  # pyright: ignore
    with pytest.raises(OfflineError, match=rf"found that of another: .*{told}.*\. Name another folder, or remove this"):
        extract(loaded, samples, tmp_path, options)


def test_a_folder_of_something_else(loaded: LoadedModel, samples: EncodedSamples, tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OfflineError, match=r"expected an empty folder, or one with an extraction\.json; name another"):
        extract(loaded, samples, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError], ids=["gpu", "host"])
def test_out_of_memory_halves_the_batch(
    error: type[RuntimeError], loaded: LoadedModel, samples: EncodedSamples, tmp_path: Path
):
    options = ExtractionOptions(batch_tokens=2000)
    expected = extract(loaded, samples, tmp_path / "whole", options)
    seen = out_of_memory_above(loaded, 3, error)
    with pytest.warns(
        RepflowWarning, match=r"out of memory with \d+ sequences of \d+ tokens at once: goes on with"
    ) as w:
        found = extract(loaded, samples, tmp_path / "halves", options)
    told = [
        int(number) for warning in w for number in re.findall(r"with (\d+) s.* with (\d+)", str(warning.message))[0]
    ]
    assert told[0] > 3 >= told[-1]
    assert max(seen[len(told) // 2 :]) <= 3  # and it stays at that
    assert found.choices["forward_tokens"] < 2000
    torch.testing.assert_close(found.snapshot.sums, expected.snapshot.sums, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.features([3]), expected.features([3]), rtol=1e-4, atol=1e-5)


def test_a_halved_batch_stays_so_after_a_restart(loaded: LoadedModel, samples: EncodedSamples, tmp_path: Path):
    """Otherwise the bits would hang on when the process was killed."""
    options = ExtractionOptions(batch_tokens=2000)
    seen = out_of_memory_above(loaded, 3)
    with pytest.warns(RepflowWarning, match="out of memory"):
        first = extract(loaded, samples, tmp_path, options)
    (tmp_path / "000002.pt").unlink()
    seen.clear()
    assert equal(extract(loaded, samples, tmp_path, options), first)
    assert seen and max(seen) <= 3


def test_out_of_memory_with_a_single_sequence(loaded: LoadedModel, samples: EncodedSamples, tmp_path: Path):
    out_of_memory_above(loaded, 0)
    with (
        pytest.warns(RepflowWarning, match="out of memory"),
        pytest.raises(OfflineError, match=r"out of memory with a single sequence of \d+ tokens; take a smaller dtype"),
    ):
        extract(loaded, samples, tmp_path)


def test_another_failure_is_not_taken_for_it(loaded: LoadedModel, samples: EncodedSamples, tmp_path: Path):
    loaded.model.layers[1].register_forward_hook(lambda *_: torch.zeros(2) @ torch.zeros(3))  # pyright: ignore
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        extract(loaded, samples, tmp_path)


def test_samples_that_the_model_is_not_made_for(loaded: LoadedModel, tmp_path: Path):
    long = extraction_process.samples(3)
    long.ids[1] = np.zeros(513, dtype=np.int32)
    with pytest.raises(BeyondWindowError, match="skipped 513 tokens: the model's window is 512"):
        extract(loaded, long, tmp_path / "out")
    foreign = extraction_process.samples(3)
    foreign.ids[2][5] = tiny.VOCABULARY
    with pytest.raises(OfflineError, match="expected tokens among the 384 that the model knows, got 384; name the"):
        extract(loaded, foreign, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("untyped")
def test_unknown_choices(loaded: LoadedModel, samples: EncodedSamples, tmp_path: Path):
    with pytest.raises(OfflineError, match=r"metrics: expected some of inter_token, .* got 'ssm'"):
        ExtractionOptions(metrics=("ssm",))
    with pytest.raises(OfflineError, match="expected states among 'residual', 'hf', got 'raw'"):
        extract(loaded, samples, tmp_path, ExtractionOptions(states="raw"))  # pyright: ignore


def test_no_samples(loaded: LoadedModel, tmp_path: Path):
    with pytest.raises(OfflineError, match="expected one sample or more"):
        extract(loaded, extraction_process.samples(0), tmp_path)
    with pytest.raises(OfflineError, match="--batch-tokens: expected 1 or more, got 0"):
        ExtractionOptions(batch_tokens=0)


def test_progress_in_a_log_file(loaded: LoadedModel, samples: EncodedSamples, tmp_path: Path):
    log = io.StringIO()
    extract(loaded, samples, tmp_path, extraction_process.OPTIONS, console=Console(file=log, width=160))
    lines = log.getvalue().splitlines()
    assert 5 <= len(lines) <= 10
    assert re.fullmatch(r".*: \d+%, [\d.]+[KM]? tokens/s, \d+:\d\d left", lines[0])
    assert re.fullmatch(r".*: 100%, [\d.]+[KM]? tokens/s, 0:00 left", lines[-1])
    (tmp_path / "000000.pt").unlink()
    extract(loaded, samples, tmp_path, extraction_process.OPTIONS, console=Console(file=log, width=160))
    assert re.fullmatch(r".*: goes on at 9\d%", log.getvalue().splitlines()[len(lines)])


def test_progress_on_a_terminal(loaded: LoadedModel, samples: EncodedSamples, tmp_path: Path):
    screen = io.StringIO()
    console = Console(file=screen, width=160, force_terminal=True)
    extract(loaded, samples, tmp_path, extraction_process.OPTIONS, console=console)
    assert "tokens/s" in screen.getvalue()
    assert "100%" in screen.getvalue()
