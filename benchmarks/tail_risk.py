"""Does entropy on every token ruin long generations, and does Trust Region Entropy not? Without RL.

    python benchmarks/tail_risk.py --out runs/tail_risk           # some 15 minutes on 2 cores
    python benchmarks/tail_risk.py --out runs/tail_risk --quick   # a smoke test, no result

A tiny policy of 4,096 token ids, 24 of them words, learns endless chains of exact sums
(``3 + 5 = 8 , 8 - 2 = 6 , ...``) from labels of which a share is replaced by random ids: that is
where its tail comes from. From each warm start every method takes steps of one length that raise
its own objective on fixed samples of the warm start. Then streams are sampled and judged: a
*foreign* token is no word, a *misplaced* one is a word of a kind that cannot stand there (both are
invalid), a *wrong* one is a number where a number belongs, but not the right one.

Writes ``rows.jsonl`` (a line for each share of noise and seed; those that are there are not run
again), ``tables.md`` and, where matplotlib is installed, ``tail_risk.png``.
"""

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import PreTrainedModel

from tre_lightning.batches import PromptBatch
from tre_lightning.common.seeding import derived_seed, generator, uniforms
from tre_lightning.compare.statistics import estimate
from tre_lightning.entropy import full_entropy
from tre_lightning.methods import EntropyBonus, LossTerm, PolicyOutputs, Tokens, TrustRegionEntropy
from tre_lightning.ops.functions import token_stats
from tre_lightning.policy.actor_critic import PolicyArgs, load_language_model
from tre_lightning.policy.head import label_logprobs
from tre_lightning.sampling.in_process import generate

METHODS: dict[str, Callable[[], LossTerm]] = {
    "global": EntropyBonus,
    "TRE-K 2": lambda: TrustRegionEntropy(top_k=2),
    "TRE-K 5": lambda: TrustRegionEntropy(top_k=5),
    "TRE-P .99": lambda: TrustRegionEntropy(top_p=0.99),
    "TRE-P .9": lambda: TrustRegionEntropy(top_p=0.9),
}
HORIZONS = (12, 48, 96, 192, 384)  # tokens
GAINS = (0.02, 0.05, 0.1, 0.2, 0.4)  # nats of entropy over the vocabulary
VOCABULARY = 4096
NUMBERS = 20  # ids 0 to 19 are the numbers themselves
PLUS, MINUS, EQUALS, COMMA = range(NUMBERS, NUMBERS + 4)
SUM = 6  # tokens: a number is followed by sign, operand, =, result, comma, and the result again
WORDS = NUMBERS + 4  # the ids from here on are never valid
Fields = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """How much is done; the result depends on every field."""

    hidden: int = 64
    word_steps: int = 700
    noisy_steps: int = 120
    sft_rows: int = 32  # streams of 48 tokens
    word_lr: float = 8e-3  # at first
    noisy_lr: float = 4e-3
    rollouts: int = 48  # samples of the warm start, 192 tokens each, that the methods step on
    step_rows: int = 6  # of them in one step
    steps: int = 30
    direction: str = "adam"
    step_length: float = 0.1  # Euclidean distance in parameter space
    sampled_steps: tuple[int, ...] = (20,)
    sampled_gains: tuple[float, ...] = (0.1, 0.2)  # nats of entropy over the vocabulary
    judged_rows: int = 4  # right streams of 192 tokens on which entropy and tail are measured
    streams: int = 128
    length: int = 384


QUICK = Sizes(
    hidden=16,
    word_steps=4,
    noisy_steps=4,
    rollouts=4,
    step_rows=2,
    steps=2,
    sampled_steps=(1,),
    sampled_gains=(1e-4,),
    judged_rows=1,
    streams=4,
    length=48,
)

# ----- the task


def chains(rows: int, sums: int, random: torch.Generator) -> Tensor:
    """Right streams ``[rows, 1 + 6 * sums]``: a number, then sums that start at the last result."""
    value = torch.randint(NUMBERS, (rows,), generator=random)
    columns = [value]
    for _ in range(sums):
        operand = torch.randint(1, 10, (rows,), generator=random)
        minus = torch.randint(2, (rows,), generator=random).bool()
        minus = torch.where(minus, value >= operand, value + operand >= NUMBERS)
        value = torch.where(minus, value - operand, value + operand)
        sign = torch.where(minus, MINUS, PLUS)
        columns += [sign, operand, torch.full_like(value, EQUALS), value]
        columns += [torch.full_like(value, COMMA), value]
    return torch.stack(columns, dim=1)


def belongs(length: int) -> Tensor:
    """Which ids may stand at each of the tokens that follow the first number, ``[length, V]``."""
    ids = torch.arange(VOCABULARY)
    number = ids < NUMBERS
    kinds = [(ids == PLUS) | (ids == MINUS), number, ids == EQUALS, number, ids == COMMA, number]
    return torch.stack([kinds[t % SUM] for t in range(length)])


def required(ids: Tensor) -> Tensor:
    """The one right number after each prefix, ``[B, 1 + T] -> [B, T]``; -1 where none is required.

    The result must be that of its own sum, and the next number must repeat the result as it stands.
    A right result may not exist (beyond 19, below 0): then no number equals it.
    """
    before, target = ids[:, :-1], torch.full_like(ids[:, 1:], -1)
    signed = torch.where(before[:, 1::SUM] == MINUS, -before[:, 2::SUM], before[:, 2::SUM])
    results = before[:, 0::SUM][:, : signed.shape[1]] + signed
    target[:, 3::SUM] = torch.where((results >= 0) & (results < NUMBERS), results, VOCABULARY)[
        :, : target[:, 3::SUM].shape[1]
    ]
    target[:, 5::SUM] = before[:, 4::SUM][:, : target[:, 5::SUM].shape[1]]
    return target


class Damage(NamedTuple):
    """Three kinds of damage at each token, ``[B, T]``: whether it is one, or its probability."""

    foreign: Tensor  # no word: valid nowhere
    misplaced: Tensor  # a word of a kind that cannot stand here
    wrong: Tensor  # a number where one belongs, but not the required one


def damage(ids: Tensor) -> Damage:
    """Judge the tokens that follow the first number, ``[B, 1 + T]``, bool."""
    tokens, target = ids[:, 1:], required(ids)
    may = belongs(tokens.shape[1])[torch.arange(tokens.shape[1]), tokens]
    foreign = tokens >= WORDS
    return Damage(foreign, ~may & ~foreign, may & (target >= 0) & (tokens != target))


def masses(p: Tensor, ids: Tensor) -> Damage:
    """Probability of each kind under the distributions ``[B, T, V]`` before the tokens of ids."""
    target = required(ids)
    foreign = p[..., WORDS:].sum(-1)
    valid = (p * belongs(p.shape[1])).sum(-1)
    right = p.gather(-1, target.clamp(0, VOCABULARY - 1).unsqueeze(-1)).squeeze(-1)
    misplaced = p[..., :WORDS].sum(-1) - valid
    return Damage(foreign, misplaced, (valid - right) * (target >= 0))


def survival(damaged: Tensor, horizons: Sequence[int] = HORIZONS) -> dict[str, float]:
    """Share of rows of ``[B, T]`` bool without damage in their first h tokens, by h."""
    return {
        str(h): (~damaged[:, :h].any(1)).double().mean().item()
        for h in horizons
        if h <= damaged.shape[1]
    }


# ----- the policy


def build(hidden: int, seed: int) -> PreTrainedModel:
    """A Qwen3 of two layers that see the last 12 tokens, so that every length looks alike."""
    torch.manual_seed(derived_seed("tail_risk model", seed))
    fields = {
        "model_type": "qwen3",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": hidden // 4,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "use_sliding_window": True,
        "sliding_window": 2 * SUM,
        "max_window_layers": 0,
        "layer_types": ["sliding_attention"] * 2,
    }
    return load_language_model(PolicyArgs(architecture=fields))


def learn(
    model: PreTrainedModel,
    ids: int,
    noise: float,
    steps: int,
    lr: float,
    rows: int,
    *key: int | str,
) -> None:
    """Learn the chains from labels of which a share ``noise`` is drawn from the first ``ids``.

    Only these ids take part in the softmax. The inputs stay right.
    """
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, betas=(0.9, 0.98))
    for step in range(steps):
        decay = 1.0 - 0.97 * step / steps
        optimizer.param_groups[0]["lr"] = lr * min(1.0, (step + 1) / 20) * decay
        random = generator("tail_risk learn", *key, step)
        streams = chains(rows, 8, random)
        labels = streams[:, 1:].clone()
        noisy = torch.rand(labels.shape, generator=random) < noise
        labels[noisy] = torch.randint(ids, labels.shape, generator=random)[noisy]
        hidden = model.base_model(input_ids=streams[:, :-1], use_cache=False).last_hidden_state
        head = model.get_output_embeddings().weight[:ids]
        loss = -label_logprobs(hidden @ head.T, labels).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def warm_start(noise: float, seed: int, sizes: Sizes, folder: Path) -> PreTrainedModel:
    """Learn the chains among the words (kept in ``folder``), then in the noisy vocabulary."""
    model, rows = build(sizes.hidden, seed), sizes.sft_rows
    made_with = (sizes.hidden, sizes.word_steps, rows, sizes.word_lr)
    kept = folder / f"words-{derived_seed(repr(made_with)):x}-{seed}.pt"
    if kept.exists():
        model.load_state_dict(torch.load(kept))
    else:
        learn(model, WORDS, 0.0, sizes.word_steps, sizes.word_lr, rows, "words", seed)
        torch.save(model.state_dict(), kept.with_suffix(f".{noise}"))
        kept.with_suffix(f".{noise}").rename(kept)
    learn(model, VOCABULARY, noise, sizes.noisy_steps, sizes.noisy_lr, rows, "noisy", seed)
    return model


def load(model: PreTrainedModel, parameters: Tensor) -> None:
    """Set all parameters from a vector, which stays as it is."""
    vector_to_parameters(parameters.clone(), model.parameters())


def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits that precede every token after the first, ``[B, 1 + T] -> [B, T, V]``."""
    out: Tensor = model(input_ids=ids[:, :-1], use_cache=False).logits
    return out


def sample(model: PreTrainedModel, rows: int, length: int, *key: int | str) -> Tensor:
    """Streams ``[rows, 1 + length]`` at temperature 1 from random first numbers."""
    first = chains(rows, 0, generator("tail_risk first", *key))
    prompts = PromptBatch(
        prompt_ids=first,
        prompt_mask=torch.ones_like(first, dtype=torch.bool),
        texts=("",) * rows,
        extras=({},) * rows,
        split="test",
        index=0,
        first_row=0,
        total_rows=rows,
    )
    rollout = generate(
        model,
        prompts,
        num_responses=1,
        uniforms=uniforms(rows, length, "tail_risk sample", *key),
        eos_token_ids=[],
        pad_token_id=VOCABULARY - 1,
    )
    return torch.cat([first, rollout.response_ids], dim=1)


# ----- the experiment


def climb(model: PreTrainedModel, term: LossTerm, rollouts: Tensor, sizes: Sizes) -> list[Tensor]:
    """Parameters after each step that raises the method's objective, the start first.

    The direction is that of Adam's step, or of the gradient itself; the length is ``step_length``:
    no method goes farther than another.
    """
    kinds: dict[str, Any] = {"adam": torch.optim.Adam, "gradient": torch.optim.SGD}
    optimizer = kinds[sizes.direction](model.parameters(), lr=1.0)
    path = [parameters_to_vector(model.parameters()).detach().clone()]
    for step in range(sizes.steps):
        rows = torch.arange(step * sizes.step_rows, (step + 1) * sizes.step_rows) % len(rollouts)
        ids = rollouts[rows]
        labels = ids[:, 1:].flatten()
        logits = logits_of(model, ids).flatten(0, 1)
        stats = token_stats(logits, labels, term.regions, reuse_logits=True)
        nothing = torch.zeros(len(labels))
        tokens = Tokens(stats.logprobs.detach(), nothing, nothing.long(), {})
        outputs = PolicyOutputs(stats.logprobs, stats.entropies)
        optimizer.zero_grad()
        term.per_token(outputs, tokens).mean().backward()
        optimizer.step()
        move = parameters_to_vector(model.parameters()).detach() - path[-1]
        path.append(path[-1] + move * (sizes.step_length / move.norm()))
        load(model, path[-1])
    return path


@torch.no_grad()
def measure(model: PreTrainedModel, right: Tensor) -> Fields:
    """Mean entropy and masses per token on right streams."""
    logits = logits_of(model, right)
    found = masses(logits.softmax(-1), right)
    means = {name: value.mean().item() for name, value in found._asdict().items()}
    return {"entropy": full_entropy(logits).mean().item(), **means}


def crossing(values: Sequence[float], level: float) -> tuple[int, float] | None:
    """Step and share of it at which ``values`` first reach ``level``, linear in between."""
    for step, (low, high) in enumerate(itertools.pairwise(values)):
        if high >= level > low:
            return step, (level - low) / (high - low)
    return None


def judge(model: PreTrainedModel, seed: int, right: Tensor, sizes: Sizes) -> Fields:
    """Measure, and sample and judge streams; the same random numbers for all of a seed."""
    found = damage(sample(model, sizes.streams, sizes.length, seed))
    return {
        **measure(model, right),
        "known": survival(found.foreign),
        "valid": survival(found.foreign | found.misplaced),
        "right": survival(found.foreign | found.misplaced | found.wrong),
    }


def run_cell(noise: float, seed: int, sizes: Sizes, folder: Path) -> Fields:
    """One warm start and what every method makes of it."""
    torch.set_num_threads(1)
    started = time.process_time()
    model = warm_start(noise, seed, sizes, folder)
    right = chains(sizes.judged_rows, 32, generator("tail_risk right"))
    rollouts = sample(model, sizes.rollouts, min(192, sizes.length), "rollouts", seed)
    cell: Fields = {"noise": noise, "seed": seed, "sizes": asdict(sizes), "methods": {}}
    cell["start"] = judge(model, seed, right, sizes)
    for name, make in METHODS.items():
        path = climb(model, make(), rollouts, sizes)
        points = []
        for parameters in path:
            load(model, parameters)
            points.append(measure(model, right))
        entropies = [point["entropy"] for point in points]
        places = {f"step {step}": (step - 1, 1.0) for step in sizes.sampled_steps}
        for gain in sizes.sampled_gains:
            place = crossing(entropies, entropies[0] + gain)
            if place is not None:
                places[f"gain {gain}"] = place
        sampled = {}
        for label, (step, share) in places.items():
            load(model, path[step].lerp(path[step + 1], share))
            at = {"at_step": step + share, "distance": sizes.step_length * (step + share)}
            sampled[label] = {**at, **judge(model, seed, right, sizes)}
        cell["methods"][name] = {"path": points, "sampled": sampled}
        load(model, path[0])
    cell["cpu_s"] = time.process_time() - started
    return cell


def read_rows(file: Path) -> list[Fields]:
    """The cells that are done."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def same(kept: Fields, sizes: Sizes) -> bool:
    """Whether a row is of these sizes."""
    return bool(kept == json.loads(json.dumps(asdict(sizes))))


def run_cells(cells: Sequence[tuple[float, int]], sizes: Sizes, out: Path, workers: int) -> None:
    """Run what ``rows.jsonl`` does not have yet, in the order given; each adds its line."""
    file = out / "rows.jsonl"
    rows = [row for row in read_rows(file) if same(row["sizes"], sizes)]
    done = {(row["noise"], row["seed"]) for row in rows}
    todo = [cell for cell in cells if cell not in done]
    if workers == 1:
        for noise, seed in todo:
            keep(run_cell(noise, seed, sizes, out), file)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(run_cell, noise, seed, sizes, out) for noise, seed in todo]
        for future in as_completed(futures):
            keep(future.result(), file)


def keep(row: Fields, file: Path) -> None:
    """Add a line."""
    with file.open("a") as lines:
        lines.write(json.dumps(row) + "\n")
    print(f"noise {row['noise']}, seed {row['seed']}: {row['cpu_s']:.0f} s of CPU", flush=True)


# ----- the report


def predicted(point: Fields, length: int) -> float:
    """Share of streams without a foreign token if every token had the mean risk."""
    return float((1.0 - point["foreign"]) ** length)


def points_at(cells: Sequence[Fields], place: str, method: str) -> list[Fields]:
    """The sampled point of every seed that has it, its entropy gain added."""
    points = []
    for cell in cells:
        sampled = {} if place == "start" else cell["methods"][method]["sampled"]
        point = cell["start"] if place == "start" else sampled.get(place)
        if point is not None:
            points.append({**point, "gain": point["entropy"] - cell["start"]["entropy"]})
    return points


def table(rows: Sequence[Fields]) -> str:
    """Every sampled point in Markdown: means over seeds, t intervals of shares of streams."""
    horizon = max(t for t in HORIZONS if t <= min(192, rows[0]["sizes"]["length"]))
    columns = ["noise", "at", "method", "seeds", "steps", "gain, nats"]
    columns += [f"{kind}, 1e-4" for kind in Damage._fields]
    columns += [f"no foreign in {horizon}", "predicted", f"valid {horizon}"]
    columns += ["right 12", f"right {horizon}"]
    lines = [columns, ["---"] * len(columns)]
    for noise in dict.fromkeys(row["noise"] for row in rows):
        cells = [row for row in rows if row["noise"] == noise]
        lines.append([f"{noise:.2%}", "start", "-", *numbers(cells, "start", "-", horizon)])
        sizes = cells[0]["sizes"]
        places = [f"step {step}" for step in sizes["sampled_steps"]]
        places += [f"gain {gain}" for gain in sizes["sampled_gains"]]
        for place, method in itertools.product(places, METHODS):
            lines.append([f"{noise:.2%}", place, method, *numbers(cells, place, method, horizon)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def numbers(cells: Sequence[Fields], place: str, method: str, horizon: int) -> list[str]:
    """The table's cells of one point, dashes where no seed reached it."""
    points = points_at(cells, place, method)
    seeds = f"{len(points)} of {len(cells)}"
    if not points:
        return [seeds, *["-"] * 10]

    def mean(field: str) -> float:
        return statistics.fmean(point.get(field, 0.0) for point in points)

    def share(kind: str, tokens: int) -> str:
        found = estimate([point[kind][str(tokens)] for point in points])
        interval = f" ({found.low:.2f} to {found.high:.2f})" if found.numbers > 1 else ""
        return f"{found.mean:.2f}{interval}"

    risk = statistics.fmean(predicted(point, horizon) for point in points)
    found = [seeds, f"{mean('at_step'):.1f}", f"{mean('gain'):.3f}"]
    found += [f"{1e4 * mean(kind):.2f}" for kind in Damage._fields]
    found += [share("known", horizon), f"{risk:.2f}", share("valid", horizon)]
    return [*found, share("right", 12), share("right", horizon)]


def masses_table(rows: Sequence[Fields], gains: Sequence[float] = GAINS) -> str:
    """Mass of each kind of damage (1e-4 a token) at equal entropy gains, between two steps linear.

    Means over seeds, and in how many of those where the global entropy gets there too it is below
    that; a gain that a method does not reach from every seed is left out.
    """
    columns = ["noise", "kind", "method", "start", *(f"+{gain} nats" for gain in gains)]
    lines = [columns, ["---"] * len(columns)]
    for noise in dict.fromkeys(row["noise"] for row in rows):
        cells = [row["methods"] for row in rows if row["noise"] == noise]
        for kind, method in itertools.product(Damage._fields, METHODS):
            start = statistics.fmean(cell[method]["path"][0][kind] for cell in cells)
            line = [f"{noise:.2%}", kind, method, f"{1e4 * start:.2f}"]
            for gain in gains:
                found = [at_gain(cell[method]["path"], gain, kind) for cell in cells]
                usual = [at_gain(cell["global"]["path"], gain, kind) for cell in cells]
                pairs = [(x, y) for x, y in zip(found, usual, strict=True) if not math.isnan(y)]
                below = sum(x < y for x, y in pairs)
                mean = 1e4 * statistics.fmean(found)
                count = "" if method == "global" or not pairs else f" ({below}/{len(pairs)})"
                line.append("-" if math.isnan(mean) else f"{mean:.2f}{count}")
            lines.append(line)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def at_gain(path: Sequence[Fields], gain: float, field: str) -> float:
    """A measured mean where the entropy has first risen by ``gain``; NaN if it never has."""
    place = crossing([point["entropy"] for point in path], path[0]["entropy"] + gain)
    if place is None:
        return math.nan
    step, share = place
    return float((1.0 - share) * path[step][field] + share * path[step + 1][field])


def plot(rows: Sequence[Fields], file: Path) -> None:
    """Rows of one share of noise: streams by length, streams and masses by entropy gain."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = rows[0]["sizes"]
    lengths = [t for t in HORIZONS if t <= sizes["length"]]
    places = ["start", *(f"gain {gain}" for gain in sizes["sampled_gains"])]
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for number, method in enumerate(["start", *METHODS]):
        colour = "black" if method == "start" else f"C{number - 1}"
        points = points_at(rows, "start" if method == "start" else places[-1], method)
        if points:
            means = [statistics.fmean(p["known"][str(t)] for p in points) for t in lengths]
            risks = [statistics.fmean(predicted(p, t) for p in points) for t in lengths]
            axes[0].plot(lengths, means, "o-", color=colour, label=f"{method} ({len(points)})")
            axes[0].plot(lengths, risks, "--", color=colour, alpha=0.6)
        if method == "start":
            continue
        reached = [points_at(rows, place, method) for place in places]
        reached = [found for found in reached if found]
        gains = [statistics.fmean(p["gain"] for p in found) for found in reached]
        for kind, tokens, style in (("valid", lengths[-2], "o-"), ("right", 12, "s:")):
            means = [statistics.fmean(p[kind][str(tokens)] for p in found) for found in reached]
            axes[1].plot(gains, means, style, color=colour, label=f"{method}: {kind} {tokens}")
        grid = [sizes["sampled_gains"][-1] * share / 20 for share in range(1, 26)]
        paths = [row["methods"][method]["path"] for row in rows]
        for kind, style in (("foreign", "-"), ("wrong", ":")):
            means = [statistics.fmean(at_gain(path, g, kind) for path in paths) for g in grid]
            axes[2].plot(grid, means, style, color=colour, label=f"{method}: {kind}")
    axes[0].set(title=f"no foreign token, {places[-1]} nats (dashed: predicted)", xlabel="tokens")
    axes[1].set(title="valid and right streams", xlabel="entropy gain, nats")
    axes[2].set(title="mass per token", xlabel="entropy gain, nats", yscale="log")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.suptitle(f"label noise {rows[0]['noise']:.2%}, {len(rows)} warm starts")
    figure.savefig(file, dpi=100)


def main() -> None:
    """Run what is missing, then report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/tail_risk"), help="a directory")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.0006, 0.0, 0.003, 0.01])
    parser.add_argument("--gains", type=float, nargs="+", help="nats at which streams are sampled")
    parser.add_argument("--direction", choices=("adam", "gradient"), default="adam")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    parser.add_argument("--quick", action="store_true", help="a smoke test")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    sizes = QUICK if options.quick else Sizes()
    if options.gains:
        sizes = replace(sizes, sampled_gains=tuple(options.gains))
    if options.direction == "gradient":  # goes faster to where no stream is right
        sizes = replace(sizes, direction="gradient", step_length=0.3 * sizes.step_length)
    first, *others = options.noise
    cells = [(first, seed) for seed in range(options.seeds)]
    cells += [(noise, seed) for seed in range(options.seeds) for noise in others]
    if options.quick:
        cells = cells[:1]
    run_cells(cells, sizes, options.out, options.workers)
    rows = [row for row in read_rows(options.out / "rows.jsonl") if same(row["sizes"], sizes)]
    rows.sort(key=lambda row: (options.noise.index(row["noise"]), row["seed"]))
    tables = table(rows) + "\n" + masses_table(rows)
    (options.out / "tables.md").write_text(tables)
    print(tables)
    plot([row for row in rows if row["noise"] == rows[0]["noise"]], options.out / "tail_risk.png")


if __name__ == "__main__":
    main()
