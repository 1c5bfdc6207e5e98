"""segmentation_models_pytorch: all classes that it exports; ``tests/models`` builds each."""

from __future__ import annotations

from typing import Any

from benchmarks.packages.examples import Build, images


def classes() -> dict[str, Build]:
    """Return what builds each class with its example."""
    import segmentation_models_pytorch as smp

    small: dict[str, Any] = {"encoder_name": "mobilenet_v2", "encoder_weights": None, "classes": 2}
    steps: dict[str, Any] = {"decoder_channels": (32, 32, 16, 16, 8)}
    return {
        "DPT": lambda: (
            smp.DPT("tu-vit_tiny_patch16_224", encoder_weights=None, classes=2, dynamic_img_size=True),
            images(3, 64),
        ),
        "DeepLabV3": lambda: (smp.DeepLabV3(**small, decoder_channels=32), images(3, 64)),
        "DeepLabV3Plus": lambda: (smp.DeepLabV3Plus(**small, decoder_channels=32), images(3, 64)),
        "FPN": lambda: (smp.FPN(**small, decoder_pyramid_channels=32, decoder_segmentation_channels=32), images(3, 64)),
        "Linknet": lambda: (smp.Linknet(**small), images(3, 64)),
        "MAnet": lambda: (smp.MAnet(**small, **steps, decoder_pab_channels=16), images(3, 64)),
        "PAN": lambda: (smp.PAN(**small), images(3, 128)),
        "PSPNet": lambda: (smp.PSPNet(**small, psp_out_channels=32), images(3, 64)),
        "Segformer": lambda: (smp.Segformer(**small, decoder_segmentation_channels=32), images(3, 64)),
        "UPerNet": lambda: (smp.UPerNet(**small, decoder_channels=32), images(3, 64)),
        "Unet": lambda: (smp.Unet(**small, **steps), images(3, 64)),
        "UnetPlusPlus": lambda: (smp.UnetPlusPlus(**small, **steps), images(3, 64)),
    }
