"""Tests of what TensorBoard shows beside the curves."""

import io
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import runs
from tre_lightning.callbacks.entropy_histograms import BINS, EntropyHistograms
from tre_lightning.callbacks.heat_map import Sample, heat_map, printable
from tre_lightning.entropy import entropy_stats

HISTOGRAMS = (
    "entropy/region_size_histogram",
    "entropy/full_by_position",
    "entropy/region_by_position",
)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that went on after its first epoch."""
    directory = tmp_path_factory.mktemp("run") / "run"
    runs.run(directory, "--trainer.max_epochs=1")
    runs.resume(directory)
    return directory


def events(directory: Path) -> EventAccumulator:
    sizes = {"histograms": 0, "images": 0, "tensors": 0, "scalars": 0}
    return EventAccumulator(str(directory), sizes).Reload()


# ----- a run


def test_histograms_of_every_iteration(run_dir: Path) -> None:
    found = events(run_dir)
    assert set(found.Tags()["histograms"]) == set(HISTOGRAMS)
    for tag in HISTOGRAMS:
        assert [e.step for e in found.Histograms(tag)] == list(range(runs.ITERATIONS)), tag
    lengths = [v for _, v in runs.scalars(run_dir)["rollout/response_length"]]
    single = [v for _, v in runs.scalars(run_dir)["entropy/single_token_fraction"]]
    full = [v for _, v in runs.scalars(run_dir)["entropy/full"]]
    tokens = [length * 16 for length in lengths]  # 4 prompts x 4 responses
    for i, event in enumerate(found.Histograms(HISTOGRAMS[0])):
        counts = event.histogram_value.bucket
        assert sum(counts) == pytest.approx(tokens[i], rel=1e-5)
        assert counts[0] == pytest.approx(single[i] * tokens[i], rel=1e-5, abs=1e-6)
    for i, event in enumerate(found.Histograms(HISTOGRAMS[1])):
        heights = event.histogram_value.bucket
        assert min(heights) <= full[i] <= max(heights)


def test_histograms_as_rarely_as_curves_and_no_samples(tmp_path: Path) -> None:
    none = {"model.evaluation": {"num_responses": 2, "num_samples_logged": 0}}
    runs.run(tmp_path / "run", "--trainer.log_every_n_steps=2", changes=none)
    found = events(tmp_path / "run")
    assert not found.Tags()["images"]
    for tag in HISTOGRAMS:
        assert [e.step for e in found.Histograms(tag)] == [1, 3], tag


def test_heat_map_of_every_validation(run_dir: Path) -> None:
    pictures = events(run_dir).Images("val/heat_map")
    assert [picture.step for picture in pictures] == [0, 1, 3]
    assert [step for step, _ in runs.texts(run_dir, "val/samples")] == [0, 1, 3]
    images = [Image.open(io.BytesIO(p.encoded_image_string)) for p in pictures]
    assert len({image.tobytes() for image in images}) > 1  # of the policy as it changes


def hparams(directory: Path) -> Mapping[str, HParamsPluginData]:
    found = events(directory)
    return {
        tag: HParamsPluginData.FromString(found.SummaryMetadata(tag).plugin_data.content)
        for tag in found.Tags()["tensors"]
        if tag.startswith("_hparams_/")
    }


def test_hyperparameters_and_results(run_dir: Path) -> None:
    written = hparams(run_dir)
    assert set(written) == {metadata.EXPERIMENT_TAG, metadata.SESSION_START_INFO_TAG}
    values = written[metadata.SESSION_START_INFO_TAG].session_start_info.hparams
    assert values["method"].string_value == "TrustRegionEntropy (coef 0.01, top_p 0.9)"
    assert values["method.coef"].number_value == 0.01
    assert values["method.top_p"].number_value == 0.9 and "method.top_k" not in values
    assert values["optim.lr"].number_value == 0.01
    assert values["optim.betas"].string_value == "(0.9, 0.999)" and "ppo.fused" not in values
    session = written[metadata.SESSION_START_INFO_TAG].session_start_info
    assert session.group_name == str(run_dir)  # two runs are two rows
    experiment = written[metadata.EXPERIMENT_TAG].experiment
    assert set(values) < {info.name for info in experiment.hparam_infos}
    results = [(info.name.group, info.name.tag) for info in experiment.metric_infos]
    curves = runs.scalars(run_dir)
    assert {tag for folder, tag in results if not folder} <= set(curves)
    assert {("", "val/pass@1"), ("", "val/pass@2"), ("test", "test/score")} <= set(results)
    assert "hp_metric" not in curves
    assert [step for step, _ in curves["val/score"]] == [0, 1, 3]  # no point of its own


def test_results_of_the_test_command_lie_where_the_row_looks(run_dir: Path, tmp_path: Path) -> None:
    runs.run(run_dir, "--ckpt_path=last", command="test")
    experiment = hparams(run_dir)[metadata.EXPERIMENT_TAG].experiment
    looked_for = {i.name.tag for i in experiment.metric_infos if i.name.group == "test"}
    assert looked_for <= set(runs.scalars(run_dir / "test"))
    found = events(run_dir / "test")
    assert found.Tags()["images"] == ["test/heat_map"]
    assert not hparams(run_dir / "test")  # no row of its own


def test_a_resumed_run_writes_its_row_once(run_dir: Path, tmp_path: Path) -> None:
    for tag in (metadata.EXPERIMENT_TAG, metadata.SESSION_START_INFO_TAG):
        assert len(events(run_dir).Tensors(tag)) == 1
    # In another directory it is another run.
    last = f"--ckpt_path={run_dir}/checkpoints/last.ckpt"
    runs.run(tmp_path / "other", last, "--trainer.max_epochs=3")
    assert metadata.SESSION_START_INFO_TAG in hparams(tmp_path / "other")


# ----- histograms


def test_histograms_by_hand() -> None:
    # V = 8: the axis of sizes has 3 units, 10 bins each.
    flat, sharp = torch.zeros(8), torch.tensor([50.0, *[0.0] * 7])
    pair = torch.tensor([50.0, 50.0, *[0.0] * 6])
    logits = torch.stack([torch.stack([sharp, pair, flat]), torch.stack([pair, flat, flat])])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    histograms = EntropyHistograms(8, 5)
    stats = entropy_stats(logits, top_p=0.99)
    for row in range(2):
        histograms.update(
            type(stats)(*(part[row : row + 1] for part in stats)), mask[row : row + 1]
        )
    found = histograms.compute()
    sizes, end = found[HISTOGRAMS[0]]
    assert end == 3.0
    expected = [0.0] * BINS
    expected[0], expected[10], expected[29] = 1.0, 2.0, 2.0
    assert sizes.tolist() == expected
    for tag in HISTOGRAMS[1:]:  # here the region holds all of the mass
        means, end = found[tag]
        log2 = torch.tensor(2.0).log().item()
        by_position = [log2 / 2, (log2 + 3 * log2) / 2, 3 * log2, 0.0, 0.0]
        assert end == 5.0
        assert means.tolist() == pytest.approx([v for v in by_position for _ in range(6)], abs=1e-6)


def test_long_responses_share_bins() -> None:
    logits = torch.zeros(1, 60, 4)
    logits[:, :2, 0] = 50.0  # the first bin holds the first two positions
    histograms = EntropyHistograms(4, 60)
    histograms.update(entropy_stats(logits, top_k=4), torch.ones(1, 60, dtype=torch.bool))
    means, _ = histograms.compute()["entropy/full_by_position"]
    assert means[0] == pytest.approx(0.0, abs=1e-6)
    assert means[1:].tolist() == pytest.approx([torch.tensor(4.0).log().item()] * (BINS - 1))


# ----- heat map


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" so", "·so"),
        ("x ", "x·"),
        ("  ", "··"),
        ("\n", r"\n"),
        (r"\frac", r"\frac"),
        ("π", r"\u03c0"),
        ("\x1b[0m", r"\x1b[0m"),
        ("a" * 30 + "b" * 30, "a" * 11 + "..." + "b" * 10),
        ("", ""),
    ],
)
def test_tokens_as_the_font_can_show_them(token: str, shown: str) -> None:
    assert printable(token) == shown


@pytest.mark.parametrize("vocabulary", [16, 49_152])
def test_heat_map_colours_entropy_and_size_up_to_those_of_the_vocabulary(vocabulary: int) -> None:
    def colors(entropy: float, size: int) -> set[tuple[int, ...]]:
        drawn = heat_map([Sample("", ["w" * 9], [entropy], [size])], vocabulary)
        cells = drawn[40:, :100].reshape(-1, 3).tolist()  # below the legend
        return {(red, green, blue) for red, green, blue in cells}

    most = math.log(vocabulary)
    assert (140, 0, 30) in colors(most, 1) and (140, 0, 30) not in colors(most / 2, 1)
    assert (253, 174, 97) in colors(most / 4, 1) and (253, 174, 97) not in colors(0.0, 1)
    root = round(vocabulary**0.5)
    assert (30, 40, 120) in colors(0.0, vocabulary) and (30, 40, 120) not in colors(most, root)
    assert {(255, 255, 255)} <= colors(-1e-9, 1) - {(140, 0, 30)}
    assert (128, 128, 128) in colors(float("nan"), 1)


def test_heat_map_wraps_and_ends() -> None:
    def height(tokens: int) -> int:
        sample = Sample("prompt", ["token"] * tokens, [0.0] * tokens, [1] * tokens)
        return len(heat_map([sample], 50))

    assert height(2) == height(3) < height(100) < height(256) < height(257) == height(100_000)
