"""The graph of a model."""

from nni_topo.network.graph.nodes import (
    AS_NUMBERS,
    RANDOM,
    UNSHOWN,
    UNUSED,
    described,
    is_held,
    is_of_forward,
    line_of,
    makes_mask,
    on_modules,
    owner_of,
    place,
    plain_name,
    tensor_shape,
)
from nni_topo.network.graph.recording import put
from nni_topo.network.graph.submodules import is_in_parts
from nni_topo.network.graph.traced_int import (
    ON_NUMBERS,
    TracedInt,
    attribute_channels,
    fold_numbers,
    is_computed_of_attributes,
    resized,
)
from nni_topo.network.graph.tracing import Recording, arguments, layer_sizes, trace

__all__ = [
    "AS_NUMBERS",
    "ON_NUMBERS",
    "RANDOM",
    "UNSHOWN",
    "UNUSED",
    "Recording",
    "TracedInt",
    "arguments",
    "attribute_channels",
    "described",
    "fold_numbers",
    "is_computed_of_attributes",
    "is_held",
    "is_in_parts",
    "is_of_forward",
    "layer_sizes",
    "line_of",
    "makes_mask",
    "on_modules",
    "owner_of",
    "place",
    "plain_name",
    "put",
    "resized",
    "tensor_shape",
    "trace",
]
