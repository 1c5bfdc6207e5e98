"""Every function of ``torch.nn.functional`` that maps a tensor to a tensor can be traced by NNI."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from nni.common.concrete_trace_utils import concrete_trace
from torch import Tensor, nn
from torch.fx.graph_module import GraphModule
from torch.nn import functional

GENERATOR = torch.Generator().manual_seed(0)


def drawn(*shape: int) -> Tensor:
    return torch.rand(shape, generator=GENERATOR) * 0.8 + 0.1


SHAPES = ((4, 6), (2, 4, 8), (2, 4, 8, 8), (2, 4, 8, 8, 8))
"""Shapes tried, in this order, for functions that take a tensor alone."""

SHAPE_OF_DIMENSIONS = {"1d": SHAPES[1], "2d": SHAPES[2], "3d": SHAPES[3]}

INDICES = {
    dims: functional.__dict__[f"max_pool{dims}"](drawn(*shape), 2, return_indices=True)[1]
    for dims, shape in SHAPE_OF_DIMENSIONS.items()
}

LABELS = torch.tensor([1, 0, 3, 2])

EXTRA: dict[str, dict[str, Any]] = {
    **{f"{kind}_pool{dims}": {"kernel_size": 2} for kind in ("avg", "max") for dims in SHAPE_OF_DIMENSIONS},
    **{f"max_pool{dims}_with_indices": {"kernel_size": 2} for dims in SHAPE_OF_DIMENSIONS},
    **{f"lp_pool{dims}": {"norm_type": 2.0, "kernel_size": 2} for dims in SHAPE_OF_DIMENSIONS},
    **{f"adaptive_{kind}_pool{dims}": {"output_size": 2} for kind in ("avg", "max") for dims in SHAPE_OF_DIMENSIONS},
    **{f"adaptive_max_pool{dims}_with_indices": {"output_size": 2} for dims in SHAPE_OF_DIMENSIONS},
    **{f"max_unpool{dims}": {"indices": indices, "kernel_size": 2} for dims, indices in INDICES.items()},
    **{
        f"fractional_max_pool{dims}{suffix}": {
            "kernel_size": 2, "output_size": 3, "_random_samples": drawn(2, 4, len(SHAPE_OF_DIMENSIONS[dims]) - 2)
        }
        for dims in ("2d", "3d")
        for suffix in ("", "_with_indices")
    },
    **{f"conv{d}d": {"weight": drawn(3, 4, *(3,) * d)} for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": {"weight": drawn(4, 3, *(3,) * d)} for d in (1, 2, 3)},
    "affine_grid": {"size": [2, 3, 4, 4]},
    "batch_norm": {"running_mean": drawn(4), "running_var": drawn(4)},
    "bilinear": {"input2": drawn(4, 5), "weight": drawn(3, 6, 5)},
    "binary_cross_entropy": {"target": drawn(4, 6)},
    "binary_cross_entropy_with_logits": {"target": drawn(4, 6)},
    "channel_shuffle": {"groups": 2},
    "conv_tbc": {"weight": drawn(3, 8, 5), "bias": drawn(5)},
    "cosine_embedding_loss": {"input2": drawn(4, 6), "target": torch.ones(4)},
    "cosine_similarity": {"x2": drawn(4, 6)},
    "cross_entropy": {"target": LABELS},
    "ctc_loss": {
        "targets": LABELS[:2, None] + 1,
        "input_lengths": torch.tensor([6, 6]),
        "target_lengths": torch.tensor([1, 1]),
    },
    "embedding": {"weight": drawn(9, 5)},
    "embedding_bag": {"weight": drawn(9, 5)},
    "fold": {"output_size": 3, "kernel_size": 2},
    "gaussian_nll_loss": {"target": drawn(4, 6), "var": drawn(4, 6)},
    "grid_sample": {"grid": drawn(2, 5, 5, 2)},
    "group_norm": {"num_groups": 2},
    "hinge_embedding_loss": {"target": torch.ones(4, 6)},
    "huber_loss": {"target": drawn(4, 6)},
    "interpolate": {"scale_factor": 2},
    "kl_div": {"target": drawn(4, 6)},
    "l1_loss": {"target": drawn(4, 6)},
    "layer_norm": {"normalized_shape": (6,)},
    "linear": {"weight": drawn(3, 6)},
    "linear_cross_entropy": {"linear_weight": drawn(5, 6), "target": LABELS},
    "local_response_norm": {"size": 2},
    "margin_ranking_loss": {"input2": drawn(4, 6), "target": torch.ones(4, 6)},
    "mse_loss": {"target": drawn(4, 6)},
    "multi_head_attention_forward": {
        "key": drawn(4, 6), "value": drawn(4, 6), "embed_dim_to_check": 6, "num_heads": 2,
        "in_proj_weight": drawn(18, 6), "in_proj_bias": drawn(18), "bias_k": None, "bias_v": None,
        "add_zero_attn": False, "dropout_p": 0.0, "out_proj_weight": drawn(6, 6), "out_proj_bias": drawn(6),
    },
    "multi_margin_loss": {"target": LABELS},
    "multilabel_margin_loss": {"target": LABELS[:, None].repeat(1, 6)},
    "multilabel_soft_margin_loss": {"target": torch.ones(4, 6)},
    "native_channel_shuffle": {"groups": 2},
    "nll_loss": {"target": LABELS},
    "one_hot": {"num_classes": 9},
    "pad": {"pad": (1, 1)},
    "pairwise_distance": {"x2": drawn(4, 6)},
    "pixel_shuffle": {"upscale_factor": 2},
    "pixel_unshuffle": {"downscale_factor": 2},
    "poisson_nll_loss": {"target": drawn(4, 6)},
    "prelu": {"weight": drawn(1)},
    "rms_norm": {"normalized_shape": (6,)},
    "scaled_dot_product_attention": {"key": drawn(2, 4, 8), "value": drawn(2, 4, 8)},
    "smooth_l1_loss": {"target": drawn(4, 6)},
    "soft_margin_loss": {"target": torch.ones(4, 6)},
    "threshold": {"threshold": 0.5, "value": 0.0},
    "threshold_": {"threshold": 0.5, "value": 0.0},
    "triplet_margin_loss": {"positive": drawn(4, 6), "negative": drawn(4, 6)},
    "triplet_margin_with_distance_loss": {"positive": drawn(4, 6), "negative": drawn(4, 6)},
    "unfold": {"kernel_size": 2},
    "upsample": {"scale_factor": 2},
    "upsample_bilinear": {"scale_factor": 2},
    "upsample_nearest": {"scale_factor": 2},
}  # fmt: skip

INPUTS: dict[str, Tensor] = {
    **{f"max_unpool{dims}": drawn(*indices.shape) for dims, indices in INDICES.items()},
    **dict.fromkeys(("embedding", "embedding_bag", "one_hot"), LABELS[None]),
    "affine_grid": drawn(2, 2, 3),
    "conv_tbc": drawn(6, 2, 8),
    "ctc_loss": drawn(6, 2, 5).log_softmax(2),
    "fold": drawn(2, 12, 4),
    "local_response_norm": drawn(2, 4, 8),
    "upsample_bilinear": drawn(2, 4, 8, 8),
}
"""Inputs where the first shape that is taken isn't the right one."""

NO_TENSOR_FUNCTIONS = {
    "Optional": "from typing",
    "assert_int_or_pair": "checks an argument",
    "boolean_dispatch": "makes functions",
    "handle_torch_function": "of the override protocol",
    "has_torch_function": "of the override protocol",
    "has_torch_function_unary": "of the override protocol",
    "has_torch_function_variadic": "of the override protocol",
}

NOT_TRACED = {
    "grouped_mm": "takes no tensor in single precision",
    "scaled_addmm": "needs matrices of eight-bit numbers and an accelerator",
    "scaled_addmm_": "needs matrices of eight-bit numbers and an accelerator",
    "scaled_grouped_mm": "needs matrices of eight-bit numbers and an accelerator",
    "scaled_mm": "needs matrices of eight-bit numbers and an accelerator",
}

FUNCTIONS = sorted(
    name
    for name, value in vars(functional).items()
    if callable(value) and not isinstance(value, type) and not name.startswith("_") and name not in NO_TENSOR_FUNCTIONS
)


class Calls(nn.Module):
    """Calls functions the way a model does, by their names in ``torch.nn.functional``."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.extra = {name: EXTRA.get(name, {}) for name in names}
        self.errors: dict[str, Exception] = {}

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        results = {}
        for name, extra in self.extra.items():
            try:
                results[name] = getattr(functional, name)(inputs[name].clone(), **extra)
            except Exception as error:
                self.errors[name] = error
        return results


def example(name: str) -> Tensor:
    """An input that the function takes."""
    dims = next((dims for dims in SHAPE_OF_DIMENSIONS if dims in name), None)
    shapes = SHAPES if dims is None else [SHAPE_OF_DIMENSIONS[dims]]
    for x in [INPUTS[name]] if name in INPUTS else [drawn(*shape) for shape in shapes]:
        model = Calls([name])
        model({name: x})
        if not model.errors:
            return x
    raise model.errors[name]


@pytest.fixture(scope="module")
def traced() -> tuple[GraphModule, dict[str, Exception], dict[str, Any], dict[str, Any]]:
    """One trace of all functions, what failed in it, and what all give for other inputs, as they are and traced."""
    inputs = {name: example(name) for name in FUNCTIONS if name not in NOT_TRACED}
    model = Calls(inputs).eval()
    graph_module = concrete_trace(model, (inputs,))
    other = {name: x if name in INPUTS else x.flip(0) for name, x in inputs.items()}
    results = []
    for run in (Calls(inputs).eval(), graph_module):
        torch.manual_seed(0)
        results.append(run(other))
    return graph_module, model.errors, results[0], results[1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in NOT_TRACED])
def test_a_function_is_traced(name: str, traced: Any) -> None:
    graph_module, errors, expected, actual = traced
    if name in errors:
        raise errors[name]
    torch.testing.assert_close(actual[name], expected[name], equal_nan=True)
    output = next(node for node in graph_module.graph.nodes if node.op == "output")
    assert output.args[0][name].op.startswith("call_")


@pytest.mark.parametrize("name", sorted(NOT_TRACED.keys() & {*FUNCTIONS}))
def test_what_is_not_traced_has_no_example_here(name: str) -> None:
    with pytest.raises((RuntimeError, TypeError, ValueError, NotImplementedError)):
        example(name)


def test_every_function_is_known() -> None:
    in_newer_versions = {"linear_cross_entropy", *NOT_TRACED}
    assert {*EXTRA, *INPUTS, *NOT_TRACED} - {*FUNCTIONS} <= in_newer_versions
    assert len(FUNCTIONS) > 110
