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


def test_state_dicts_of_other_programs_are_read(tmp_path: Path) -> None:
    model = small(0)
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "named.pt")
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    for name in ("bare.pt", "named.pt", "a.safetensors"):
        other = small(1)
        assert load_checkpoint(tmp_path / name, other) == {}
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


def test_damaged_files_and_those_without_a_state_dict_are_named(tmp_path: Path) -> None:
    for content in ({"epoch": 3}, [1, 2]):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(DataError, match=r"must hold a (state dict|dict), got"):
            load_checkpoint(tmp_path / "a.pt", small(0))
    save_checkpoint(tmp_path / "a.pt", small(0), {})
    (tmp_path / "b.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:1000])
    with pytest.raises(DataError, match=r"a checkpoint must .*b\.pt"):
        load_checkpoint(tmp_path / "b.pt", small(0))
    with pytest.raises(DataError, match=r"meta must be JSON serializable, got: .* not JSON serializable \(meta\)"):
        save_checkpoint(tmp_path / "c.pt", small(0), {"nested": [Path("a")]})
    assert not (tmp_path / "c.pt").exists()
