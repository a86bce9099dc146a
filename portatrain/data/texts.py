"""From a text to the token ids that a model was trained on, and back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from portatrain.data.chat import ending
from portatrain.data.encode import Encoding, encoding
from portatrain.data.own import gives_documents
from portatrain.data.spec import DataSpec, Megatron, Mixture, PackedTokens, TokenMemmap, has_text
from portatrain.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The texts of a model.

    Attributes:
        encoding: from bytes to ids and back; None if the data are ids, of which no text is known.
        opens: the ids before a text, as in training, where every document begins with one.
        stops: the ids at which a text ends. Documents follow each other, so the id that opens the next one ends this;
            after chats also the one that ends an answer.
        first: the id before the first token of a text that nothing precedes; None if none is known.
    """

    encoding: Encoding | None
    opens: tuple[int, ...]
    stops: frozenset[int]
    first: int | None = None

    def ids(self, text: str, what: str = "prompt") -> list[int]:
        """Return the ids of a text, opened. Raises UserError if no encoding is known."""
        if self.encoding is None:
            raise UserError(
                what, expected="token ids, since no tokenizer of this model is known", got="a text", do="Give ids."
            )
        return [*self.opens, *self.encoding(text.encode(), what).tolist()]

    def after(self, prompt: Sequence[int], tokens: Sequence[int]) -> str | None:
        """Return the text of `tokens` where they continue `prompt`; None if no encoding is known."""
        if self.encoding is None:
            return None
        prompt = prompt[len(self.opens) :] if tuple(prompt[: len(self.opens)]) == self.opens else prompt
        before, whole = self.encoding.text(prompt), self.encoding.text([*prompt, *tokens])
        return whole[len(before) :] if whole.startswith(before) else self.encoding.text(tokens)


def texts_of(data: DataSpec) -> Texts:
    """Return the texts of a data spec.

    Raises UserError if its tokenizer cannot be read, or if its sources have several.
    """
    sources = list(_sources(data))
    if all(isinstance(s, (TokenMemmap, Megatron)) for s in sources):
        separators = {getattr(s, "separator", None) for s in sources}
        return Texts(encoding=None, opens=(), stops=frozenset(n for n in separators if n is not None))
    given = {_tokenizer(s) for s in sources}
    if None in given:
        return Texts(encoding=None, opens=(), stops=frozenset())
    if len(given) > 1:
        names = ", ".join(sorted(str((each and each[0]) or "bytes") for each in given))
        raise UserError("the data", expected="one tokenizer", got=names, do="Give the prompts as token ids.")
    made = encoding(*(given.pop() or (None, None)))
    ends = {end for s in sources if (end := ending(s, made)) is not None}
    return Texts(encoding=made, opens=(int(made.bos),), stops=frozenset({int(made.bos), *ends}), first=int(made.bos))


def _tokenizer(source: DataSpec) -> tuple[str | None, str | None] | None:
    """Return (tokenizer, bos) of a source of text, of which bytes have (None, None); None for other sources."""
    if isinstance(source, PackedTokens):
        from portatrain.data.store.reading import made_from_text

        return made_from_text(source)
    if not (has_text(source) or gives_documents(source)):
        return None
    return getattr(source, "tokenizer", None), getattr(source, "bos", None)


def _sources(data: DataSpec) -> Iterator[DataSpec]:
    if isinstance(data, Mixture):
        for source in data.sources:
            yield from _sources(source)
    else:
        yield data
