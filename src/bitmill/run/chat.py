"""From what people say to the tokens a model reads: turns, chat templates, control words in documents."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from bitmill.checkpoint.tokenizer import render_chat
from bitmill.core.errors import BadFile, Refused


class Conversation:
    """Turns of a user and a model; through the model's chat template, which runs in a sandbox.

    Args:
        system: what stands before the first turn.
        plain: the text of a turn as it is, without a template. Such a conversation has one turn.

    Raises:
        Refused: there is a system text, and no template to put it into.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, system: str | None = None, plain: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self.plain = plain or not tokenizer.chat_template
        if self.plain and system is not None:
            why = "--plain leaves the chat template out" if plain else "the model has no chat template"
            raise Refused(f"{why}, so that there is no place for a system text", fix="leave out --system")
        self._system = system
        self._opening = [] if system is None else [{"role": "system", "content": system}]
        self._turns: list[dict[str, str]] = []

    def ask(self, text: str, opening: str = "") -> tuple[list[int], int]:
        """The tokens of the whole conversation with this turn, and how many of them are ``opening``.

        The turn is kept once :meth:`answered` is called.

        Args:
            opening: how the model's answer is to begin.

        Raises:
            Refused: the text is empty.
            BadFile: the chat template fails.
        """
        if not text.strip():
            raise Refused("the prompt is empty", fix="say something")
        if self.plain:
            before = list(self._tokenizer(text, verbose=False)["input_ids"])
        else:
            before = self._ids(self._rendered(text))
        return [*before, *self._ids(opening)], len(self._ids(opening))

    def answered(self, text: str, answer: str) -> None:
        """Keep a turn and its answer."""
        self._turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    def forget(self) -> None:
        """Start over, with the same system text."""
        self._turns = []

    def _rendered(self, text: str) -> str:
        messages = [*self._opening, *self._turns, {"role": "user", "content": text}]
        try:
            return render_chat(self._tokenizer, messages)
        except BadFile as error:
            if self._system is None:
                raise BadFile(error.what, fix="--plain goes without the template") from error
            fix = "the template may have no place for a system text: leave out --system"
            raise BadFile(error.what, fix=fix) from error

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def defused(text: str, tokenizer: PreTrainedTokenizerFast) -> tuple[str, dict[str, int]]:
    """``text`` in which the tokenizer's control words are ordinary words, and how often each stood there.

    A document that says ``<|im_end|>`` would end the user's turn and speak for the model. A space behind the
    first character makes words of it.
    """
    found: dict[str, int] = {}
    words = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special and len(t.content) > 1}
    for word in sorted(words, key=len, reverse=True):
        count = text.count(word)
        if count:
            found[word] = count
            text = text.replace(word, f"{word[0]} {word[1:]}")
    return text, found
