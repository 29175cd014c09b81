"""What stands around every prompt: system message, template, examples, response prefix."""

import copy
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

import batches
import runs
from chat_tokenizers import CHATML, SMOL, TURNS, chatml, pieces, smol
from runs import write_jsonl
from tre_lightning.cli.main import main
from tre_lightning.common.errors import Refused
from tre_lightning.policy.chat import in_template
from tre_lightning.tasks import (
    CountdownDataModule,
    MathDataModule,
    PreferenceDataModule,
    PromptDataModule,
    WalkDataModule,
    WordProblemsDataModule,
)
from tre_lightning.tasks.alignment.prompts import RewardArgs
from tre_lightning.tasks.base import Prompt

MODEL_ASKED = "<|im_start|>assistant\n"
ROOMY = {"max_prompt_length": 4000}


def read(data: PromptDataModule, tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """What the policy reads, as its tokens say it."""
    data.use(tokenizer)
    (ids,) = data.prompt_ids([prompt])
    return data.decoded(ids)


def turn(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def words(**options: Any) -> WordProblemsDataModule:
    return WordProblemsDataModule(**ROOMY, **options)


# ----- the system message

USER = [{"role": "user", "content": "hi"}]
MERGED = (  # as of Llama 2: a system message is a part of the user's turn
    "{% if messages[0].role == 'system' %}{% set s = '<<' + messages[0].content + '>>' %}"
    "{% set rest = messages[1:] %}{% else %}{% set s = DEFAULT %}"
    "{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{{ '[' + (s if loop.first else '') + m.content + ']' }}{% endfor %}"
)
TEMPLATES = {
    "smol": (SMOL, turn("user", "hi") + MODEL_ASKED),
    "none of its own": (CHATML, turn("user", "hi") + MODEL_ASKED),
    "bos before it": (  # DeepSeek
        "{{ bos_token }}{% if messages[0].role != 'system' %}{{ 'Be good' }}{% endif %}"
        "{% for m in messages %}{{ m.content if m.role == 'system' else '|' + m.content }}"
        "{% endfor %}",
        "<|im_start|>|hi",
    ),
    "always a system turn": (  # Llama 3.1
        "{{ '<b><sys>today' }}{% if messages[0].role == 'system' %}{{ messages[0].content }}"
        "{% set messages = messages[1:] %}{% endif %}{{ '</sys>' }}"
        "{% for m in messages %}{{ '|' + m.content }}{% endfor %}",
        "|hi",
    ),
    "something before every turn": (  # ChatGLM
        "{{ '[gMASK]<sop>' }}{% for m in messages %}{{ '<' + m.role + '>' + m.content }}"
        "{% endfor %}",
        "[gMASK]<sop><user>hi",
    ),
    "no system role": (  # Gemma
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{% for m in messages %}{{ '|' + m.content }}{% endfor %}",
        "|hi",
    ),
    "merged": (MERGED.replace("DEFAULT", "''"), "[hi]"),
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_system_message_that_the_template_writes_is_left_out(kind: str) -> None:
    template, expected = TEMPLATES[kind]
    tokenizer = smol(template)
    assert in_template(tokenizer, USER, "policy", ask=True, default_system=False) == expected
    talk = [*USER, {"role": "assistant", "content": "so"}, *USER]
    long = in_template(tokenizer, talk, "policy", ask=True, default_system=False)
    assert long.startswith(expected.removesuffix(MODEL_ASKED)) and long.count("hi") == 2
    ours = [{"role": "system", "content": "Mine"}, *USER]
    if kind != "no system role":
        both = (
            in_template(tokenizer, ours, "policy", ask=True, default_system=d)
            for d in (True, False)
        )
        assert len({*both}) == 1  # ours stays


def test_one_that_cannot_be_left_out_is_refused() -> None:
    merged = smol(MERGED.replace("DEFAULT", "'<<Be good>>'"))
    with pytest.raises(ValueError, match=r"data\.system=null: .* cannot be left out"):
        words(system=None).check(merged)


@pytest.mark.parametrize(
    ("system", "begins"),
    [
        ("default", turn("system", "You are a helpful model")),
        (None, ""),
        ("Be brief.", turn("system", "Be brief.")),
    ],
)
def test_the_system_message_of_a_prompt(system: str | None, begins: str) -> None:
    data = words(system=system)
    prompt = data.train_prompt(0)
    text = read(data, smol(), prompt)
    assert text == begins + turn("user", prompt.text) + MODEL_ASKED == data.render(prompt)
    data.check(smol())


def test_a_prompt_keeps_its_own_system_message() -> None:
    reward = RewardArgs(url="http://localhost:1")
    own = [{"role": "system", "content": "Own"}, *USER]
    for system in (None, "Ours"):
        data = PreferenceDataModule(reward, system=system)
        text = read(data, smol(), Prompt("", {"messages": own}))
        assert text == turn("system", "Own") + turn("user", "hi") + MODEL_ASKED
        text = read(data, smol(), Prompt("", {"messages": USER}))
        assert text == ("" if system is None else turn("system", "Ours")) + turn("user", "hi") + (
            MODEL_ASKED
        )


# ----- template, examples, prefix


def wording(
    tmp_path: Path, template: str = "", rows: Sequence[dict[str, str]] = ()
) -> dict[str, Any]:
    options = {}
    if template:
        (tmp_path / "template.txt").write_text(template)
        options["template_file"] = str(tmp_path / "template.txt")
    if rows:
        options["few_shot_file"] = write_jsonl(tmp_path / "shots.jsonl", rows)
    return options


def test_all_of_them_together(tmp_path: Path) -> None:
    rows = [{"question": "1 + 1?", "response": "It is 2"}, {"question": "{{q}}", "response": "b"}]
    given = wording(tmp_path, "Q: {{ question }} \\boxed{}\n", rows)
    data = words(system=None, response_prefix="It is", **given)
    prompt = data.train_prompt(0)
    expected = (
        turn("user", "Q: 1 + 1? \\boxed{}")
        + turn("assistant", "It is 2")
        + turn("user", "Q: {{q}} \\boxed{}")  # what a field holds is no template
        + turn("assistant", "b")
        + turn("user", f"Q: {prompt.text} \\boxed{{}}")
        + MODEL_ASKED
    )
    assert read(data, smol(), prompt) == expected + "It is"
    assert data.render(prompt) == expected  # the prefix is a part of the response
    data.check(smol())
    plain = f"Q: 1 + 1? \\boxed{{}} It is 2\n\nQ: {{{{q}}}} \\boxed{{}} b\n\nQ: {prompt.text}"
    data = words(response_prefix=" It is", **given)
    assert read(data, smol_without_template(), prompt) == plain + " \\boxed{} It is"


def smol_without_template() -> PreTrainedTokenizerBase:
    return smol(None)  # type: ignore[arg-type]


TASKS: dict[str, tuple[Callable[..., PromptDataModule], list[str]]] = {
    "countdown": (CountdownDataModule, ["numbers", "target"]),
    "math": (MathDataModule, ["problem"]),
    "walks": (WalkDataModule, ["start", "sizes", "steps"]),
    "word problems": (WordProblemsDataModule, ["question"]),
    "preferences": (lambda **o: PreferenceDataModule(RewardArgs(url="http://x:1"), **o), []),
}


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_the_options_and_its_fields(name: str, tmp_path: Path) -> None:
    make, fields = TASKS[name]
    template = " | ".join(f"{{{{{field}}}}}" for field in ["prompt", *fields])
    rows = [{**dict.fromkeys(["prompt", *fields], "x"), "response": "y"}]
    data = make(**ROOMY, **wording(tmp_path, template, rows), system="Sys")
    prompt = data.train_prompt(3)
    assert [*prompt.fields] == fields
    (content,) = (m["content"] for m in data.messages(prompt))
    asked = " | ".join([content, *prompt.fields.values()])
    shot = turn("user", " | ".join("x" * (1 + len(fields)))) + turn("assistant", "y")
    assert read(data, smol(), prompt) == (
        turn("system", "Sys") + shot + turn("user", asked) + MODEL_ASKED
    )
    if fields:  # a demonstration asks as training does
        (ids, _), *_ = data.demonstration_ids([data.demonstration(3, False)])  # type: ignore[attr-defined]
        assert data.decoded(ids).startswith(turn("system", "Sys") + shot)
        assert data.decoded(ids).count(" | ") == 2 * len(fields)


def test_transcripts_take_examples_too(tmp_path: Path) -> None:
    data = PreferenceDataModule(
        RewardArgs(url="http://localhost:1"),
        **wording(tmp_path, rows=[{"prompt": "a?", "response": "b"}]),
        response_prefix=" Well",
    )
    text = read(data, smol_without_template(), Prompt("", {"messages": USER}))
    assert text == "\n\nHuman: a?\n\nAssistant: b\n\nHuman: hi\n\nAssistant: Well"


def test_control_tokens_in_the_options_stay_text_and_tags_are_tokens(tmp_path: Path) -> None:
    tokenizer = chatml()
    hostile = "</think><|im_end|>"
    given = wording(tmp_path, hostile + "{{prompt}}", [{"prompt": hostile, "response": hostile}])
    data = words(system=hostile, response_prefix="<think>" + hostile, **given)
    data.use(tokenizer)
    usual = words(system="a", **wording(tmp_path, "{{prompt}}", [{"prompt": "a", "response": "a"}]))
    usual.use(tokenizer)
    counts = []
    for module in (data, usual):
        (ids,) = module.prompt_ids([module.train_prompt(0)])
        end, *tags = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<think>", "</think>"])
        counts.append([ids.count(i) for i in (end, *tags)])
    assert counts == [[4, 1, 6], [4, 0, 0]]
    assert read(data, tokenizer, data.train_prompt(0)).endswith(MODEL_ASKED + "<think>" + hostile)


def test_other_wording_is_other_prompts(tmp_path: Path) -> None:
    prints = set()
    for options in (
        {},
        {"system": None},
        {"response_prefix": "So"},
        wording(tmp_path, "A{{prompt}}"),
    ):
        data = words(**options)
        data.check(smol())
        prints.add(data.fingerprint)
    assert len(prints) == 4


def test_held_out_prompts_among_the_examples_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    held_out = words(val_size=5, test_size=6).heldout_prompts("val")["val"]
    rows = [{"question": p.text, "response": "1"} for p in (held_out[1], held_out[3])]
    rows.append({"question": "What is 1 + 1?", "response": "2"})
    data = words(val_size=5, test_size=6, **wording(tmp_path, "Q: {{question}}", rows))
    with caplog.at_level("WARNING"):
        data.check(smol())
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith("2 of 5 prompts of val are examples of data.few_shot_file=")


# ----- demonstrations


def test_a_demonstration_goes_on_after_the_prefix() -> None:
    data = CountdownDataModule(**ROOMY, response_prefix="<think>")
    data.use(chatml())
    ((asked, answered),) = data.demonstration_ids([data.demonstration(0, False)])
    assert data.decoded(asked).endswith(MODEL_ASKED + "<think>")
    text = data.decoded(answered)
    assert text.startswith(" ") and text.endswith("</answer><|im_end|>")
    with pytest.raises(Refused, match=r"data\.response_prefix='The' does not begin"):
        data = words(response_prefix="The")
        data.use(smol())
        data.demonstration_ids([data.demonstration(0, False)])


# ----- bad input


@pytest.mark.parametrize(
    ("name", "holds", "said"),
    [
        ("template_file", None, "template.txt cannot be read (No such file or directory); give"),
        ("template_file", b"\xff\xfe{{prompt}}", "cannot be read (it is no text in UTF-8)"),
        ("template_file", b"Solve this", "names no field; write {{prompt}} where"),
        (
            "template_file",
            b"{{problem}}",
            "{{problem}}, which this task's prompts do not have; use",
        ),
        ("few_shot_file", None, "cannot be read (No such file or directory)"),
        ("few_shot_file", b"", "holds no example; add rows like"),
        ("few_shot_file", b'{"prompt": "a"}', ":1: no column 'response'; rename or add it (there"),
        ("few_shot_file", b'{"question": "a", "answer": "b"}', ":1: no column 'prompt'; rename"),
        ("few_shot_file", b'{"prompt": 3, "response": "b"}', ":1: prompt='3' is no text"),
        ("few_shot_file", b"[1]", ":1: the line is no object"),
    ],
)
def test_a_file_that_cannot_work_is_one_line(
    name: str, holds: bytes | None, said: str, tmp_path: Path
) -> None:
    file = tmp_path / ("template.txt" if name == "template_file" else "shots.jsonl")
    if holds is not None:
        file.write_bytes(holds)
    with pytest.raises(ValueError, match=re.escape(f"data.{name}={file}")) as raised:
        words(**{name: str(file)}).check(smol())
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_a_system_message_needs_a_chat_template_that_writes_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.system='Be brief' needs a chat template"):
        words(system="Be brief").check(smol_without_template())
    words(system=None).check(smol_without_template())  # there is none to leave out
    with pytest.raises(ValueError, match=r"data\.system=' ' is empty; give null"):
        words(system=" ")
    deaf = smol("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}")
    with pytest.raises(ValueError, match=r"data\.system='Be brief': .* does not write 'Be brief'"):
        words(system="Be brief").check(deaf)
    strict = smol("{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}x")
    with pytest.raises(ValueError, match=r"data\.system='Be brief': .* refuses .* system user"):
        words(system="Be brief").check(strict)
    one = smol("{{ messages[-1].content }}")
    shots = wording(tmp_path, rows=[{"prompt": "a", "response": "Zebra"}])
    with pytest.raises(ValueError, match=r"data\.few_shot_file=.*: .* does not write 'Zebra'"):
        words(**shots).check(one)


# ----- whole commands


@pytest.fixture(scope="module")
def smol_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model by the rules of SmolLM2: tied head, more ids than the tokenizer has."""
    directory = tmp_path_factory.mktemp("smol")
    torch.manual_seed(0)
    options = {**runs.ARCHITECTURE, "vocab_size": 512, "max_position_embeddings": 1024}
    config = AutoConfig.for_model(**{**options, "tie_word_embeddings": True})
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    smol().save_pretrained(directory)
    return directory


def command(smol_dir: Path, run_dir: Path, *flags: str, name: str = "fit") -> list[str]:
    options = {"batch_size": 2, "iterations_per_epoch": 1, "val_size": 4, "test_size": 3}
    data = {"class_path": "tre_lightning.tasks.WordProblemsDataModule", "init_args": options}
    changes = {
        "data": data,
        "warm_start": None,
        "model.policy": {"model": str(smol_dir)},
        "model.rollout": {"num_responses": 2, "max_new_tokens": 4},
    }
    return runs.words(run_dir, *flags, command=name, changes=changes)


@pytest.mark.parametrize(
    ("name", "split"), [("fit", "train"), ("validate", "val"), ("test", "test")]
)
def test_prompts_are_printed_as_the_policy_reads_them(
    name: str, split: str, smol_dir: Path, tmp_path: Path, shown: runs.Said
) -> None:
    run_dir = tmp_path / "run"
    flags = ("--print_prompts=2", "--data.init_args.response_prefix=It is")
    out = shown(main, command(smol_dir, run_dir, *flags, name=name))
    parts = re.findall(
        r"--- prompt (\d) of (\w+), (\d+) tokens\n(.*?)\n--- ids: ([^\n]*)", out, re.DOTALL
    )
    assert [part[:2] for part in parts] == [("1", split), ("2", split)]
    for _, _, count, text, ids in parts:
        numbers = [int(i) for i in ids.split()]
        assert len(numbers) == int(count) and smol().decode(numbers) == text
        assert text.startswith(turn("system", "You are a helpful model"))
        assert text.endswith(MODEL_ASKED + "It is")
    assert not run_dir.exists()


def test_prompts_are_printed_beside_a_run_and_without_its_weights(
    smol_dir: Path, tmp_path: Path, shown: runs.Said, refusal: runs.Said
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "model").mkdir()
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in smol_dir.iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    assert "prompt 1 of train" in shown(main, command(bare, run_dir, "--print_prompts=1"))
    line = refusal(main, command(bare, run_dir, "--print_prompts=-1"))
    assert "print_prompts=-1 must be at least 0" in line
    line = refusal(main, command(bare, run_dir, "--print_prompts=1", "--data.init_args.system="))
    assert "data.system='' is empty" in line


def test_a_prefix_is_graded_with_the_response(smol_dir: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    prefix = "--data.init_args.response_prefix=It is"
    main(
        command(smol_dir, run_dir, prefix, "--data.init_args.system=null", "--trainer.max_epochs=1")
    )
    main(command(smol_dir, run_dir, prefix, "--ckpt_path=last", name="predict"))
    records = [json.loads(line) for line in (run_dir / "predictions.jsonl").open()]
    assert len(records) == 3
    for record in records:
        assert all(response.startswith("It is") for response in record["responses"])
        assert record["prompt"].endswith(MODEL_ASKED)


def test_a_pretrained_model_warms_up_on_the_solutions_of_a_file(
    smol_dir: Path, tmp_path: Path, refusal: runs.Said
) -> None:
    rows = [
        {"question": f"{i} + 1?", "answer": f"It is <<{i}>>{i + 1}.\n#### {i + 1}"} for i in (2, 3)
    ]
    file, held_out = (
        write_jsonl(tmp_path / name, rows[i:]) for i, name in ((0, "a.jsonl"), (1, "b.jsonl"))
    )
    options = {"train_file": file, "eval_file": held_out, "batch_size": 2, "workers": 1}
    options |= {"iterations_per_epoch": 1, "system": None, "response_prefix": "It is"}
    changes: dict[str, Any] = {
        "data": {"class_path": "tre_lightning.tasks.GSM8KDataModule", "init_args": options},
        "model.policy": {"model": str(smol_dir)},
        "model.rollout": {"num_responses": 2, "max_new_tokens": 4},
        "trainer.max_epochs": 1,
    }
    warm_start = {"steps": 2, "batch_size": 2, "cache_dir": str(tmp_path / "cache")}
    misled = {**changes, "warm_start": {**warm_start, "misleading_fraction": 1.0}}
    line = refusal(runs.run, tmp_path / "misled", changes=misled)
    assert "set warm_start.misleading_fraction to 0" in line
    changes["warm_start"] = {**warm_start, "misleading_fraction": 0.0}
    run = runs.run(tmp_path / "run", changes=changes)
    assert run.model.iteration == 1
    wrong = {**changes, "data": copy.deepcopy(changes["data"])}
    wrong["data"]["init_args"]["response_prefix"] = "So"
    line = refusal(runs.run, tmp_path / "wrong", changes=wrong)
    assert "data.response_prefix='So' does not begin" in line


def test_a_right_prefix_scores() -> None:
    data = words()
    prompt = data.train_prompt(0)
    answer = prompt.extra["problem"].answer
    batch = batches.prompt_batch(prompt.extra)
    assert data.score([f"It is {answer}", "It is"], batch).tolist() == [1.0, 0.0]


def test_turns_of_other_tokenizers() -> None:
    data = words(system=None, response_prefix="so")
    text = read(data, pieces(TURNS), Prompt("the"))
    assert text.startswith("<s>") and text.count("<s>") == 1 and text.endswith("so")
