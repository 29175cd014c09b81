"""How a task's prompts are put to the policy: system message, template, examples, prefix."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tre_lightning.policy.chat import Messages
from tre_lightning.tasks.sources import read_rows, text_of

DEFAULT = "default"  # the system message that the chat template writes by itself, if it does
PROMPT = "prompt"  # the field that every prompt has

_FIELD = re.compile(r"\{\{[ \t]*(\w+)[ \t]*\}\}")


@dataclass(frozen=True)
class Wording:
    """What stands around every prompt.

    ``system`` is a system message, or ``default``, or None for none; ``template`` the text of the
    user's message, with fields as ``{{prompt}}``, and ``template_file`` its file; ``examples`` are
    messages of user and assistant in turn; ``prefix`` begins the response.
    """

    system: str | None = DEFAULT
    template: str | None = None
    template_file: str | None = None
    examples: tuple[Mapping[str, str], ...] = ()
    prefix: str = ""

    @property
    def texts(self) -> list[str]:
        """Every text that is written here."""
        system = [] if self.system in (None, DEFAULT) else [str(self.system)]
        return [*system, *(m["content"] for m in self.examples), self.template or "", self.prefix]

    def around(self, messages: Messages, fields: Mapping[str, str]) -> Messages:
        """The messages that the policy reads for a prompt.

        Args:
            messages: of the prompt; the last one of the user is put into the template, and a system
                message among them goes before ours.
            fields: what the template may name besides ``prompt``.

        Raises:
            ValueError: if it names another field.
        """
        own = messages[:1] if messages[0]["role"] == "system" else []
        rest = list(messages[len(own) :])
        if self.template is not None:
            place = max(i for i, m in enumerate(rest) if m["role"] == "user")
            known = {PROMPT: rest[place]["content"], **fields}
            for name in fields_of(self.template):
                if name not in known:
                    raise ValueError(
                        f"data.template_file={self.template_file} names the field {{{{{name}}}}}, "
                        f"which this task's prompts do not have; use {', '.join(known)}"
                    )
            content = filled(self.template, known)
            rest[place] = {"role": "user", "content": content}
        if not own and self.system not in (None, DEFAULT):
            own = [{"role": "system", "content": str(self.system)}]
        return [*own, *map(dict, self.examples), *rest]


def read_wording(
    system: str | None, template_file: str | None, few_shot_file: str | None, prefix: str
) -> Wording:
    """The wording with what its files hold.

    Raises:
        ValueError: naming the option, if a file cannot be read or has not what it needs.
    """
    template = None if template_file is None else _read_template(template_file)
    examples: Messages = []
    if few_shot_file is not None:
        try:
            examples = _read_examples(few_shot_file, template)
        except ValueError as error:
            option = "data.few_shot_file="
            text = str(error).removeprefix(option)
            raise ValueError(option + text) from error
    return Wording(system, template, template_file, tuple(examples), prefix)


def _read_examples(file: str, template: str | None) -> Messages:
    asked_in = template or f"{{{{{PROMPT}}}}}"
    names = fields_of(asked_in)
    examples: Messages = []
    for where, row in read_rows("data.few_shot_file", file):
        fields = {name: text_of(row, name, where) for name in names}
        response = text_of(row, "response", where)
        examples.append({"role": "user", "content": filled(asked_in, fields)})
        examples.append({"role": "assistant", "content": response})
    if not examples:
        row_like = ", ".join(f'"{name}": ...' for name in [*names, "response"])
        raise ValueError(f"{file} holds no example; add rows like {{{row_like}}}")
    return examples


def fields_of(template: str) -> list[str]:
    """Names of the fields in a template, each once."""
    return list(dict.fromkeys(_FIELD.findall(template)))


def filled(template: str, fields: Mapping[str, str]) -> str:
    """The template with the fields in place; what a field holds is not looked into."""
    return _FIELD.sub(lambda found: fields[found[1]], template)


def _read_template(file: str) -> str:
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        said = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise ValueError(
            f"data.template_file={file} cannot be read ({said}); give a text file with fields as "
            "{{prompt}}"
        ) from error
    if not fields_of(text):
        raise ValueError(
            f"data.template_file={file} names no field; write {{{{prompt}}}} where the task's own "
            "text belongs"
        )
    return text.removesuffix("\n")
