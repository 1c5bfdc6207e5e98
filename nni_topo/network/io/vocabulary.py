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

from nni_topo.errors import ConfigError, DataError, out_of_memory, raised
from nni_topo.network.attention.config import is_pretrained
from nni_topo.network.cost.measure import count_params
from nni_topo.network.runtime.arguments import MODEL, check_unwrapped
from nni_topo.network.runtime.calibration import HELD_OUT
from nni_topo.network.runtime.comparison import difference, same_program
from nni_topo.network.runtime.copies import evaluation_mode
from nni_topo.network.runtime.inputs import returned_tensors
from nni_topo.network.runtime.modules import device_of
from nni_topo.network.runtime.public import public
from nni_topo.network.runtime.switches import random_state_kept
from nni_topo.rules import NONE, Rule, all_of, instance
from nni_topo.sharing import named_tensors

_KINDS = ("WordPiece", "BPE", "Unigram")
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")  # a byte of a character that has no token of its own
_COMPARED, _LENGTH = 4, 32  # texts, and tokens of each, on which the outputs before and after are compared
# Settings of configs that hold ids of tokens: a number, or lists or mappings of such.
_SETTINGS_OF_IDS = re.compile(
    r".*_token_(id|ids|index)|(pad|bos|eos|unk|mask)_index|(begin_)?suppress_tokens|forced_decoder_ids|bad_words_ids"
    r"|force_words_ids|sequence_bias|(lang|task)_to_id"
)
_Number = Callable[[int], int]  # maps the id of a token to its new id

TEXTS = all_of(instance(str), Collection, 1)
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
    model: nn.Module, tokenizer: Any, texts: Collection[str], *, held_out: Collection[str] | None = None
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

    Returns
    -------
    TrimmedVocabulary
        A smaller copy of the model and of the tokenizer, the old id of each new one, and the report.

    Raises
    ------
    ConfigError
        If the model isn't one of Transformers, the tokenizer isn't a fast one of these kinds or has ids that the model
        has no embedding for, Transformers can't resize the model's embeddings, or outputs would change.
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
    makes on the way to another token, and those whose ids the configs name. A text whose tokens all stay is split into
    the same tokens. Other words fall into smaller pieces; none becomes unknown that wasn't before.

    Tokens keep their order. Rows of embeddings beyond the tokenizer's tokens, as from padding to a multiple of 64, go,
    unless a config names their ids. Ids in the config and in the generation config follow. Outputs of some texts are
    compared with the unchanged model's.

    Examples
    --------
    >>> trimmed = trim_vocabulary(model, tokenizer, texts)  # doctest: +SKIP
    >>> nni_topo.save_pretrained(trimmed.model, "folder")  # doctest: +SKIP
    >>> trimmed.tokenizer.save_pretrained("folder")  # doctest: +SKIP
    """
    check_unwrapped(model)
    params_before = count_params(model)
    vocabulary = Vocabulary.of(model, tokenizer, texts, held_out)
    inputs = vocabulary.examples(model)
    before = _outputs(model, inputs)
    vocabulary.put_into(model)
    after = _outputs(model, [vocabulary.renumbered(ids) for ids in inputs])
    kept = vocabulary.ids
    for old, new in zip(before, after, strict=True):
        if old.shape != new.shape:
            for dim, (size, left) in enumerate(zip(old.shape, new.shape, strict=False)):
                if (size, left) == (vocabulary.rows, len(kept)):
                    old = old.index_select(dim, kept.to(old.device))
        if old.shape != new.shape or not difference(old, new) <= same_program([old]):
            raise ConfigError(
                "a model must compute the same on the rows that stay, got other outputs: it reads more from ids than "
                f"an embedding of each ({type(model).__name__})"
            )
    return TrimmedVocabulary(model, vocabulary.tokenizer, kept, vocabulary.report(params_before, count_params(model)))


@dataclass(frozen=True)
class Vocabulary:
    """Which tokens stay, and the tokenizer that has these alone."""

    tokenizer: Any
    ids: Tensor  # (rows,), the old id of each new one
    new_ids: Mapping[int, int]
    rows: int  # of the embeddings before
    tokens_before: int
    split: float
    held_out: int
    _encode: Callable[[str, int], list[int]]  # old ids of a text, at most so many
    _texts: Sequence[str]

    @classmethod
    def of(
        cls,
        model: Any,
        tokenizer: Any,
        texts: Collection[str],
        held_out: Collection[str] | None = None,
        needed: Iterable[int] = (),
    ) -> Vocabulary:
        """Choose the tokens of texts; ``needed``: further ids that stay."""
        kind = type(model).__name__
        if not is_pretrained(model):
            raise ConfigError(f"a model must be one of Transformers, with adapters merged, got {kind} (model)")
        rows = _rows_of(model)
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        pieces = _Pieces(content)
        size = max(pieces.ids.values()) + 1
        if size > rows:
            raise ConfigError(
                f"a tokenizer must fit its model, which has an embedding for each token, got ids up to {size - 1} and "
                f"{rows} rows ({kind}, tokenizer)"
            )

        backend = _plain_backend(content)
        tokens = _encoded(backend, texts)
        always = pieces.always({int(each) for each in tokenizer.all_special_ids})
        used = {number for text in tokens for number in text}
        if not used - pieces.added:
            raise DataError(f"texts must have at least one token that isn't a special one, got none in {len(texts)}")
        of_configs = _Seen()
        _renumber_configs(model, of_configs, rows)
        further = {int(number) for number in needed} | {number for number in of_configs.ids if 0 <= number < rows}

        if held_out is None:
            judges = tokens[HELD_OUT - 1 :: HELD_OUT]
            by_others = {n for place, text in enumerate(tokens, 1) if place % HELD_OUT for n in text}
        else:
            judges, by_others = _encoded(backend, held_out), used
        likely = pieces.closed(by_others | always | further)
        count = sum(map(len, judges))
        split = sum(number not in likely for text in judges for number in text) / count if count else math.nan

        kept = pieces.closed(used | always | further)
        # Tokens that only the list of added tokens has get the ids after those of all others when a file is read.
        order = sorted(kept & pieces.ids_of_model) + sorted(kept & (pieces.added - pieces.ids_of_model))
        order += sorted(kept - pieces.ids_of_model - pieces.added)  # rows without a token that are needed
        if len(order) == rows:
            raise DataError(f"the texts need all {len(pieces.ids):,} tokens: there is nothing to gain ({kind}, texts)")
        new_ids = {old: new for new, old in enumerate(order)}
        trimmed = _with_backend(tokenizer, pieces.kept(new_ids))
        again = _encoded(_plain_backend(json.loads(trimmed.backend_tokenizer.to_str())), texts)
        for text, old, new in zip(texts, tokens, again, strict=True):
            if [new_ids[number] for number in old] != new:
                raise ConfigError(
                    "a tokenizer must split a text into the same tokens when all of these stay, got others for "
                    f"{text[:40]!r} ({type(tokenizer).__name__}, tokenizer)"
                )

        def encode(text: str, most: int) -> list[int]:
            backend.enable_truncation(most)
            return list(backend.encode(text).ids)

        nonempty = [text for text, ids in zip(texts, tokens, strict=True) if ids]
        return cls(
            tokenizer=trimmed,
            ids=torch.tensor(order, device="cpu"),
            new_ids=new_ids,
            rows=rows,
            tokens_before=len(pieces.ids),
            split=split,
            held_out=count,
            _encode=encode,
            _texts=nonempty[:_COMPARED],
        )

    def report(self, params_before: int, params: int) -> VocabularyReport:
        """Return the report, with the model's parameters before and after."""
        tokens = len(self.tokenizer)
        return VocabularyReport(self.tokens_before, tokens, params_before, params, self.split, self.held_out)

    def examples(self, model: Any) -> list[Tensor]:
        """Return the old ids of some texts, each (tokens,)."""
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2 * _LENGTH
        most = min(_LENGTH, positions // 2)
        return [torch.tensor(self._encode(text, most), device="cpu") for text in self._texts]

    def put_into(self, model: Any) -> None:
        """Remove the rows of a model, in place, and renumber the ids in its configs; layers may be on the meta device.

        Transformers resizes the model; tensors whose shapes it changed get the rows that stay.
        """
        before = {name: tensor.detach() for name, tensor in named_tensors(model).items()}
        padding = {name: module.padding_idx for name, module in model.named_modules() if hasattr(module, "padding_idx")}
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
        for name, module in model.named_modules():
            if padding.get(name) is not None:
                module.padding_idx = self.number(padding[name])
            for key, value in vars(module).items():
                if type(value) is int and _SETTINGS_OF_IDS.fullmatch(key):
                    setattr(module, key, self.number(value))
        _renumber_configs(model, self.number, self.rows)

    def put_into_config(self, config: Any) -> None:
        """Put the number of rows and the new ids into a config of the model, in place."""
        text = config.get_text_config()
        sizes = {self.rows, text.vocab_size, len(self.ids)}
        text.vocab_size = len(self.ids)
        renumber_config(config, self.number, sizes)

    def renumbered(self, ids: Tensor) -> Tensor:
        """Return new ids for old ones, of any shape."""
        new = [self.new_ids[number] for number in ids.flatten().tolist()]
        return torch.tensor(new, device=ids.device, dtype=ids.dtype).view_as(ids)

    def number(self, old: int) -> int:
        """Return the new id of an old one; an id without a row, such as -1, stays."""
        return self.new_ids.get(old, old)


def _rows_of(model: Any) -> int:
    """Return the number of rows of a model's token embeddings; ConfigError if it has none of the usual kind."""
    rule = "a model must have an nn.Embedding of its tokens (get_input_embeddings)"
    try:
        embeddings = model.get_input_embeddings()
    except (NotImplementedError, AttributeError) as error:
        raise ConfigError(f"{rule}, got none ({type(model).__name__})") from error
    if not isinstance(embeddings, nn.Embedding):
        raise ConfigError(f"{rule}, got {type(embeddings).__name__} ({type(model).__name__})")
    return embeddings.num_embeddings


class _Seen:
    """Collects the ids that a renumbering asks for, and leaves each as it is."""

    def __init__(self) -> None:
        self.ids = set[int]()

    def __call__(self, number: int) -> int:
        self.ids.add(number)
        return number


class _Pieces:
    """The tokens of a tokenizer's JSON form, and what each is made of."""

    def __init__(self, content: dict[str, Any]) -> None:
        model = content["model"]
        if model.get("type") not in _KINDS:
            raise ConfigError(f"a tokenizer must be of kind {', '.join(_KINDS)}, got {model.get('type')} (tokenizer)")
        if model.get("dropout"):
            raise ConfigError(
                f"a tokenizer must split a text the same way each time, got dropout {model['dropout']} (tokenizer)"
            )
        self._content, self._model, self._is_unigram = content, model, model["type"] == "Unigram"
        of_model = {piece: number for number, (piece, _) in enumerate(model["vocab"])} if self._is_unigram else None
        vocab: dict[str, int] = model["vocab"] if of_model is None else of_model
        added = {each["content"]: each["id"] for each in content["added_tokens"]}
        self.ids = {**vocab, **added}  # by token
        self.ids_of_model, self.added = set(vocab.values()), set(added.values())
        self._vocab, self._names = vocab, {number: token for token, number in vocab.items()}
        self._prefix = model.get("continuing_subword_prefix") or ""
        self._suffix = model.get("end_of_word_suffix") or ""
        self._ranks = {(left, right): rank for rank, (left, right) in enumerate(model.get("merges", ()))}
        self._known = dict[int, list[tuple[str, str]]]()  # merges by the token that they make

    def always(self, special: set[int]) -> set[int]:
        """Return the ids of tokens that stay for any texts; ``special``: some of these."""
        kept = self.added | special | {self.ids[each] for each in (self._model.get("unk_token"),) if each in self.ids}
        for token, number in self._vocab.items():
            bare = token.removeprefix(self._prefix) if self._prefix and token != self._prefix else token
            bare = bare.removesuffix(self._suffix) if self._suffix and bare != self._suffix else bare
            if len(bare) == 1 or _BYTE.fullmatch(token):
                kept.add(number)
        if self._is_unigram:
            # The lowest score says what an unknown character costs.
            scores = [score for _, score in self._model["vocab"]]
            kept.add(scores.index(min(scores)))
            kept |= {self._model["unk_id"]} - {None}
        of_processor = _Seen()
        _renumber_processor(self._content.get("post_processor"), of_processor)
        return kept | of_processor.ids

    def closed(self, ids: set[int]) -> set[int]:
        """Return ids with those of all tokens that BPE makes on its way to them."""
        steps = [step for number in ids for step in self._steps(number)]
        return ids | {self._vocab[part] for step in steps for part in (*step, self._merged(*step))}

    def _merged(self, left: str, right: str) -> str:
        return left + right[len(self._prefix) :]

    def _steps(self, number: int) -> list[tuple[str, str]]:
        """Return the merges by which BPE makes a token of its characters."""
        if not self._ranks or number not in self._names:
            return []
        if number not in self._known:
            token = self._names[number]
            end = self._suffix if token.endswith(self._suffix) and token != self._suffix else ""
            start = self._prefix if token.startswith(self._prefix) and token != self._prefix else ""
            bare = token[len(start) : len(token) - len(end)]
            parts = [(self._prefix if place else start) + each for place, each in enumerate(bare)]
            parts[-1] += end
            steps = []
            while len(parts) > 1:
                ranks = [self._ranks.get(pair, math.inf) for pair in pairwise(parts)]
                at = ranks.index(min(ranks))
                if ranks[at] == math.inf:
                    break
                steps.append((parts[at], parts[at + 1]))
                parts[at : at + 2] = [self._merged(*steps[-1])]
            self._known[number] = steps
        return self._known[number]

    def kept(self, new_ids: Mapping[int, int]) -> dict[str, Any]:
        """Return the tokenizer's JSON form with some tokens alone, by their new ids."""
        content = copy.deepcopy(self._content)
        model = content["model"]
        order = sorted((new_ids[number], token) for token, number in self._vocab.items() if number in new_ids)
        if self._is_unigram:
            scores = dict(model["vocab"])
            model["vocab"] = [[token, scores[token]] for _, token in order]
            if model["unk_id"] is not None:
                model["unk_id"] = new_ids[model["unk_id"]]
        else:
            model["vocab"] = {token: number for number, token in order}
        if self._ranks:
            made = {step for number in new_ids for step in self._steps(number)}
            model["merges"] = [list(pair) for pair in self._ranks if pair in made]
        for token in content["added_tokens"]:
            token["id"] = new_ids[token["id"]]
        content["added_tokens"].sort(key=lambda token: token["id"])
        content["post_processor"] = _renumber_processor(content.get("post_processor"), new_ids.__getitem__)
        if content.get("padding"):
            content["padding"]["pad_id"] = self._padding(content["padding"], new_ids)
        return content

    def _padding(self, padding: Mapping[str, Any], new_ids: Mapping[int, int]) -> int:
        return new_ids.get(padding["pad_id"], new_ids.get(self.ids.get(padding["pad_token"], -1), 0))


def _renumber_processor(value: Any, number: _Number, key: str = "") -> Any:
    """Return a post-processor's JSON form with other ids: lists under ``ids``, and pairs of a token and its id."""
    if isinstance(value, dict):
        return {name: _renumber_processor(each, number, name) for name, each in value.items()}
    if not isinstance(value, list):
        return value
    if key == "ids":
        return [number(each) for each in value]
    if len(value) == 2 and isinstance(value[0], str) and type(value[1]) is int:
        return [value[0], number(value[1])]
    return [_renumber_processor(each, number) for each in value]


def _plain_backend(content: Mapping[str, Any]) -> Any:
    """Return a tokenizer of the library ``tokenizers`` that neither pads nor cuts."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(json.dumps(content))
    backend.no_padding()
    backend.no_truncation()
    return backend


def _encoded(backend: Any, texts: Collection[str]) -> list[list[int]]:
    """Return the ids of each text, without special tokens that the tokenizer adds."""
    return [encoding.ids for encoding in backend.encode_batch(list(texts), add_special_tokens=False)]


def _with_backend(tokenizer: Any, content: Mapping[str, Any]) -> Any:
    """Return a tokenizer of the same class that was written and read with another JSON form."""
    from tokenizers import Tokenizer

    other = copy.deepcopy(tokenizer)
    other._tokenizer = Tokenizer.from_str(json.dumps(content))
    other.vocab_file = None  # a model of sentencepiece has the old ids
    with tempfile.TemporaryDirectory() as folder:
        other.save_pretrained(folder)
        read = type(tokenizer).from_pretrained(folder)
    read.name_or_path = tokenizer.name_or_path
    return read


def _renumber_configs(model: Any, number: _Number, rows: int) -> None:
    """Renumber the ids in a model's config, in those within it that have the same vocabulary, and for generation."""
    sizes = {rows, getattr(model.config.get_text_config(), "vocab_size", rows)}
    renumber_config(model.config, number, sizes)
    if getattr(model, "generation_config", None) is not None:
        renumber_config(model.generation_config, number, sizes)


def renumber_config(holder: Any, number: _Number, sizes: Collection[int]) -> None:
    """Renumber the ids of tokens in a config of Transformers, in place; ``sizes``: of the vocabulary."""
    values = holder if isinstance(holder, dict) else vars(holder)
    for key, value in list(values.items()):
        if isinstance(key, str) and _SETTINGS_OF_IDS.fullmatch(key):
            values[key] = _renumbered(value, number, key)
        elif isinstance(value, dict) or (hasattr(value, "to_dict") and getattr(value, "vocab_size", None) in sizes):
            renumber_config(value, number, sizes)


def _renumbered(value: Any, number: _Number, key: str) -> Any:
    if type(value) is int:
        return number(value)
    if isinstance(value, dict):  # ids of languages by name, or biases by ids
        if key == "sequence_bias":
            return {_renumbered(ids, number, ""): bias for ids, bias in value.items()}
        return {name: _renumbered(each, number, "") for name, each in value.items()}
    if not isinstance(value, (list, tuple)):
        return value
    if key == "forced_decoder_ids":  # pairs of a place and an id
        return [[place, _renumbered(each, number, "")] for place, each in value]
    if key == "sequence_bias":  # pairs of ids and a bias
        return [[_renumbered(ids, number, ""), bias] for ids, bias in value]
    return type(value)(_renumbered(each, number, "") for each in value)


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
            f"a model must run on the ids of tokens alone (input_ids), got {raised(error)} ({type(model).__name__})"
        ) from error
    return outputs
