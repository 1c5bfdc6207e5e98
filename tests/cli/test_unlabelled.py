"""`nni-topo shrink` on data of people who have no labels."""

from __future__ import annotations

import json
import sys
import textwrap
import time
from types import ModuleType

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import nni_topo
from nni_topo.cli import main
from nni_topo.errors import ConfigError
from nni_topo.zoo.image_folder import list_image_folder
from nni_topo.zoo.labelled import Preprocessing, sources_of
from nni_topo.zoo.unlabelled import fitting_texts, read_inputs

MINE = """
import numpy
import torch
from torch import nn

class Segmenter(nn.Module):
    def __init__(self, in_channels=3):
        super().__init__()
        self.first, self.second = nn.Conv2d(in_channels, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        return self.last(self.second(self.first(x).relu()).relu())

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right, self.last = nn.Linear(6, 16), nn.Linear(4, 16), nn.Linear(16, 2)

    def forward(self, left, right):
        return self.last((self.left(left) + self.right(right)).relu())

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.first, self.last = nn.Embedding(40, 8), nn.Linear(8, 24), nn.Linear(24, 3)

    def forward(self, input_ids, attention_mask):
        shown = self.table(input_ids) * attention_mask[..., None]
        return self.last(self.first(shown.sum(1)).relu())

torch.manual_seed(0)
ready = Segmenter().eval()

def batches():
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        yield torch.rand(16, 3, 8, 8, generator=generator), torch.zeros(16)

def corner(image):
    return torch.tensor(numpy.asarray(image.convert("RGB"))).movedim(2, 0)[:, :8, :8].float()

def ragged(image):
    return torch.rand(3, 8, torch.randint(8, 99, ()))

def nothing():
    return []

def broken():
    yield torch.zeros(4, 3, 8, 8)
    raise OSError("no more")

def asks(size):
    return Segmenter()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder: a file with networks, and data of all kinds."""
    (tmp_path / "mine_unlabelled.py").write_text(textwrap.dedent(MINE))
    (tmp_path / "wrong.py").write_text("half = 1 / 0")
    draw = np.random.default_rng(0)
    places = {"flat": "", "nested": "holidays/2024", "classes/cats": "", "classes/dogs": ""}
    for name, place in places.items():
        inner = tmp_path / name / place
        inner.mkdir(parents=True)
        for number in range(24):
            side = (32, 20) if name == "nested" and number % 2 else (32, 32)
            PIL.Image.fromarray(draw.integers(0, 255, (*side, 3), dtype=np.uint8)).save(inner / f"{number}.png")
    images = draw.random((48, 3, 16, 16), dtype=np.float32)
    np.savez(tmp_path / "one.npz", x=images)
    np.save(tmp_path / "one.npy", images)
    left, right = draw.random((48, 6), dtype=np.float32), draw.random((48, 4), dtype=np.float32)
    np.savez(tmp_path / "two.npz", right=right, left=left)
    np.savez(tmp_path / "uneven.npz", right=right[1:], left=left)
    save_file({"left": torch.from_numpy(left), "right": torch.from_numpy(right)}, tmp_path / "two.safetensors")
    lines = [f"word{number % 20} word{number % 7}" for number in range(48)]
    (tmp_path / "lines.txt").write_text("\n\n".join(lines))
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps({"text": line, "id": 1}) for line in lines))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("mine_unlabelled", None)


@pytest.fixture
def tokenizer(folder):
    """A tokenizer of Transformers whose tokens are words."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    known = {"<pad>": 0, "<unk>": 1, **{f"word{number}": number + 2 for number in range(20)}}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", unk_token="<unk>", model_input_names=["input_ids", "attention_mask"]
    )
    fast.save_pretrained(folder / "tokens")
    return "tokens"


def shrunk(*flags):
    return main(["shrink", *flags, "--flops", "0.5", "--distill-seconds", "0.01", "--out", "small"])


def test_the_folders_of_images_are_their_sources(folder):
    """Of ten folders the fifth judges and the tenth reports, on no image of which anything was solved."""
    draw = np.random.default_rng(1)
    for place in range(10):
        inner = folder / "photos" / f"photo{place}" / "crops"
        inner.mkdir(parents=True)
        for number in range(6):
            PIL.Image.fromarray(draw.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(inner / f"{number}.png")
    inputs = read_inputs("photos", 60)
    assert inputs.groups.tolist() == [number // 6 for number in range(60)]
    assert read_inputs("photos", 40).groups is None  # seven folders are too few to hold out some of them
    # Folders of classes are no sources, but folders within them are.
    files, _, _ = list_image_folder(folder / "photos", None, None, None, 0)
    assert len(set(sources_of(files, in_classes=True))) == 10
    files, _, _ = list_image_folder(folder / "classes", None, None, None, 0)
    assert sources_of(files, in_classes=True) is None
    assert shrunk("--model", "mine_unlabelled.py:ready", "--data", "photos", "--unlabelled") == 0
    *_, last = json.loads((folder / "small" / "shrink.json").read_text())["stages"]
    assert last["known_distance"] > 0.0


@pytest.mark.parametrize(
    ("data", "flags"),
    [
        ("flat", []),
        ("nested", ["--image-size", "16"]),
        ("classes", ["--unlabelled"]),
        ("one.npz", []),
        ("one.npy", ["--images", "40"]),
        ("mine_unlabelled.py:batches", ["--images", "32"]),
    ],
)
def test_images_without_labels_are_enough_for_a_network_that_is_no_classifier(folder, data, flags):
    assert shrunk("--model", "mine_unlabelled.py:ready", "--data", data, *flags) == 0
    document = json.loads((folder / "small" / "shrink.json").read_text())
    unpruned, *_, last = document["stages"]
    assert 0.45 < last["macs"] / unpruned["macs"] < 0.55
    assert "accuracy" not in last or last["accuracy"] is None
    assert (folder / "small" / "report.html").is_file()
    import mine_unlabelled

    again = nni_topo.load(folder / "small" / "dense.safetensors", mine_unlabelled.Segmenter())
    assert again(torch.rand(2, 3, 16, 16)).shape == (2, 4, 16, 16)


@pytest.mark.parametrize("data", ["two.npz", "two.safetensors"])
def test_arrays_go_to_the_arguments_of_their_names(folder, data):
    assert shrunk("--model", "mine_unlabelled.py:Pair", "--data", data, "--export", "onnx") == 0
    assert (folder / "small" / "small.onnx").is_file()


@pytest.mark.parametrize("data", ["lines.txt", "lines.jsonl"])
def test_lines_of_text_are_tokenized(folder, tokenizer, data):
    assert shrunk("--model", "mine_unlabelled.py:Words", "--data", data, "--tokenizer", tokenizer) == 0


def test_images_are_scaled_as_the_flags_say(folder, capsys):
    seen = []

    class Looking(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 3)

        def forward(self, x):
            seen.append(x)
            return self.last(self.first(x).relu())

    module = sys.modules["looking_for_scales"] = ModuleType("looking_for_scales")
    module.net = Looking()
    try:
        scale = ["--mean", "0", "0", "0", "--std", "1", "1", "1"]
        assert shrunk("--model", "looking_for_scales:net", "--data", "flat", *scale) == 0
    finally:
        del sys.modules["looking_for_scales"]
    first = np.asarray(PIL.Image.open(folder / "flat" / "0.png")).transpose(2, 0, 1) / 255.0
    batch = next(each for each in seen if len(each) > 1)
    np.testing.assert_allclose(batch[0].numpy(force=True), first, atol=1e-6)
    assert "[0.0, 0.0, 0.0]" in capsys.readouterr().out


def test_a_transform_takes_the_place_of_all_scaling(folder, capsys):
    words = ["--model", "mine_unlabelled.py:ready", "--data", "nested", "--transform", "mine_unlabelled.py:corner"]
    assert shrunk(*words) == 0
    assert "images: as shares" not in capsys.readouterr().out
    inputs = read_inputs("nested", 24, transform="mine_unlabelled.py:corner")
    assert [tuple(batch.shape) for batch in inputs] == [(24, 3, 8, 8)]
    assert float(inputs[0].max()) > 100.0


def test_a_crop_is_a_share_of_the_shorter_side(folder):
    assert shrunk("--model", "mine_unlabelled.py:ready", "--data", "flat", "--image-size", "16", "--crop", "0.5") == 0
    scaling = Preprocessing(mean=(0.0,) * 3, std=(1.0,) * 3, crop=0.5)
    (images,) = read_inputs("flat", 1, image_size=16, preprocessing=scaling)
    middle = np.asarray(PIL.Image.open(folder / "flat" / "0.png"))[8:24, 8:24].transpose(2, 0, 1) / 255.0
    np.testing.assert_allclose(images[0].numpy(force=True), middle, atol=1e-6)


def test_labels_beside_a_single_array_are_told_to_be_unused(folder, caplog):
    with np.load("one.npz") as archive:
        images = archive["x"]
    np.savez("labelled.npz", x=images, y=np.zeros(len(images), dtype=np.int64))
    assert shrunk("--model", "mine_unlabelled.py:ready", "--data", "labelled.npz") == 0
    assert "taken for labels, which aren't used" in caplog.text


def test_long_texts_are_cut_to_what_the_tokenizer_and_the_model_take(folder, tokenizer, caplog):
    transformers = pytest.importorskip("transformers")
    (folder / "long.txt").write_text("\n".join(["word1 " * 12] * 30 + ["word2"] * 10))
    known = transformers.AutoTokenizer.from_pretrained(tokenizer)
    known.model_max_length = 9
    known.save_pretrained("short")
    batches = read_inputs("long.txt", 40, tokenizer="short")
    assert max(batch["input_ids"].shape[1] for batch in batches) == 9
    assert "30 of 40 texts are cut to the 9 tokens" in caplog.text
    network = nn.Module()
    network.config = transformers.BertConfig(max_position_embeddings=5)
    batches = fitting_texts(batches, network, "long.txt")
    assert {tensor.shape[1] for batch in batches for tensor in batch.values()} == {5}
    assert "cut to the 5 positions" in caplog.text


def test_a_tokenizer_that_is_nowhere_is_an_error_within_seconds(folder, monkeypatch):
    pytest.importorskip("transformers")
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    began = time.perf_counter()
    with pytest.raises(ConfigError, match=r"got 'nobody/nothing': no folder of that name, .* no answer from http"):
        read_inputs("lines.txt", 8, tokenizer="nobody/nothing")
    assert time.perf_counter() - began < 10.0


def test_the_flags_for_outputs_distillation_and_layers_reach_the_call(folder, capsys):
    words = ["--model", "mine_unlabelled.py:ready", "--data", "flat", "--objective", "squares", "--layers", "first"]
    assert main(["shrink", *words, "--macs", "0.8", "--no-distill", "--out", "small"]) == 0
    document = json.loads((folder / "small" / "shrink.json").read_text())
    assert [stage["network"] for stage in document["stages"]] == ["unpruned", "pruned", "reconstructed"]
    assert "an error of" in document["sentence"]
    assert {row["name"]: row["before"] > row["after"] for row in document["widths"]} == {
        "first": True,
        "second": False,
        "last": False,
    }
    assert "a folder for each source" in " ".join(document["notes"])
    assert "Calibration(" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "flat", "--macs", "0.5"], "two names of one cost"),
        (["--data", "flat", "--equal-blocks", "--no-equal-blocks"], "exclude each other"),
        (["--data", "flat", "--no-distill"], "--distill-seconds must be left out"),
        (["--data", "flat", "--crop", "2"], "crop must be"),
        (["--data", "flat", "--transform", "mine_unlabelled.py:corner", "--crop", "0.5"], "--crop must be left out"),
        (["--data", "flat", "--transform", "mine_unlabelled.py:nothing"], "a transform must return a tensor"),
        (["--data", "flat", "--transform", "mine_unlabelled.py:ragged"], "tensors of one shape"),
        (["--data", "two.npz"], "inputs must fit the model"),
    ],
)
def test_flags_that_exclude_each_other_and_inputs_that_do_not_fit_are_errors(folder, flags, message, capsys):
    assert shrunk("--model", "mine_unlabelled.py:ready", *flags) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (folder / "small").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "resnet20", "--data", "flat"], "must come with its weights where data has no labels"),
        (["--model", "mine_unlabelled.py:ready", "--data", "empty"], "must hold an image"),
        (["--model", "mine_unlabelled.py:ready", "--data", "nested"], "must be squares of one size unless image_size"),
        (["--model", "mine_unlabelled.py:Pair", "--data", "uneven.npz"], "must hold equally many samples"),
        (["--model", "mine_unlabelled.py:Words", "--data", "lines.txt"], "texts need a tokenizer"),
        (["--model", "mine_unlabelled.py:ready", "--data", "mine_unlabelled.py:nothing"], "at least one batch"),
        (["--model", "mine_unlabelled.py:ready", "--data", "photos"], "data must be one of"),
        (["--model", "missing.py:Net", "--data", "flat"], "that can be imported"),
        (["--model", "mine_unlabelled.py:ready", "--data", "flat", "--mean", "0.5"], "--mean must be three numbers"),
        (["--model", "mine_unlabelled.py:ready", "--data", "flat", "--std", "1", "1", "0"], "std must be"),
        (["--model", "mine_unlabelled.py:ready", "--data", "flat", "--classes", "0"], "classes must be"),
        (["--model", "net.onnx", "--data", "one.npz", "--export", "pt2"], "--export can't be combined with a file"),
        (["--model", "wrong.py:Net", "--data", "flat"], "ZeroDivisionError"),
        (["--model", "mine_unlabelled.py:asks", "--data", "flat"], "a model factory must take no arguments"),
        (["--model", "mine_unlabelled.py:ready", "--data", "mine_unlabelled.py:broken"], "no more"),
        (["--model", "mine_unlabelled.py:ready", "--data", "mine_unlabelled.py:asks"], "must return batches"),
    ],
)
def test_data_that_can_not_be_used_are_named_before_any_work(folder, flags, message, capsys):
    assert shrunk(*flags) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (folder / "small").exists()
