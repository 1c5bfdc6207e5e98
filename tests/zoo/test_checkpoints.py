from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nni_topo.errors import DataError
from nni_topo.zoo import create_model, load_checkpoint, save_checkpoint


def small(seed: int, classes: int = 10) -> nn.Module:
    return create_model("small_cnn", num_classes=classes, in_channels=1, image_size=8, seed=seed)


def same(first: nn.Module, second: nn.Module) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_round_trip_brings_weights_buffers_and_meta_back(tmp_path: Path) -> None:
    model, meta = small(0), {"model": "small_cnn", "seed": 0, "accuracy": 0.5, "widths": [1, 2], "note": None}
    model.features.norm1.running_mean.fill_(3.0)
    save_checkpoint(tmp_path / "deep" / "a.pt", model, meta)
    other = small(1)
    assert load_checkpoint(tmp_path / "deep" / "a.pt", other) == meta
    assert same(model, other)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.pt"]


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"state_dict": state, "epoch": 3}])
def test_foreign_state_dicts_are_read(tmp_path: Path, wrap) -> None:
    model, other = small(0), small(1)
    torch.save(wrap(model.state_dict()), tmp_path / "a.pt")
    assert load_checkpoint(tmp_path / "a.pt", other) == {}
    assert same(model, other)


def test_a_file_of_safetensors_is_read(tmp_path: Path) -> None:
    model, other = small(0), small(1)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    assert load_checkpoint(tmp_path / "a.safetensors", other) == {}
    assert same(model, other)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_the_names_of_wrappers_are_left_out(tmp_path: Path, prefix: str) -> None:
    model, other = small(0), small(1)
    torch.save({f"{prefix}{name}": value for name, value in model.state_dict().items()}, tmp_path / "a.pt")
    load_checkpoint(tmp_path / "a.pt", other)
    assert same(model, other)
    holder = torch.nn.Module()
    holder.module = small(2)  # a part of its own that is called so
    torch.save({f"module.{name}": value for name, value in model.state_dict().items()}, tmp_path / "a.pt")
    load_checkpoint(tmp_path / "a.pt", holder)
    assert same(model, holder.module)


def test_pickled_code_is_refused_and_not_run(tmp_path: Path) -> None:
    victim = tmp_path / "victim"

    class Attack:
        def __reduce__(self):
            return (Path.touch, (victim,))

    torch.save({"state_dict": small(0).state_dict(), "payload": Attack()}, tmp_path / "a.pt")
    with pytest.raises(DataError, match=r"must be a whole file of tensors and plain values only.*a\.pt"):
        load_checkpoint(tmp_path / "a.pt", small(0))
    assert not victim.exists()


def test_a_pickled_model_is_refused(tmp_path: Path) -> None:
    torch.save(small(0), tmp_path / "a.pt")
    with pytest.raises(DataError, match="must be a whole file of tensors and plain values only"):
        load_checkpoint(tmp_path / "a.pt", small(0))


def test_shapes_that_do_not_fit_are_named_and_the_model_stays(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pt", small(0, classes=7), {})
    model = small(1)
    with pytest.raises(DataError, match=r"classifier\.fc2\.weight: \(7, 64\), in the model \(10, 64\)"):
        load_checkpoint(tmp_path / "a.pt", model)
    assert same(model, small(1))


def test_missing_and_foreign_names_are_named_but_only_the_first(tmp_path: Path) -> None:
    torch.save({"features.conv1.weight": torch.zeros(16, 1, 3, 3), "x": torch.zeros(1)}, tmp_path / "a.pt")
    with pytest.raises(DataError, match=r"features\.norm1\.weight: missing.*; .* and \d+ more") as caught:
        load_checkpoint(tmp_path / "a.pt", small(0))
    assert str(caught.value).count(": missing") == 3
    state = small(0).state_dict() | {"extra": torch.zeros(1)}
    torch.save(state, tmp_path / "b.pt")
    with pytest.raises(DataError, match=r"extra: \(1,\), in the model missing"):
        load_checkpoint(tmp_path / "b.pt", small(0))


@pytest.mark.parametrize("content", [{}, {"epoch": 3}, [1, 2]])
def test_files_without_a_state_dict_are_named(tmp_path: Path, content) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(DataError, match=r"must hold a (state dict|dict), got"):
        load_checkpoint(tmp_path / "a.pt", small(0))


@pytest.mark.parametrize("kept", [0, 10, 1000])
def test_truncated_files_are_named(tmp_path: Path, kept: int) -> None:
    save_checkpoint(tmp_path / "a.pt", small(0), {})
    whole = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "b.pt").write_bytes(whole[:kept])
    with pytest.raises(DataError, match=r"a checkpoint must .*b\.pt"):
        load_checkpoint(tmp_path / "b.pt", small(0))


@pytest.mark.parametrize("value", [{1, 2}, Path("a"), torch.zeros(1)])
def test_meta_that_could_not_be_read_back_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(DataError, match=r"meta must hold what JSON can hold, got: .* not JSON serializable \(meta\)"):
        save_checkpoint(tmp_path / "a.pt", small(0), {"nested": [value]})
    assert not (tmp_path / "a.pt").exists()
