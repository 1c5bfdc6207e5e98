from __future__ import annotations

import copy
import json
import random
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tied_nets import LanguageModel, TiedConvolutions, untied
from torch import nn

from nni_topo import to_dense
from nni_topo.errors import ConfigError, DataError, NniTopoError, SpeedupError
from nni_topo.network.io.checkpoint import (
    RemovedPart,
    _digest,
    keep_blocks,
    kept_blocks,
    load,
    removed_parts,
    save,
    take_out_part,
)
from nni_topo.network.layers.kinds import as_torch_layers
from nni_topo.zoo.transformers import SelfAttention, vit_small


def make(width=8, groups=2, classes=4):
    """One layer of each kind that gets smaller."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, groups=1),
        nn.BatchNorm2d(width),
        nn.PReLU(width),
        nn.ConvTranspose2d(width, width, 3, groups=width),
        nn.InstanceNorm2d(width, affine=True, track_running_stats=True),
        nn.Conv2d(width, width, 1, groups=groups),
        nn.GroupNorm(groups, width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(width),
        nn.Linear(width, classes),
    )


def small():
    """A smaller one with values that aren't those of a new model."""
    dense = make(width=6)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
        dense[1].running_var.fill_(2.5)
        dense[1].num_batches_tracked.fill_(9)
    return dense


IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def path(tmp_path):
    """A file to write."""
    return tmp_path / "dense.safetensors"


@pytest.mark.parametrize("original", [make(), make])
def test_a_saved_model_comes_back_bit_by_bit(path, original):
    dense = small()
    save(dense, path)
    built = load(path, original)
    assert repr(built) == repr(dense)
    assert list(built.state_dict()) == list(dense.state_dict())
    assert all(torch.equal(value, dense.state_dict()[key]) for key, value in built.state_dict().items())
    with torch.no_grad():
        assert torch.equal(built.eval()(IMAGES), dense.eval()(IMAGES))


def in_parallel(net):
    """Wrap a network; DataParallel moves it to a GPU, where there is one."""
    return nn.DataParallel(net).cpu()


@pytest.mark.parametrize("wrap", [torch.compile, in_parallel])
def test_of_a_wrapped_model_the_model_within_is_saved_and_loaded(path, wrap):
    dense = small()
    for saved, original in ((wrap(dense), make()), (dense, wrap(make())), (wrap(dense), lambda: wrap(make()))):
        save(saved, path)
        built = load(path, original)
        assert repr(built) == repr(dense)
        assert all(torch.equal(value, dense.state_dict()[key]) for key, value in built.state_dict().items())


def test_what_to_dense_makes_comes_back_and_trains(path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3), nn.Flatten())
    mask = torch.ones(8, 1, 1, 1)
    mask[[1, 3]] = 0
    dense = to_dense(model, IMAGES, {"0": {"weight": mask}})
    save(dense, str(path))
    built = load(str(path), model)
    assert (built[0].out_channels, built[1].num_features, built[2].in_channels) == (6, 6, 6)
    assert torch.equal(built.eval()(IMAGES), dense.eval()(IMAGES))
    built.train()(IMAGES).sum().backward()
    assert built[0].weight.grad.shape == (6, 3, 3, 3)


def test_the_model_given_stays_as_it_was(tmp_path):
    save(small(), tmp_path / "dense.safetensors")
    model = make().eval()
    before = copy.deepcopy(model.state_dict())
    built = load(tmp_path / "dense.safetensors", model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model[0].out_channels == 8
    assert not built.training
    assert load(tmp_path / "dense.safetensors", model.train()).training


def test_a_model_that_is_made_on_the_meta_device_gets_its_values_from_the_file(path):
    def tied(width):
        model = nn.Sequential(nn.Embedding(5, width), nn.BatchNorm1d(width), nn.Linear(width, 5, bias=False)).eval()
        model[2].weight = model[0].weight
        model[1].register_buffer("not_saved_by_pytorch", torch.ones(width), persistent=False)
        model[1].weight.requires_grad_(False)
        return model

    def on_meta():
        with torch.device("meta"):
            return tied(7)

    dense = tied(3)
    save(dense, path)
    model = on_meta()
    built = load(path, model)
    assert all(tensor.is_meta for tensor in model.parameters())
    assert built[2].weight is built[0].weight
    assert not built[1].weight.requires_grad
    assert not built.training
    numbers = torch.tensor([0, 3, 4])
    assert torch.equal(built(numbers), dense(numbers))
    assert torch.equal(built[1].not_saved_by_pytorch, torch.ones(3))
    built(numbers).sum().backward()
    assert built[0].weight.grad.shape == (5, 3)


def test_a_model_without_values_is_not_saved(path):
    with torch.device("meta"):
        model = make()
    with pytest.raises(DataError, match=r"on the meta device, without any \(0\.weight\)"):
        save(model, path)
    assert not path.exists()


def test_ties_of_the_model_hold_where_the_dense_model_has_them(tmp_path):
    for dense in (TiedConvolutions(), untied(TiedConvolutions())):
        with torch.no_grad():
            dense.two.weight.mul_(2)
        save(dense, tmp_path / "dense.safetensors")
        built = load(tmp_path / "dense.safetensors", TiedConvolutions)
        assert torch.equal(built(IMAGES), dense(IMAGES))
        assert (built.two.weight is built.one.weight) == (dense.two.weight is dense.one.weight)
        assert (built.two.bias is built.one.bias) == (dense.two.bias is dense.one.bias)


def test_buffers_that_no_state_dict_holds_come_back(tmp_path):
    dense = LanguageModel()
    dense.rotation.frequencies.mul_(1.5)
    tokens = torch.arange(10).view(2, 5)
    save(dense, tmp_path / "dense.safetensors")
    assert torch.equal(load(tmp_path / "dense.safetensors", LanguageModel)(tokens), dense(tokens))


class Twice(nn.Module):
    """Two bilinear layers, or one under two names."""

    def __init__(self, shared):
        super().__init__()
        self.one = nn.Bilinear(2, 2, 2)
        self.two = self.one if shared else nn.Bilinear(2, 2, 2)


def test_a_model_that_shares_what_the_dense_model_does_not_is_refused(path):
    save(Twice(shared=False), path)
    with pytest.raises(ConfigError, match=r"shares tensors between modules .*two.weight, .*dense\."):
        load(path, Twice(shared=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_tensors_of_every_type_come_back(path, dtype):
    dense = nn.Linear(3, 2).to(dtype)
    dense.register_buffer("empty", torch.zeros(0, dtype=torch.bool))
    dense.register_buffer("turned", torch.arange(6, dtype=torch.int16).view(2, 3).t())
    save(dense, path)
    built = load(path, dense)
    assert torch.equal(built.weight, dense.weight)
    assert torch.equal(built.turned, dense.turned)


class Unpickled:
    """Pickles as a call that would leave a trace."""

    ran = False

    def __reduce__(self):
        return setattr, (Unpickled, "ran", True)


def test_code_in_a_file_is_refused_and_not_run(path):
    for zipped in (True, False):
        torch.save({"format": Unpickled()}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(DataError, match=r"written by nni_topo.save.*dense\.safetensors"):
            load(path, make)
    assert not Unpickled.ran


def test_other_files_are_refused(path):
    path.write_bytes(b"not a model at all")
    with pytest.raises(DataError, match=r"must be a whole file written by nni_topo\.save"):
        load(path, make)
    for content in (make().state_dict(), make()):
        torch.save(content, path)
        with pytest.raises(DataError, match=r"must be a whole file written by nni_topo\.save, got .*dense\."):
            load(path, make)
    save_file({"0.weight": torch.ones(2)}, path)
    with pytest.raises(DataError, match=r"written by nni_topo\.save, got other safetensors \(.*dense\.safetensors"):
        load(path, make)


def test_the_file_is_read_by_others(path):
    dense = small()
    save(dense, path)
    assert load_file(path).keys() == dense.state_dict().keys()


def test_a_file_that_is_cut_short_or_missing_is_refused(path):
    save(small(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"written by nni_topo.save.*{path.name}"):
        load(path, make)
    path.unlink()
    with pytest.raises(DataError, match=rf"must be a file that exists, got none \(.*{path.name}"):
        load(path, make)
    with pytest.raises(DataError, match="must lie in a folder that exists"):
        save(small(), path.parent / "no" / "folder" / path.name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda recipe, _: recipe.update(format_version=99), "format version 3, got 99 from nni_topo"),
        (lambda recipe, _: recipe.update(blocks={"": [0]}), "hold what was saved"),
        (lambda _, tensors: tensors["0.weight"][0, 0, 0, 0].add_(1e-3), "hold what was saved"),
    ],
)
def test_a_file_that_was_changed_is_refused(path, change, message):
    save(small(), path)
    with safe_open(path, "pt") as file:
        recipe = json.loads(file.metadata()["nni_topo"])
    tensors = load_file(path)
    change(recipe, tensors)
    save_file(tensors, path, {"nni_topo": json.dumps(recipe)})
    with pytest.raises(DataError, match=rf"{message}.*dense\.safetensors"):
        load(path, make)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: make()[:-1], r"tensors missing in the model: 10\.bias, 10\.weight \("),
        (lambda: make().append(nn.Linear(4, 4)), r"tensors missing in the file: 11\.bias, 11\.weight \("),
        (lambda: make(width=4), r"got out_channels 6 where the model has 4 \(0, "),
        (lambda: nn.Sequential(nn.Linear(3, 8), *make()[1:]), "got Conv2d where the model has Linear"),
    ],
)
def test_another_model_is_refused_with_the_place(tmp_path, model, message):
    save(small(), tmp_path / "dense.safetensors")
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "dense.safetensors", model)


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("normalize", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
def test_what_was_pruned_as_torch_layers_is_loaded_into_these(path, normalize):
    save(small(), path)
    model = make()
    normalize(model[0])
    with pytest.raises(ConfigError, match=r"missing in the model: 0\.weight .*nni_topo\.as_torch_layers\(model\)"):
        load(path, model)
    assert load(path, as_torch_layers(model))[0].out_channels == 6


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("resnet18", r"model must be the unpruned torch\.nn\.Module or a function .* makes it, got .*str.* \(load\)"),
        (lambda width: make(width), r"got a function \(load\)"),
    ],
)
def test_what_is_neither_a_model_nor_makes_one_is_refused(tmp_path, model, message):
    save(small(), tmp_path / "dense.safetensors")
    with pytest.raises(ConfigError, match=message):
        load(tmp_path / "dense.safetensors", model)


def test_a_wrapped_model_is_refused(tmp_path):
    from nni.compression.pruning import L1NormPruner

    model = make()
    pruner = L1NormPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}])
    pruner.compress()
    with pytest.raises(SpeedupError, match="unwrap_model"):
        save(model, tmp_path / "dense.safetensors")


def vit():
    torch.manual_seed(0)
    return vit_small(3, 1, 8).eval()


def test_a_removed_part_adds_nothing_in_the_form_of_what_it_stands_for():
    states = torch.randn(2, 4, 6)
    assert torch.equal(RemovedPart()(states), torch.zeros(2, 4, 6))
    zeros, *others = RemovedPart(3)(attention_mask=None, hidden_states=states)
    assert torch.equal(zeros, torch.zeros(2, 4, 6))
    assert others == [None, None]


def test_a_model_without_parts_is_read_again(path):
    model, images = vit(), torch.randn(3, 1, 8, 8)
    take_out_part(model, "blocks.1.attention", 0)
    take_out_part(model, "blocks.3.mlp", 0)
    assert removed_parts(model) == {"blocks.1.attention": 0, "blocks.3.mlp": 0}
    assert not model.blocks[1].attention.training
    save(model, path)
    # The unpruned model will do, and the one without the parts.
    for base in (vit(), model):
        assert torch.equal(load(path, base)(images), model(images))
    shallow = vit()
    del shallow.blocks[3:]
    with pytest.raises(ConfigError, match=r"without a part .* taken out \(blocks\.3\.mlp, .*dense\.safetensors"):
        load(path, shallow)


def test_a_model_with_fewer_blocks_than_the_unpruned_one_is_refused(path):
    model, images = vit(), torch.randn(3, 1, 8, 8)
    keep_blocks(model, "blocks", [0, *range(3, len(model.blocks))])
    save(model, path)
    for base in (vit(), model):
        assert torch.equal(load(path, base)(images), model(images))
    shallow = vit()
    keep_blocks(shallow, "blocks", range(3, len(shallow.blocks)))
    with pytest.raises(ConfigError, match=r"got \d blocks where block \d is kept \(blocks, .*dense\.safetensors"):
        load(path, shallow)


def test_files_of_export_are_not_written_by_save(tmp_path):
    with pytest.raises(ConfigError, match=r"are those of nni_topo.export, got it for save"):
        save(make(), tmp_path / "net.PT2")


class Numbered(nn.Module):
    """A block that knows its number, as those of Transformers do."""

    def __init__(self, number):
        super().__init__()
        self.layer_idx, self.layer = number, nn.Linear(2, 2)
        self.layer.layer_idx = None


def numbered(count=6, **config):
    model = nn.Sequential(nn.Sequential(*map(Numbered, range(count))))
    model.config = SimpleNamespace(num_hidden_layers=count, is_encoder_decoder=False, **config)
    return model


def test_blocks_that_stay_are_numbered_anew_and_known_by_their_old_numbers():
    model = numbered(layer_types=list("abcdef"))
    assert kept_blocks(model) == {}
    keep_blocks(model, "0", [0, 3, 4, 5])
    assert [block.layer_idx for block in model[0]] == [0, 1, 2, 3]
    assert kept_blocks(model) == {"0": [0, 3, 4, 5]}
    keep_blocks(model, "0", [0, 1, 3])
    assert [block.layer_idx for block in model[0]] == [0, 1, 2]
    assert kept_blocks(model) == {"0": [0, 3, 5]}
    assert model.config.num_hidden_layers == 3
    assert model.config.layer_types == ["a", "d", "f"]


class Split(nn.Module):
    """Splits what a layer puts out by numbers in an attribute."""

    def __init__(self, sizes):
        super().__init__()
        self.layer, self.sizes = nn.Linear(4, sum(sizes.values())), sizes

    def forward(self, x):
        return self.layer(x).split(list(self.sizes.values()), 1)


def test_numbers_in_attributes_that_became_smaller_come_back(path):
    dense, rows = Split({"a": 2, "b": 4}), torch.rand(3, 4)
    save(dense, path)
    model = Split({"a": 3, "b": 5})
    loaded = load(path, model)
    assert (loaded.sizes, model.sizes) == ({"a": 2, "b": 4}, {"a": 3, "b": 5})
    assert all(map(torch.equal, loaded(rows), dense(rows)))


def test_a_model_with_heads_of_another_size_is_refused(tmp_path):
    three, four = (nn.Sequential(SelfAttention(12, heads, bias=True, causal=False)) for heads in (4, 3))
    save(three, tmp_path / "dense.pt")
    with pytest.raises(ConfigError, match=r"got 3 in the file and 4 in the model \(0, "):
        load(tmp_path / "dense.pt", four)


WRONG = [
    None, True, -1, 0, 10**30, 2.5, float("nan"), "x", "", [], [None], [[]], [["", "a", [], 1]], {}, {"x": None},
    {"": 0},
]  # fmt: skip


def places_in(value, at=()):
    """The places within a recipe, from the outside to the inside."""
    yield at
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in pairs:
        yield from places_in(each, (*at, key))


def forged(recipe, at, value):
    """A recipe with another value, or another name, at a place; None removes what is there."""
    recipe = copy.deepcopy(recipe)
    holder = recipe
    for key in at[:-1]:
        holder = holder[key]
    if value is None:
        del holder[at[-1]]
    elif isinstance(value, tuple):
        holder[value[0]] = holder.pop(at[-1])
    else:
        holder[at[-1]] = value
    return recipe


@pytest.mark.parametrize("count", [80, pytest.param(400, marks=pytest.mark.slow)])
def test_recipes_that_someone_has_written_are_refused_or_fit(path, count):
    """The digest is right: anyone can compute it."""
    drawing, model = random.Random(0), vit()
    dense = copy.deepcopy(model)
    take_out_part(dense, "blocks.1.attention", 0)
    keep_blocks(dense, "blocks", range(len(dense.blocks) - 1))
    save(dense, path)
    values = load_file(path)
    with safe_open(str(path), "pt") as opened:
        recipe = json.loads(opened.metadata()["nni_topo"])
    del recipe["digest"]
    places = [at for at in places_in(recipe) if at and at[0] not in ("format", "format_version")]
    outer = [at for at in places if len(at) <= 2]
    outcomes = []
    for number in range(count):
        at = drawing.choice(outer if number % 2 else places)
        wrong = [*WRONG, drawing.choice(recipe["not_persistent"] or ["blocks"])]
        wrong += [("blocks.0",), ("",), ("no.such",)] if isinstance(at[-1], str) and len(at) > 1 else []
        other = forged(recipe, at, drawing.choice(wrong))
        told = json.dumps({**other, "digest": _digest(other, values)})
        save_file(values, path, {"nni_topo": told})
        try:
            load(path, model)
            outcomes.append("fits")
        except NniTopoError:  # any other error ends the test
            outcomes.append("refused")
    assert outcomes.count("refused") > count // 2
