"""timm, and the detectors, segmenters and video networks of torchvision.

timm: of every module that ``timm.list_modules()`` names the entry point with the fewest parameters, where these are at
most five million, so that it is small as it stands; ``tests/test_models.py`` builds all entry points. torchvision: the
classes of ``torchvision.models.detection``, ``.segmentation`` and ``.video``, which ``test/test_models.py`` builds, on
small trunks, and each of the three builders of ``VideoResNet``.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.packages.examples import Build, Inputs, images

TIMM = """
byobnet.test_byobnet coat.coat_tiny convnext.test_convnext cspnet.cs3darknet_focus_s cspnext.cspnext_tiny dla.dla46x_c
edgenext.edgenext_xx_small efficientformer_v2.efficientformerv2_s0 efficientnet.test_efficientnet
efficientvit_mit.efficientvit_b0 efficientvit_msra.efficientvit_m0 fasternet.fasternet_t0 fastvit.fastvit_t8
ghostnet.ghostnet_050 iformer.iformer_t inception_next.inception_next_atto lcnetv2.lcnetv2_small
mambaout.test_mambaout maxxvit.test_coatnet mobilenetv3.mobilenetv3_small_050 mobilevit.mobilevit_xxs nfnet.test_nfnet
pit.pit_ti_224 pvt_v2.pvt_v2_b0 regnet.regnetx_002 repghost.repghostnet_050 resnet.test_resnet rexnet.rexnet_100
starnet.starnet_s050 swiftformer.swiftformer_xs vision_transformer.test_vit
vision_transformer_relpos.test_vit_relpos vovnet.ese_vovnet19b_slim_dw xcit.xcit_nano_12_p8_224
"""


def of_timm(name: str) -> tuple[nn.Module, Inputs]:
    """Return an entry point's network with two images of the size that it is meant for, of 96 at most if it may."""
    import timm

    network = timm.create_model(name, num_classes=10)
    entry = network.default_cfg
    size = entry["input_size"][-1]
    return network, images(3, size if entry.get("fixed_input_size") else min(size, 96))


def timm_classes() -> dict[str, Build]:
    """Return what builds each of timm's networks with its example."""
    import timm  # noqa: F401 -- once for all processes, which are forked

    return {path: partial(of_timm, path.partition(".")[2]) for path in TIMM.split()}


def detector(kind: str) -> tuple[nn.Module, Inputs]:
    """Return a detector on a small trunk with two images of 128 pixels."""
    from torchvision.models import detection, mobilenet_v2
    from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
    from torchvision.ops import MultiScaleRoIAlign

    sizes: dict[str, Any] = {"min_size": 128, "max_size": 160}
    if kind == "ssdlite320_mobilenet_v3_large":
        network: nn.Module = detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5)
    else:
        trunk: Any = mobilenet_v2(weights=None, width_mult=0.5).features[:-1]
        trunk.out_channels = 160  # which a norm of 32 groups can take
        anchors = AnchorGenerator(((16, 32, 64),), ((0.5, 1.0, 2.0),))
        if kind == "SSD":
            boxes = DefaultBoxGenerator([[2]])
            network = detection.ssd.SSD(trunk, boxes, (128, 128), 5, head=None)
        elif kind in ("FCOS", "RetinaNet"):
            if kind == "FCOS":
                anchors = AnchorGenerator(((16,),), ((1.0,),))
            network = getattr(detection, kind)(trunk, 5, anchor_generator=anchors, **sizes)
        else:
            pools = {"box_roi_pool": MultiScaleRoIAlign(["0"], 7, 2)}
            if kind == "MaskRCNN":
                pools["mask_roi_pool"] = MultiScaleRoIAlign(["0"], 14, 2)
            if kind == "KeypointRCNN":
                pools["keypoint_roi_pool"] = MultiScaleRoIAlign(["0"], 14, 2)
            network = getattr(detection, kind)(trunk, 5, rpn_anchor_generator=anchors, **sizes, **pools)
    return network, ([torch.rand(3, 128, 128), torch.rand(3, 128, 128)],)


def segmenter(kind: str) -> tuple[nn.Module, Inputs]:
    """Return a segmenter with two images of 64 pixels."""
    from torchvision.models import resnet18, segmentation
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead
    from torchvision.models.segmentation.fcn import FCNHead

    if kind == "LRASPP":
        return segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5), images(3, 64)
    trunk = IntermediateLayerGetter(resnet18(weights=None), {"layer3": "aux", "layer4": "out"})
    if kind == "FCN":
        network: nn.Module = segmentation.FCN(trunk, FCNHead(512, 5), FCNHead(256, 5))
    else:
        network = segmentation.DeepLabV3(trunk, DeepLabHead(512, 5))
    return network, images(3, 64)


def video(kind: str) -> tuple[nn.Module, Inputs]:
    """Return a network for films with two films of 8 frames of 64 pixels, for MViT of 32."""
    from torchvision.models import video as networks
    from torchvision.models.video.mvit import MSBlockConfig
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    films = torch.randn(2, 3, 8, 64, 64)
    if kind == "MViT":
        blocks = [
            MSBlockConfig(2, 16, 32, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2]),
            MSBlockConfig(4, 32, 32, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 1, 1]),
        ]
        return networks.MViT((32, 32), 8, blocks, True, False, False, False, num_classes=5), films[..., :32, :32]
    if kind == "SwinTransformer3d":
        return SwinTransformer3d([2, 4, 4], 16, [1, 1], [2, 4], [4, 4, 4], num_classes=5), films
    if kind == "S3D":
        return networks.S3D(5), torch.randn(1, 3, 13, 212, 212)  # its last pooling is as large
    return getattr(networks, kind)(weights=None, num_classes=5), films[:, :, :4]


def torchvision_classes() -> dict[str, Build]:
    """Return what builds each of torchvision's classes with its example."""
    import torchvision.models.detection  # noqa: F401 -- once for all processes, which are forked

    detectors = ("FCOS", "FasterRCNN", "KeypointRCNN", "MaskRCNN", "RetinaNet", "SSD", "ssdlite320_mobilenet_v3_large")
    films = ("MViT", "S3D", "SwinTransformer3d", "mc3_18", "r2plus1d_18", "r3d_18")
    return {
        **{f"detection.{kind}": partial(detector, kind) for kind in detectors},
        **{f"segmentation.{kind}": partial(segmenter, kind) for kind in ("DeepLabV3", "FCN", "LRASPP")},
        **{f"video.{kind}": partial(video, kind) for kind in films},
    }
