"""Tokens that go from tokenizers and models; the tokenizers are trained here, the models have random weights."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys

import pytest
import torch
from torch import nn

import nni_topo
from nni_topo.errors import ConfigError, DataError

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

DRAW = random.Random(0)
WORDS = ["".join(DRAW.choice("abcdefghij") for _ in range(DRAW.randint(2, 7))) for _ in range(200)]
CORPUS = [" ".join(DRAW.choice(WORDS) for _ in range(6)) for _ in range(300)]
FEW = [" ".join(WORDS[start : start + 5]) for start in range(0, 40, 5)]  # eight texts of forty words
NEW = [" ".join(DRAW.choice(WORDS[:45]) for _ in range(4)) for _ in range(60)]


def word_piece():
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = tokenizers.normalizers.BertNormalizer()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.decoder = tokenizers.decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend.train_from_iterator(
        CORPUS, tokenizers.trainers.WordPieceTrainer(vocab_size=260, special_tokens=special, show_progress=False)
    )
    pair = [("[SEP]", backend.token_to_id("[SEP]")), ("[CLS]", backend.token_to_id("[CLS]"))]
    backend.post_processor = tokenizers.processors.BertProcessing(*pair)
    return transformers.BertTokenizerFast(tokenizer_object=backend)


def byte_pairs(size=420):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, tokenizers.trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    )
    # The last ids, as in GPT-2.
    return transformers.GPT2TokenizerFast(tokenizer_object=backend, pad_token="<|endoftext|>")


def unigram():
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    special = {"special_tokens": ["<pad>", "</s>", "<unk>"], "unk_token": "<unk>"}
    backend.train_from_iterator(
        CORPUS, tokenizers.trainers.UnigramTrainer(vocab_size=260, show_progress=False, **special)
    )
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return transformers.T5TokenizerFast(tokenizer_object=backend, extra_ids=3)


def built(kind, config, **sizes):
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**sizes)).eval()
    with torch.no_grad():  # biases of heads that differ by token, not zeros
        for name, tensor in model.named_parameters():
            if name.endswith("bias"):
                tensor.normal_()
        for name, tensor in model.named_buffers():
            if name.endswith("final_logits_bias"):
                tensor.normal_()
    return model


BERT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def bert(rows, kind="BertForMaskedLM", config="BertConfig", **changes):
    return built(kind, config, vocab_size=rows, max_position_embeddings=64, **BERT | changes)


def gpt2(rows, **changes):
    ends = {"bos_token_id": rows - 1, "eos_token_id": rows - 1} | changes
    return built("GPT2LMHeadModel", "GPT2Config", vocab_size=rows, n_embd=16, n_layer=2, n_head=2, **ends)


def t5(rows, **changes):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    return built("T5ForConditionalGeneration", "T5Config", vocab_size=rows, **sizes | changes)


def bart(rows, kind="BartForConditionalGeneration"):
    sizes = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
    ids = {"bos_token_id": 2, "pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 3}
    forced = {"forced_eos_token_id": 3, "scale_embedding": True}
    return built(kind, "BartConfig", vocab_size=rows, **sizes, **heads, **ids, **forced)


def xlnet(rows):  # its config has -1 for the number of positions
    sizes = {"d_model": 16, "d_inner": 24, "n_layer": 1, "n_head": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    return built("XLNetLMHeadModel", "XLNetConfig", vocab_size=rows, **sizes, **ids)


def gemma(rows):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    more = {"num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
    return built("GemmaForCausalLM", "GemmaConfig", vocab_size=rows, **sizes, **more)


CASES = {
    "BERT": (word_piece, bert),
    "BERT with an untied head": (word_piece, lambda rows: bert(rows, tie_word_embeddings=False)),
    "BERT without a head": (word_piece, lambda rows: bert(rows, "BertModel")),
    "ALBERT": (
        word_piece,
        lambda rows: bert(rows, "AlbertForMaskedLM", "AlbertConfig", embedding_size=8, num_hidden_groups=1),
    ),
    "ELECTRA": (word_piece, lambda rows: bert(rows, "ElectraForMaskedLM", "ElectraConfig", embedding_size=8)),
    "MobileBERT": (
        word_piece,
        lambda rows: bert(
            rows,
            "MobileBertForMaskedLM",
            "MobileBertConfig",
            embedding_size=8,
            true_hidden_size=8,
            intra_bottleneck_size=8,
        ),
    ),
    "DistilBERT": (
        word_piece,
        lambda rows: built(
            "DistilBertForMaskedLM", "DistilBertConfig", vocab_size=rows, dim=16, hidden_dim=24, n_layers=1, n_heads=2
        ),
    ),
    "BART": (word_piece, bart),
    "GPT-2": (byte_pairs, gpt2),
    "GPT-2 with an untied head": (byte_pairs, lambda rows: gpt2(rows, tie_word_embeddings=False)),
    "Gemma": (unigram, gemma),
    "XLNet": (unigram, xlnet),
    "T5": (unigram, t5),
    "T5 with an untied head": (unigram, lambda rows: t5(rows, tie_word_embeddings=False)),
}


def outputs(model, ids):
    named = {"input_ids": torch.tensor([ids])}
    if model.config.is_encoder_decoder:
        named["decoder_input_ids"] = named["input_ids"]
    with torch.no_grad():
        return model(**named, output_hidden_states=True)


def same_outputs(model, small, ids, kept):
    """Compare hidden states bit for bit, and logits, for new ids that stand for old ones."""
    new = {old: place for place, old in enumerate(kept.tolist())}
    before, after = outputs(model, ids), outputs(small, [new[each] for each in ids])
    states = "decoder_hidden_states" if model.config.is_encoder_decoder else "hidden_states"
    for one, other in zip(before[states], after[states], strict=True):
        assert torch.equal(one, other)
    if "logits" in before:
        torch.testing.assert_close(after.logits, before.logits[..., kept], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_texts_whose_tokens_stay_have_the_same_tokens_and_outputs(case, tmp_path):
    make, model_of = CASES[case]
    tokenizer = make()
    model = model_of(len(tokenizer))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, written = model.config.to_dict(), tokenizer.backend_tokenizer.to_str()
    trimmed = nni_topo.trim_vocabulary(model, tokenizer, FEW)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert (model.config.to_dict(), tokenizer.backend_tokenizer.to_str()) == (config, written)

    small, kept, report = trimmed.model, trimmed.ids, trimmed.report
    assert len(kept) == len(trimmed.tokenizer) == small.config.vocab_size == report.tokens < report.tokens_before
    assert report.params == sum(each.numel() for each in small.parameters()) < report.params_before
    new = {old: place for place, old in enumerate(kept.tolist())}
    equal = split = 0
    for text in [*FEW, *NEW]:
        old = tokenizer(text)["input_ids"]
        ids = trimmed.tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in old or case.startswith("GPT-2")
        if all(each in new for each in old):
            assert ids == [new[each] for each in old]
            assert trimmed.tokenizer.decode(ids) == tokenizer.decode(old)
            if equal < 10:
                same_outputs(model, small, old, kept)
            equal += 1
        else:
            assert trimmed.tokenizer.decode(ids) == tokenizer.decode(old)
            assert len(ids) > len(old)
            split += 1
    assert equal > 8
    assert split > 0

    nni_topo.save_pretrained(small, tmp_path)
    trimmed.tokenizer.save_pretrained(tmp_path)
    again = type(small).from_pretrained(tmp_path).eval()
    words = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = words(NEW[0])["input_ids"]
    assert ids == trimmed.tokenizer(NEW[0])["input_ids"]
    assert torch.equal(outputs(again, ids)[0], outputs(small, ids)[0])


@pytest.mark.slow
def test_a_fresh_process_reads_the_folder(tmp_path):
    tokenizer = word_piece()
    trimmed = nni_topo.trim_vocabulary(bert(len(tokenizer), "BertModel"), tokenizer, FEW)
    nni_topo.save_pretrained(trimmed.model, tmp_path)
    trimmed.tokenizer.save_pretrained(tmp_path)
    program = (
        "import sys, torch, transformers; model = transformers.AutoModel.from_pretrained(sys.argv[1]).eval(); "
        "words = transformers.AutoTokenizer.from_pretrained(sys.argv[1]); "
        "print(float(model(**words(sys.argv[2], return_tensors='pt')).last_hidden_state.double().square().sum()))"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path, FEW[0]], capture_output=True, text=True, check=True)
    states = outputs(trimmed.model, trimmed.tokenizer(FEW[0])["input_ids"]).last_hidden_state
    assert float(done.stdout) == pytest.approx(float(states.double().square().sum()), rel=1e-6)


def test_bpe_keeps_the_tokens_on_the_way_to_a_token_and_no_others():
    vocab = ["a", "b", "c", "d", "bc", "ab", "abc", "cd", "abcd", "<end>"]
    merges = [("b", "c"), ("a", "bc"), ("a", "b"), ("c", "d"), ("ab", "cd")]
    model = tokenizers.models.BPE({token: place for place, token in enumerate(vocab)}, merges)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model), eos_token="<end>")
    trimmed = nni_topo.trim_vocabulary(gpt2(len(vocab)), tokenizer, ["abc"])
    # "abc" is a with bc, so that "ab" isn't needed, nor "cd" and "abcd".
    assert [vocab[each] for each in trimmed.ids] == ["a", "b", "c", "d", "bc", "abc", "<end>"]
    assert json.loads(trimmed.tokenizer.backend_tokenizer.to_str())["model"]["merges"] == [["b", "c"], ["a", "bc"]]
    assert trimmed.tokenizer.tokenize("abcd") == ["abc", "d"]
    assert trimmed.tokenizer.eos_token_id == 6


def test_words_of_clip_that_end_in_a_mark_keep_their_tokens():
    model = tokenizers.models.BPE(end_of_word_suffix="</w>", unk_token="<end>")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=200, end_of_word_suffix="</w>", special_tokens=["<end>"], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    trimmed = nni_topo.trim_vocabulary(gpt2(len(tokenizer)), tokenizer, FEW)
    for text in [*FEW, *NEW]:
        old = tokenizer.tokenize(text)
        if set(old) <= trimmed.tokenizer.get_vocab().keys():
            assert trimmed.tokenizer.tokenize(text) == old
        assert "<end>" not in trimmed.tokenizer.tokenize(text)


def test_the_share_of_split_tokens_is_counted_on_held_out_texts():
    tokenizer = word_piece()
    model = bert(len(tokenizer))
    trimmed = nni_topo.trim_vocabulary(model, tokenizer, FEW, held_out=NEW)
    tokens = [each for text in NEW for each in tokenizer(text, add_special_tokens=False)["input_ids"]]
    gone = [each for each in tokens if each not in trimmed.ids.tolist()]
    assert trimmed.report.held_out == len(tokens)
    assert trimmed.report.split == len(gone) / len(tokens) > 0.0
    # By itself every eighth text is held out, by the tokens of the others.
    others = nni_topo.trim_vocabulary(model, tokenizer, FEW[:7], held_out=FEW[7:])
    alone = nni_topo.trim_vocabulary(model, tokenizer, FEW)
    assert (alone.report.split, alone.report.held_out) == (others.report.split, others.report.held_out)
    assert alone.report.tokens > others.report.tokens
    few = nni_topo.trim_vocabulary(model, tokenizer, FEW[:7])
    assert math.isnan(few.report.split)
    assert "held_out" in str(few)


def test_rows_without_a_token_go_unless_a_config_names_them():
    tokenizer = unigram()
    size = len(tokenizer)
    trimmed = nni_topo.trim_vocabulary(t5(size + 28), tokenizer, FEW)
    assert trimmed.model.config.vocab_size == len(trimmed.tokenizer)
    # Also where the texts need every token.
    trimmed = nni_topo.trim_vocabulary(bert(8), letters(), ["a b aa", "ab"])
    assert trimmed.ids.tolist() == [0, 1, 2, 3, 4]
    trimmed = nni_topo.trim_vocabulary(t5(size + 28, decoder_start_token_id=size + 9), tokenizer, FEW)
    assert trimmed.ids[-1] == size + 9
    assert trimmed.model.config.decoder_start_token_id == len(trimmed.tokenizer) == len(trimmed.ids) - 1


def test_ids_of_the_configs_follow():
    tokenizer = byte_pairs()
    end, other = len(tokenizer) - 1, tokenizer.convert_tokens_to_ids(CORPUS[0].split()[0][:2])
    model = gpt2(len(tokenizer), task_specific_params={"text": {"decoder_start_token_id": end, "max_length": end}})
    generation = model.generation_config
    generation.suppress_tokens, generation.begin_suppress_tokens = [other, end], [end]
    generation.forced_decoder_ids, generation.bad_words_ids = [[1, end], [other, None]], [[other, 5], [end]]
    generation.sequence_bias = [[[other, end], -2.0]]
    generation.max_length, generation.eos_token_id = end, [end, other]
    trimmed = nni_topo.trim_vocabulary(model, tokenizer, ["zz"])
    place = {old: new for new, old in enumerate(trimmed.ids.tolist())}
    new_end, new_other = place[end], place[other]
    assert new_end < end
    config, generation = trimmed.model.config, trimmed.model.generation_config
    assert (config.eos_token_id, config.bos_token_id) == (new_end, new_end)
    assert config.task_specific_params["text"] == {"decoder_start_token_id": new_end, "max_length": end}
    assert (generation.suppress_tokens, generation.begin_suppress_tokens) == ([new_other, new_end], [new_end])
    assert generation.forced_decoder_ids == [[1, new_end], [other, None]]
    assert generation.bad_words_ids == [[new_other, place[5]], [new_end]]
    assert generation.sequence_bias == [[[new_other, new_end], -2.0]]
    assert (generation.max_length, generation.eos_token_id) == (end, [new_end, new_other])
    assert trimmed.tokenizer.eos_token_id == trimmed.tokenizer.pad_token_id == new_end


def test_ids_of_a_config_within_another_follow():
    tokenizer = byte_pairs()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image, end = len(tokenizer) - 1, tokenizer.eos_token_id
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = transformers.LlamaConfig(
        vocab_size=len(tokenizer), eos_token_id=end, bos_token_id=end, num_key_value_heads=2, **BERT
    )
    config = transformers.LlavaConfig(vision, text, image_token_index=image, vision_feature_layer=-1)
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    trimmed = nni_topo.trim_vocabulary(model, tokenizer, FEW)
    small = trimmed.model
    assert small.config.text_config.vocab_size == len(trimmed.ids) == len(trimmed.tokenizer)
    assert small.config.text_config.eos_token_id == trimmed.tokenizer.eos_token_id
    assert small.config.image_token_id == trimmed.tokenizer.convert_tokens_to_ids("<image>") < image


def test_padding_and_modes_follow():
    tokenizer = byte_pairs()  # the token of padding has the last id
    model = bert(len(tokenizer), pad_token_id=len(tokenizer) - 1).train()
    trimmed = nni_topo.trim_vocabulary(model, tokenizer, FEW)
    assert trimmed.model.get_input_embeddings().padding_idx == trimmed.tokenizer.pad_token_id == len(trimmed.ids) - 1
    assert trimmed.model.training
    assert model.training
    assert model.get_input_embeddings().padding_idx == len(tokenizer) - 1
    tokenizer(FEW[:1], padding="max_length", truncation=True, max_length=9)  # leaves settings in the tokenizer
    again = nni_topo.trim_vocabulary(model, tokenizer, FEW)
    assert torch.equal(again.ids, trimmed.ids)


def test_positions_that_are_counted_from_the_id_of_padding_stay():
    tokenizer = letters("b", "<pad>", "[UNK]", "a", "aa", "ab", "##b", pad_token="<pad>")
    model = bert(7, "RobertaForMaskedLM", "RobertaConfig", pad_token_id=1, bos_token_id=None, eos_token_id=None)
    trimmed = nni_topo.trim_vocabulary(model, tokenizer, ["a aa"])
    assert trimmed.ids.tolist() == [0, 1, 2, 3, 4, 6]  # "ab" goes
    assert trimmed.model.config.pad_token_id == trimmed.tokenizer.pad_token_id == 1
    same_outputs(model, trimmed.model, [3, 4, 3], trimmed.ids)


def test_a_head_that_reads_the_last_token_can_be_trimmed_without_it_in_the_texts():
    tokenizer = letters("<pad>", "[UNK]", "b", "</s>", "a", "aa", "##b", pad_token="<pad>", eos_token="</s>")
    model = bart(7, "BartForSequenceClassification")
    trimmed = nni_topo.trim_vocabulary(model, tokenizer, ["a"])
    end = trimmed.tokenizer.eos_token_id
    assert trimmed.ids.tolist() == [0, 1, 2, 3, 4, 6]
    with torch.no_grad():
        before = model(input_ids=torch.tensor([[4, 3]])).logits
        after = trimmed.model(input_ids=torch.tensor([[trimmed.tokenizer("a")["input_ids"][0], end]])).logits
    assert torch.equal(before, after)


def test_a_long_call_shows_how_far_it_is(capsys):
    nni_topo.trim_vocabulary(bert(8), letters(), ["a b"], progress=True)
    assert "splitting texts" in capsys.readouterr().err
    nni_topo.trim_vocabulary(bert(8), letters(), ["a b"], progress=False)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "changes"),
    [
        (320, {}),  # rounded up to a multiple of 64
        (320, {"pad_token_id": None}),
        (320, {"pad_token_id": 7, "eos_token_id": 3}),  # a user's own padding
        (261, {}),
    ],
)
def test_usual_pairs_of_model_and_tokenizer_pass(rows, changes):
    tokenizer = word_piece()
    tokenizer.eos_token = "[SEP]"
    trimmed = nni_topo.trim_vocabulary(bert(rows, **changes), tokenizer, FEW)
    assert trimmed.report.tokens < len(tokenizer)


class Slow:
    is_fast = False


def letters(*names, **special):
    """A tokenizer of a few tokens."""
    vocab = {token: place for place, token in enumerate(names or ["[UNK]", "a", "b", "##b", "aa"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def words():
    model = tokenizers.models.WordLevel({"a": 0, "b": 1, "[UNK]": 2}, unk_token="[UNK]")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model))


class Adaptive(transformers.BertModel):
    def get_input_embeddings(self):
        return nn.Sequential(nn.Embedding(4, 4))


class Counting(transformers.BertModel):
    """Its states depend on the number of an id."""

    def forward(self, input_ids, **kwargs):
        output = super().forward(input_ids, **kwargs)
        output.last_hidden_state = output.last_hidden_state + input_ids.max()
        return output


def whisper():
    sizes = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_layers": 1, "decoder_layers": 1}
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 8}
    rows = len(word_piece())
    return built("WhisperForConditionalGeneration", "WhisperConfig", vocab_size=rows, **sizes, **heads, **ids)


def of_class(kind):
    torch.manual_seed(0)
    return kind(transformers.BertConfig(vocab_size=len(word_piece()), **BERT)).eval()


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (lambda: {"texts": []}, ConfigError, r"texts must be a list of texts, at least one, got \[\]"),
        (lambda: {"texts": FEW[0]}, ConfigError, r"texts must be a list of texts, at least one, got '"),
        (lambda: {"texts": [FEW[0], 3]}, ConfigError, r"texts must be a list of texts"),
        (lambda: {"texts": {"text": FEW[0]}}, ConfigError, r"texts must be a list of texts"),
        (lambda: {"held_out": [""]}, DataError, r"held_out must have at least one token, got none in 1"),
        (lambda: {"texts": ["", "  ", "[PAD]"]}, DataError, r"texts must have at least one token .* in 3"),
        (
            lambda: {"model": bert(5), "tokenizer": letters(), "texts": ["a b aa", "ab"]},
            DataError,
            r"the texts need all 5 tokens: there is nothing to gain \(BertForMaskedLM, texts\)",
        ),
        (lambda: {"tokenizer": Slow()}, ConfigError, r"tokenizer must be a fast tokenizer .*got a Slow"),
        (lambda: {"tokenizer": words()}, ConfigError, r"of kind WordPiece, BPE, Unigram, got WordLevel"),
        (lambda: {"tokenizer": byte_pairs()}, ConfigError, r"the model's own, got 421 ids for 2\d\d rows"),
        # Fewer ids than rows: too few for rows that were only rounded up, or with other special tokens.
        (lambda: {"model": bert(480)}, ConfigError, r"got 260 ids for 480 rows.*resize_token_embeddings"),
        (lambda: {"model": bert(389)}, ConfigError, r"own, got 260 ids for 389 rows"),
        (lambda: {"model": bert(280, pad_token_id=1)}, ConfigError, r"got pad_token_id 0, 1 in the config"),
        (lambda: {"model": whisper()}, ConfigError, r"runs on ids of tokens alone.*WhisperForCondition"),
        (lambda: {"model": nn.Linear(2, 2)}, ConfigError, r"must be one of Transformers.*got Linear \(model\)"),
        (
            lambda: {"model": of_class(Adaptive)},
            ConfigError,
            r"nn.Embedding of its tokens.*got Sequential \(Adaptive\)",
        ),
        (lambda: {"model": of_class(Counting)}, ConfigError, r"the same on the rows that stay.*\(Counting\)"),
        (
            lambda: {"model": built("ViTModel", "ViTConfig", image_size=8, patch_size=4, **BERT)},
            ConfigError,
            r"nn.Embedding of its tokens",
        ),
    ],
)
def test_what_cannot_be_trimmed_is_refused(arguments, error, text):
    tokenizer = word_piece()
    usual = {"model": bert(len(tokenizer)), "tokenizer": tokenizer, "texts": FEW}
    with pytest.raises(error, match=text):
        nni_topo.trim_vocabulary(**{**usual, **arguments()})
