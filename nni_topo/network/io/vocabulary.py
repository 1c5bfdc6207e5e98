"""Remove tokens that a text model doesn't need from its tokenizer, its embeddings and its head.

The tokenizer is changed in its JSON form, as the library ``tokenizers`` writes it. Rows of embeddings and heads keep
their values, so that the outputs for texts whose tokens all stay are the same.
"""

from __future__ import annotations

import copy
import json
import math
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from nni_topo.errors import ConfigError, DataError, listed, out_of_memory, raised
from nni_topo.network.attention.config import is_pretrained
from nni_topo.network.cost.measure import count_params
from nni_topo.network.runtime.arguments import MODEL, check_unwrapped
from nni_topo.network.runtime.calibration import HELD_OUT
from nni_topo.network.runtime.comparison import difference, same_program
from nni_topo.network.runtime.copies import evaluation_mode
from nni_topo.network.runtime.inputs import returned_tensors
from nni_topo.network.runtime.modules import device_of
from nni_topo.network.runtime.progress import bar
from nni_topo.network.runtime.public import public
from nni_topo.network.runtime.switches import random_state_kept
from nni_topo.rules import NONE, Rule, all_of, instance
from nni_topo.sharing import named_tensors

_KINDS = ("WordPiece", "BPE", "Unigram")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a byte of a character that has no token of its own
_COMPARED, _LENGTH = 4, 32  # texts, and tokens of each, on which the outputs before and after are compared
_AT_ONCE = 1000  # texts between two updates of the progress bar
_PADDING, _MULTIPLE, _MOST_PADDING = 128, 32, 0.1  # rows that embeddings may have beyond the tokens: `_check_fit`
_SPECIAL = tuple(f"{name}_token_id" for name in ("pad", "bos", "eos", "unk", "sep", "cls", "mask"))
# Settings that hold ids of tokens, as a number or within lists and mappings: of configs and modules of Transformers,
# and of post-processors and padding in a tokenizer's JSON form.
_SETTINGS_OF_IDS = re.compile(
    r".*_token_(id|ids|index)|(pad|bos|eos|unk|mask)_index|padding_idx|(begin_)?suppress_tokens|forced_decoder_ids"
    r"|bad_words_ids|force_words_ids|sequence_bias|(lang|task)_to_id"
)
_JSON_OF_IDS = re.compile("ids|sep|cls|pad_id")
_Number = Callable[[int], int]  # maps the id of a token to its new id

TEXTS = Rule(
    "a list of texts, at least one",
    lambda value: not isinstance(value, Mapping) and all_of(instance(str), Collection, 1).holds(value),
)
TOKENIZER = Rule(
    "a fast tokenizer of Transformers, which has a backend_tokenizer (AutoTokenizer.from_pretrained makes one)",
    lambda value: callable(getattr(getattr(value, "backend_tokenizer", None), "to_str", None)),
    tell=lambda value: f"a {type(value).__name__}",
)


@dataclass(frozen=True, repr=False)
class VocabularyReport:
    """What the removal of tokens changed; its ``repr`` says it in two sentences.

    Attributes
    ----------
    tokens_before, tokens : int
        Tokens of the tokenizer before and after.
    params_before, params : int
        Parameters of the model before and after.
    split : float
        Share of the tokens of held-out texts that fall into smaller pieces, in [0, 1]; NaN if there are no such texts.
    held_out : int
        Tokens of the held-out texts, special tokens not counted.
    """

    tokens_before: int
    tokens: int
    params_before: int
    params: int
    split: float
    held_out: int

    def __repr__(self) -> str:
        left = self.params / self.params_before
        text = (
            f"{self.tokens:,} of {self.tokens_before:,} tokens stay, and {self.params:,} of {self.params_before:,} "
            f"parameters ({left:.1%}). "
        )
        if math.isnan(self.split):
            return f"{text}No text was held out: pass {HELD_OUT} texts or more, or held_out."
        return f"{text}{self.split:.2%} of {self.held_out:,} tokens of held-out texts fall into smaller pieces."


@dataclass(frozen=True, repr=False)
class TrimmedVocabulary:
    """A model and its tokenizer with fewer tokens; its ``repr`` is the report.

    Attributes
    ----------
    model : transformers.PreTrainedModel
        The model, for ids of the new tokenizer.
    tokenizer : transformers.PreTrainedTokenizerFast
        The new tokenizer.
    ids : Tensor (rows,)
        For each new id the old id, int64, on the CPU.
    report : VocabularyReport
        Tokens and parameters before and after.
    """

    model: Any
    tokenizer: Any
    ids: Tensor
    report: VocabularyReport

    def __repr__(self) -> str:
        return repr(self.report)


@public(model=MODEL, tokenizer=TOKENIZER, texts=TEXTS, held_out=TEXTS | NONE)
def trim_vocabulary(
    model: nn.Module,
    tokenizer: Any,
    texts: Collection[str],
    *,
    held_out: Collection[str] | None = None,
    progress: bool | None = None,
) -> TrimmedVocabulary:
    """Remove tokens that texts don't need from a tokenizer, and their rows from the model's embeddings and head.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A text model, which can run on ``input_ids`` alone. It isn't changed.
    tokenizer : transformers.PreTrainedTokenizerFast
        Its fast tokenizer: WordPiece, BPE or Unigram. It isn't changed.
    texts : collection of str
        Texts as the model gets them, with any prefix. Tokens that they use stay.
    held_out : collection of str, optional
        Other texts, for the share of tokens that fall into smaller pieces. None: every eighth of the ``texts``, by the
        tokens that the other texts use; all texts decide which tokens stay.
    progress : bool or None, default=None
        Show on standard error how far it is: in a terminal a bar, elsewhere a line every half minute. None: after
        five seconds.

    Returns
    -------
    TrimmedVocabulary
        A smaller copy of the model and of the tokenizer, the old id of each new one, and the report.

    Raises
    ------
    ConfigError
        If the model isn't one of Transformers or needs more than ``input_ids``, the tokenizer isn't a fast one of these
        kinds or can't be the model's, Transformers can't resize the model's embeddings, or the smaller model's outputs
        for some of the texts differ from the model's.
    DataError
        If the texts have no tokens, or need every token, so that there is nothing to gain.
    SpeedupError
        If the model is still wrapped.

    See Also
    --------
    nni_topo.shrink : Prunes the smaller model further.
    nni_topo.save_pretrained : Writes it into a folder; ``tokenizer.save_pretrained`` adds the tokenizer.
    nni_topo.shrink_pretrained : Does both for a model that doesn't fit into memory (``vocabulary``).

    Notes
    -----
    Further tokens stay: added and special tokens, single characters (of byte-level BPE all bytes), tokens that BPE
    makes on the way to another token, and those whose ids the configs name. Where a model computes positions from the
    id of padding, as RoBERTa does, this id and those below it stay as they are. A text whose tokens all stay is split
    into the same tokens. Other words fall into smaller pieces; none becomes unknown that wasn't before.

    Tokens keep their order. Rows of embeddings beyond the tokenizer's tokens, as from padding to a multiple of 64, go,
    unless a config names their ids. Ids in the config and in the generation config follow.

    Examples
    --------
    >>> trimmed = trim_vocabulary(model, tokenizer, texts)  # doctest: +SKIP
    >>> nni_topo.save_pretrained(trimmed.model, "folder")  # doctest: +SKIP
    >>> trimmed.tokenizer.save_pretrained("folder")  # doctest: +SKIP
    """
    check_unwrapped(model)
    params_before = count_params(model)
    vocabulary = Vocabulary(model, tokenizer, texts, held_out, progress=progress)
    before = _outputs(model, vocabulary.examples)
    vocabulary.put_into(model)
    after = _outputs(model, [vocabulary.renumbered(ids) for ids in vocabulary.examples])
    kept = vocabulary.ids
    for old, new in zip(before, after, strict=True):
        for dim, sizes in enumerate(zip(old.shape, new.shape, strict=False)):
            if sizes == (vocabulary.rows, len(kept)):
                old = old.index_select(dim, kept.to(old.device))
        if old.shape != new.shape or not difference(old, new) <= same_program([old]):
            raise ConfigError(
                "a model must compute the same on the rows that stay, got other outputs: it reads more from ids than "
                f"an embedding of each ({type(model).__name__})"
            )
    return TrimmedVocabulary(model, vocabulary.tokenizer, kept, vocabulary.report(params_before, count_params(model)))


class Vocabulary:
    """The tokens that stay for texts, and the tokenizer that has these alone.

    ``needed``: further ids that stay. ``ids`` (rows,) has the old id of each new one, ``rows`` is the number of rows of
    the embeddings before, ``examples`` are the old ids of some texts, each (tokens,).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        texts: Collection[str],
        held_out: Collection[str] | None = None,
        *,
        needed: Iterable[int] = (),
        progress: bool | None = None,
    ) -> None:
        kind = type(model).__name__
        if not is_pretrained(model):
            raise ConfigError(f"a model must be one of Transformers, with adapters merged, got {kind} (model)")
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        pieces = _Pieces(content)
        self.rows, self.tokens_before = _rows_of(model), len(pieces.ids)
        _check_fit(model, tokenizer, max(pieces.ids.values()) + 1, self.rows)

        backend = _backend(content, padding=None, truncation=None)
        tokens = _encoded(backend, texts, progress)
        used = set[int]().union(*tokens)
        if not used - pieces.added:
            raise DataError(f"texts must have at least one token that isn't a special one, got none in {len(texts)}")
        always = pieces.always() | set(tokenizer.all_special_ids) | set(needed) | _ids_named_by(model, self.rows)
        if held_out is None:
            judges = tokens[HELD_OUT - 1 :: HELD_OUT]
            by_others = set[int]().union(*(text for place, text in enumerate(tokens, 1) if place % HELD_OUT))
        else:
            judges, by_others = _encoded(backend, held_out, progress), used
            if not any(judges):
                raise DataError(f"held_out must have at least one token, got none in {len(held_out)} (held_out)")
        likely = pieces.closed(by_others | always)
        self.held_out = sum(map(len, judges))
        split = sum(number not in likely for text in judges for number in text)
        self.split = split / self.held_out if self.held_out else math.nan

        kept = pieces.closed(used | always)
        # Tokens that only the list of added tokens has get the ids after those of all others when a file is read. Rows
        # without a token come last.
        of_model, added = pieces.of_model, pieces.added
        order = sorted(kept, key=lambda number: (number not in of_model, number not in of_model | added, number))
        if len(order) == self.rows:
            raise DataError(f"the texts need all {len(pieces.ids):,} tokens: there is nothing to gain ({kind}, texts)")
        self.ids = torch.tensor(order, device="cpu")
        self._new_ids = {old: new for new, old in enumerate(order)}
        self.tokenizer = _with_backend(tokenizer, pieces.with_ids(self._new_ids))
        written = json.loads(self.tokenizer.backend_tokenizer.to_str())
        again = _encoded(_backend(written, padding=None, truncation=None), texts, progress)
        for text, old, new in zip(texts, tokens, again, strict=True):
            if [self.number(each) for each in old] != new:
                raise ConfigError(
                    "a tokenizer must split a text into the same tokens when all of these stay, got others for "
                    f"{text[:40]!r} ({type(tokenizer).__name__}, tokenizer)"
                )
        # With special tokens, as a head may read that of the end, which some tokenizers leave to the user.
        config = model.config.get_text_config()
        positions = getattr(config, "max_position_embeddings", None) or 0  # XLNet has -1, for any number
        backend.enable_truncation(min(_LENGTH, positions // 2) if positions > 1 else _LENGTH)
        self.examples = []
        for text in [text for text, ids in zip(texts, tokens, strict=True) if ids][:_COMPARED]:
            ids = backend.encode(text).ids
            end = getattr(config, "eos_token_id", None)
            if type(end) is int and end in self._new_ids and end not in ids:
                ids.append(end)
            self.examples.append(torch.tensor(ids, device="cpu"))

    def report(self, params_before: int, params: int) -> VocabularyReport:
        """Return the report, with the model's parameters before and after."""
        tokens = len(self.tokenizer)
        return VocabularyReport(self.tokens_before, tokens, params_before, params, self.split, self.held_out)

    def put_into(self, model: Any) -> None:
        """Remove the rows of a model, in place, and renumber the ids in its configs; layers may be on the meta device.

        Transformers resizes the model; tensors whose shapes it changed get the rows that stay.
        """
        before = {name: tensor.detach() for name, tensor in named_tensors(model).items()}
        numbers = {
            (name, key): value
            for name, module in model.named_modules()
            for key, value in vars(module).items()
            if type(value) is int and _SETTINGS_OF_IDS.fullmatch(key)
        }
        try:
            with random_state_kept():
                model.resize_token_embeddings(len(self.ids))
        except Exception as error:  # each class has errors of its own
            if out_of_memory(error):
                raise
            raise ConfigError(
                f"Transformers must be able to resize the model's embeddings, got {raised(error)} "
                f"({type(model).__name__})"
            ) from error
        for name, tensor in named_tensors(model).items():
            if tensor.shape != before[name].shape:
                old = before[name]
                for dim, (size, left) in enumerate(zip(old.shape, tensor.shape, strict=True)):
                    if size != left:
                        old = old.index_select(dim, self.ids.to(old.device))
                tensor.data = old.contiguous()
        for (name, key), value in numbers.items():
            setattr(model.get_submodule(name), key, self.number(value))
        _renumber_configs(model, self.number, self.rows)

    def put_into_config(self, config: Any) -> None:
        """Put the number of rows and the new ids into a config of the model, in place."""
        text = config.get_text_config()
        sizes = {self.rows, text.vocab_size, len(self.ids)}
        text.vocab_size = len(self.ids)
        _renumber(config, self.number, sizes)

    def renumbered(self, ids: Tensor) -> Tensor:
        """Return new ids for old ones, of any shape."""
        new = [self._new_ids[number] for number in ids.flatten().tolist()]
        return torch.tensor(new, device=ids.device, dtype=ids.dtype).view_as(ids)

    def number(self, old: int) -> int:
        """Return the new id of an old one; an id without a row, such as -1, stays."""
        return self._new_ids.get(old, old)


def _rows_of(model: Any) -> int:
    """Return the number of rows of a model's token embeddings; ConfigError if it has none of the usual kind."""
    try:
        embeddings = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        embeddings = None
    if not isinstance(embeddings, nn.Embedding):
        found = "none" if embeddings is None else type(embeddings).__name__
        raise ConfigError(
            f"a model must have an nn.Embedding of its tokens (get_input_embeddings), got {found} "
            f"({type(model).__name__})"
        )
    return embeddings.num_embeddings


def _check_fit(model: Any, tokenizer: Any, size: int, rows: int) -> None:
    """Raise ConfigError if a tokenizer whose ids are below ``size`` can't be the model's.

    Embeddings may have more rows, for a round number (Phi-2: 50,295 tokens, 51,200 rows). Settings of special tokens
    differ in some pairs, but not all of them.
    """
    config, spare = model.config.get_text_config(), rows - size
    named = [(name, getattr(tokenizer, name, None), getattr(config, name, None)) for name in _SPECIAL]
    both = [(name, mine, own) for name, mine, own in named if mine is not None and own is not None]
    others = [f"{name} {mine}, {own} in the config" for name, mine, own in both if own not in (mine, [mine])]
    reason = ""
    if spare < 0 or (spare >= _PADDING and (rows % _MULTIPLE or spare > _MOST_PADDING * rows)):
        reason = f"{size:,} ids for {rows:,} rows of embeddings"
    elif spare and both and len(others) == len(both):
        reason = listed(others)
    if reason:
        raise ConfigError(
            f"a tokenizer must be the model's own, got {reason} ({type(model).__name__}, tokenizer); if it is, correct "
            "the config, or call model.resize_token_embeddings(len(tokenizer)), before"
        )


def _ids_named_by(model: Any, rows: int) -> set[int]:
    """Return the ids that a model's configs name, and those that can't change because positions start at padding's."""
    ids = _Noted()
    _renumber_configs(model, ids, rows)
    for module in model.modules():
        padding = getattr(module, "padding_idx", None)
        is_of_tokens = isinstance(module, nn.Embedding) and module.num_embeddings == rows
        # An embedding of positions: those of RoBERTa and M2M100 are counted from the id of padding.
        if padding is not None and not is_of_tokens and not list(module.children()):
            ids.update(range(padding + 1))
    return {number for number in ids if 0 <= number < rows}


class _Noted(set[int]):
    """Collects the ids that a renumbering asks for, and leaves each as it is."""

    def __call__(self, number: int) -> int:
        self.add(number)
        return number


class _Pieces:
    """The tokens of a tokenizer's JSON form, and what each is made of."""

    def __init__(self, content: dict[str, Any]) -> None:
        model = content["model"]
        if model.get("type") not in _KINDS:
            raise ConfigError(f"a tokenizer must be of kind {', '.join(_KINDS)}, got {model.get('type')} (tokenizer)")
        self._content, self._model, self._is_unigram = content, model, model["type"] == "Unigram"
        vocab = model["vocab"]
        self._vocab: dict[str, int] = {piece: at for at, (piece, _) in enumerate(vocab)} if self._is_unigram else vocab
        added = {each["content"]: each["id"] for each in content["added_tokens"]}
        self.ids = {**self._vocab, **added}  # by token
        self.of_model, self.added = set(self._vocab.values()), set(added.values())
        self._names = {number: token for token, number in self._vocab.items()}
        self._suffix = model.get("end_of_word_suffix") or ""
        self._ranks = {(left, right): rank for rank, (left, right) in enumerate(model.get("merges", ()))}
        self._known = dict[int, list[tuple[str, str]]]()  # merges by the token that they make

    def always(self) -> set[int]:
        """Return the ids of tokens that stay for any texts."""
        kept = _Noted(self.added | {self.ids.get(self._model.get("unk_token"), -1)})
        prefix = self._model.get("continuing_subword_prefix") or ""
        for token, number in self._vocab.items():
            bare = token.removeprefix(prefix) or token
            bare = bare.removesuffix(self._suffix) or bare
            if len(bare) == 1 or _BYTE.fullmatch(token):
                kept.add(number)
        if self._is_unigram:
            # The lowest score says what an unknown character costs.
            scores = [score for _, score in self._model["vocab"]]
            kept |= {scores.index(min(scores)), self._model["unk_id"]}
        _renumber_json(self._content, kept)
        return kept & set(self.ids.values())

    def closed(self, ids: set[int]) -> set[int]:
        """Return ids with those of all tokens that BPE makes on its way to them."""
        steps = [step for number in ids for step in self._steps(number)]
        return ids | {self._vocab[part] for left, right in steps for part in (left, right, left + right)}

    def _steps(self, number: int) -> list[tuple[str, str]]:
        """Return the merges by which BPE makes a token of its characters."""
        if not self._ranks or number not in self._names:
            return []
        if number not in self._known:
            token, steps = self._names[number], []
            bare = token.removesuffix(self._suffix) or token
            parts = list(bare)
            parts[-1] += token[len(bare) :]
            while len(parts) > 1:
                ranks = [self._ranks.get(pair, math.inf) for pair in pairwise(parts)]
                at = ranks.index(min(ranks))
                if ranks[at] == math.inf:
                    break
                steps.append((parts[at], parts[at + 1]))
                parts[at : at + 2] = [parts[at] + parts[at + 1]]
            self._known[number] = steps
        return self._known[number]

    def with_ids(self, new_ids: Mapping[int, int]) -> dict[str, Any]:
        """Return the tokenizer's JSON form with some tokens alone, by their new ids."""
        content = copy.deepcopy(self._content)
        model = content["model"]
        if self._is_unigram:  # an id is a place in the list
            model["vocab"] = [entry for number, entry in enumerate(model["vocab"]) if number in new_ids]
            model["unk_id"] = new_ids.get(model["unk_id"])
        else:
            model["vocab"] = {token: new_ids[number] for token, number in self._vocab.items() if number in new_ids}
        if self._ranks:
            made = {step for number in new_ids for step in self._steps(number)}
            model["merges"] = [list(pair) for pair in self._ranks if pair in made]
        for token in content["added_tokens"]:
            token["id"] = new_ids[token["id"]]
        content["added_tokens"].sort(key=lambda token: token["id"])
        _renumber_json(content, lambda number: new_ids.get(number, number))
        return content


def _renumber_json(content: Mapping[str, Any], number: _Number) -> None:
    _renumber([content.get("post_processor"), content.get("padding")], number, names=_JSON_OF_IDS)


def _backend(content: Mapping[str, Any], **changes: None) -> Any:
    """Return the tokenizer of the library ``tokenizers`` for a JSON form."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps({**content, **changes}))


def _encoded(backend: Any, texts: Collection[str], progress: bool | None) -> list[list[int]]:
    """Return the ids of each text, without special tokens that the tokenizer adds."""
    given, ids = list(texts), []
    with bar("splitting texts", progress, total=len(given)) as shown:
        for start in range(0, len(given), _AT_ONCE):
            encodings = backend.encode_batch(given[start : start + _AT_ONCE], add_special_tokens=False)
            ids += [encoding.ids for encoding in encodings]
            shown.update(len(encodings))
    return ids


def _with_backend(tokenizer: Any, content: Mapping[str, Any]) -> Any:
    """Return a tokenizer of the same class that was written and read with another JSON form."""
    other = copy.deepcopy(tokenizer)
    other._tokenizer = _backend(content)
    other.vocab_file = None  # a model of sentencepiece has the old ids
    with tempfile.TemporaryDirectory() as folder:
        other.save_pretrained(folder)
        read = type(tokenizer).from_pretrained(folder)
    read.name_or_path = tokenizer.name_or_path
    return read


def _renumber_configs(model: Any, number: _Number, rows: int) -> None:
    """Renumber the ids in a model's config, in those within it that have the same vocabulary, and for generation."""
    sizes = {rows, getattr(model.config.get_text_config(), "vocab_size", rows)}
    for config in (model.config, getattr(model, "generation_config", None)):
        _renumber(config, number, sizes)


def _renumber(
    settings: Any, number: _Number, sizes: Collection[int] = (), names: re.Pattern[str] = _SETTINGS_OF_IDS
) -> None:
    """Renumber ids in place, in JSON or in a config and those within it whose vocabularies have one of the sizes."""
    if isinstance(settings, list):
        for each in settings:
            _renumber(each, number, sizes, names)
    is_config = hasattr(settings, "to_dict")
    values = settings if isinstance(settings, dict) else vars(settings) if is_config else {}
    for key, value in list(values.items()):
        if isinstance(key, str) and names.fullmatch(key):
            values[key] = _renumbered(value, number, key)
        elif not hasattr(value, "to_dict") or getattr(value, "vocab_size", None) in sizes:
            _renumber(value, number, sizes, names)


def _renumbered(value: Any, number: _Number, key: str = "") -> Any:
    """Return the value of a setting with other ids; of ``forced_decoder_ids``, pairs of a place and an id."""
    if type(value) is int:
        return number(value)
    if isinstance(value, dict):  # ids of languages by name, or biases by ids
        return {_renumbered(name, number): _renumbered(each, number) for name, each in value.items()}
    if not isinstance(value, (list, tuple)):
        return value
    if key == "forced_decoder_ids":
        return [[place, _renumbered(each, number)] for place, each in value]
    return type(value)(_renumbered(each, number) for each in value)


def _outputs(model: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the outputs of a model for ids (tokens,), each text by itself."""
    outputs = []
    try:
        with evaluation_mode(model), torch.no_grad():
            for ids in inputs:
                named = {"input_ids": ids[None].to(device_of(model))}
                if model.config.is_encoder_decoder:
                    named["decoder_input_ids"] = named["input_ids"]
                outputs += returned_tensors(model(**named))
    except Exception as error:  # each class has errors of its own
        if out_of_memory(error):
            raise
        raise ConfigError(
            f"a model must be a text model, which runs on ids of tokens alone (input_ids), got {raised(error)} "
            f"({type(model).__name__})"
        ) from error
    return outputs
