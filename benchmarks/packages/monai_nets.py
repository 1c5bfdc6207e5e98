"""MONAI: what ``monai.networks.nets`` exports and ``tests/networks/nets`` builds.

Of classes that differ in their depth alone (DenseNet121 to 264, SEResNet50 to 152, SENet154) the base stands for all.
Blocks that the module exports for its networks' sake, such as ``ResNetBlock``, aren't networks and aren't listed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.packages.examples import Build, images

CHANNELS: dict[str, Any] = {"channels": (8, 16), "strides": (2, 2)}
DIFFUSION: dict[str, Any] = {
    "spatial_dims": 2,
    "in_channels": 1,
    "num_res_blocks": 1,
    "channels": (8, 16),
    "attention_levels": (False, True),
    "norm_num_groups": 8,
}
VIT: dict[str, Any] = {"in_channels": 1, "patch_size": 8, "hidden_size": 32, "mlp_dim": 64, "num_heads": 4}


def steps() -> Tensor:
    """Return the times of two samples."""
    return torch.tensor([5, 9])


def classes() -> dict[str, Build]:
    """Return what builds each class with its example."""
    from monai.networks import nets
    from monai.networks.nets.dints import TopologyInstance
    from monai.networks.nets.mednext import MedNeXt
    from monai.networks.nets.resnet import ResNetBlock
    from monai.networks.nets.segresnet_ds import SegResNetDS2
    from monai.networks.nets.senet import SEResNetBottleneck
    from monai.networks.nets.swin_unetr import SwinUNETR
    from monai.networks.nets.vista3d import ClassMappingClassify, PointMappingSAM

    def vista() -> Any:
        encoder = SegResNetDS2(init_filters=8, out_channels=8, blocks_down=(1, 1), norm="instance", dsdepth=1)
        return nets.VISTA3D(encoder, ClassMappingClassify(4, 8), PointMappingSAM(8, last_supported=2))

    return {
        "AHNet": lambda: (nets.AHNet(layers=(1, 1, 1, 1), spatial_dims=2), images(1, 128)),
        "AttentionUnet": lambda: (nets.AttentionUnet(2, 1, 2, **CHANNELS), images(1)),
        "AutoEncoder": lambda: (nets.AutoEncoder(2, 1, 1, **CHANNELS), images(1)),
        "AutoencoderKL": lambda: (nets.AutoencoderKL(**DIFFUSION, latent_channels=4), images(1)),
        "BasicUNet": lambda: (nets.BasicUNet(2, 1, 2, features=(8, 8, 16, 16, 32, 8)), images(1)),
        "BasicUNetPlusPlus": lambda: (nets.BasicUNetPlusPlus(2, 1, 2, features=(8, 8, 16, 16, 32, 8)), images(1)),
        "Classifier": lambda: (nets.Classifier((1, 32, 32), 4, **CHANNELS), images(1)),
        "ControlNet": lambda: (
            nets.ControlNet(**DIFFUSION, num_head_channels=8, conditioning_embedding_num_channels=(8, 8)),
            {"x": images(1), "timesteps": steps(), "controlnet_cond": images(1, 64)},
        ),
        "Critic": lambda: (nets.Critic((1, 32, 32), **CHANNELS), images(1)),
        "DAF3D": lambda: (nets.DAF3D(1, 1), images(1, 64, batch=1, dims=3)),
        "DecoderOnlyTransformer": lambda: (nets.DecoderOnlyTransformer(50, 16, 32, 2, 4), torch.randint(50, (2, 16))),
        "DenseNet": lambda: (nets.DenseNet(2, 1, 4, 16, 8, (2, 2)), images(1)),
        "DiNTS": lambda: (nets.DiNTS(TopologyInstance(channel_mul=0.2), 1, 3), images(1, 64, batch=1, dims=3)),
        "DiffusionModelUNet": lambda: (
            nets.DiffusionModelUNet(**DIFFUSION, out_channels=1, num_head_channels=8),
            {"x": images(1), "timesteps": steps()},
        ),
        "Discriminator": lambda: (nets.Discriminator((1, 32, 32), **CHANNELS), images(1)),
        "DynUNet": lambda: (nets.DynUNet(2, 1, 2, (3, 3, 3), (1, 2, 2), (2, 2), filters=(8, 16, 32)), images(1)),
        "EfficientNetBN": lambda: (nets.EfficientNetBN("efficientnet-b0", pretrained=False), images(3, 64)),
        "EfficientNetBNFeatures": lambda: (
            nets.EfficientNetBNFeatures("efficientnet-b0", pretrained=False),
            images(3, 64),
        ),
        "FlexibleUNet": lambda: (
            nets.FlexibleUNet(3, 2, "efficientnet-b0", decoder_channels=(32, 16, 16, 8, 8)),
            images(3, 64),
        ),
        "FullyConnectedNet": lambda: (nets.FullyConnectedNet(10, 3, [16, 32]), torch.randn(4, 10)),
        "Generator": lambda: (
            nets.Generator((16,), (8, 4, 4), channels=(16, 8, 1), strides=(2, 2, 1)),
            images(16, 1)[..., 0, 0],
        ),
        "GlobalNet": lambda: (nets.GlobalNet((32, 32), 2, 2, 8, 2), images(2)),
        "HighResNet": lambda: (nets.HighResNet(2, 1, 2), images(1)),
        "HoVerNet": lambda: (nets.HoVerNet(out_classes=3), images(3, 256, batch=1)),
        "HyenaNDUNETR": lambda: (
            nets.HyenaNDUNETR(1, 2, (True, True, True, True), feature_size=12, spatial_dims=2),
            images(1, 64),
        ),
        "LocalNet": lambda: (nets.LocalNet(2, 2, 8, (0, 1, 2)), images(2)),
        "MILModel": lambda: (
            nets.MILModel(3, pretrained=False, backbone="resnet18"),
            {"x": torch.randn(2, 3, 3, 32, 32)},
        ),
        "MaskedAutoEncoderViT": lambda: (
            nets.MaskedAutoEncoderViT(
                **VIT,
                img_size=32,
                num_layers=2,
                decoder_hidden_size=32,
                decoder_mlp_dim=64,
                decoder_num_layers=1,
                decoder_num_heads=4,
                spatial_dims=2,
            ),
            images(1),
        ),
        "MedNeXt": lambda: (
            MedNeXt(2, 8, blocks_down=(1, 1, 1, 1), blocks_up=(1, 1, 1, 1), blocks_bottleneck=1, kernel_size=3),
            images(1),
        ),
        "MultiScalePatchDiscriminator": lambda: (
            nets.MultiScalePatchDiscriminator(2, 2, spatial_dims=2, channels=8, in_channels=1, minimum_size_im=64),
            images(1, 64),
        ),
        "NaViT": lambda: (
            nets.NaViT(32, 8, 4, 32, 64, 2, 4, spatial_dims=2),
            {"batched_images": [[images(1)[0], images(1)[1]]]},
        ),
        "NetAdapter": lambda: (
            nets.NetAdapter(nets.ResNet(ResNetBlock, [1] * 4, [8, 8, 16, 16], 2, 3), 3, dim=2, pool=None),
            images(3),
        ),
        "PatchDiscriminator": lambda: (nets.PatchDiscriminator(2, 8, 1, num_layers_d=2), images(1)),
        "Quicknat": lambda: (nets.Quicknat(4, num_filters=8), images(1)),
        "RegUNet": lambda: (nets.RegUNet(2, 2, 8, 2), images(2)),
        "Regressor": lambda: (nets.Regressor((1, 32, 32), (3,), **CHANNELS), images(1)),
        "ResNet": lambda: (nets.ResNet(ResNetBlock, [1] * 4, [8, 16, 16, 32], 3, 1, num_classes=4), images(1, dims=3)),
        "ResNetFeatures": lambda: (
            nets.ResNetFeatures("resnet10", pretrained=False, spatial_dims=2),
            images(1, 64),
        ),
        "SENet": lambda: (nets.SENet(2, 3, SEResNetBottleneck, [1] * 4, 1, 8, inplanes=16, num_classes=4), images(3)),
        "SPADEAutoencoderKL": lambda: (
            nets.SPADEAutoencoderKL(**DIFFUSION, label_nc=3, latent_channels=4, spade_intermediate_channels=8),
            {"x": images(1), "seg": images(3)},
        ),
        "SPADEDiffusionModelUNet": lambda: (
            nets.SPADEDiffusionModelUNet(
                **DIFFUSION, out_channels=1, label_nc=3, num_head_channels=8, spade_intermediate_channels=8
            ),
            {"x": images(1), "timesteps": steps(), "seg": images(3)},
        ),
        "SPADENet": lambda: (
            nets.SPADENet(2, 1, 1, 3, [32, 32], [16, 8], is_vae=False, z_dim=8, spade_intermediate_channels=8),
            {"seg": images(3), "x": images(1)},
        ),
        "SegResNet": lambda: (nets.SegResNet(2, 8, blocks_down=(1, 1, 1), blocks_up=(1, 1)), images(1)),
        "SegResNetDS": lambda: (nets.SegResNetDS(2, 8, blocks_down=(1, 1, 1)), images(1)),
        "SegResNetDS2": lambda: (nets.SegResNetDS2(2, 8, blocks_down=(1, 1, 1)), {"x": images(1)}),
        "SegResNetVAE": lambda: (
            nets.SegResNetVAE((32, 32), vae_nz=16, spatial_dims=2, blocks_down=(1, 1, 1), blocks_up=(1, 1)),
            images(1),
        ),
        "SwinUNETR": lambda: (SwinUNETR(1, 2, depths=(1,) * 4, feature_size=12, spatial_dims=2), images(1, 64)),
        "TorchVisionFCModel": lambda: (nets.TorchVisionFCModel("resnet18", 3, use_conv=True, pool=None), images(3, 64)),
        "Transchex": lambda: (
            nets.Transchex(
                3, (32, 32), (8, 8), 3, 1, 1, 1, hidden_size=32, intermediate_size=64, num_attention_heads=4
            ),
            {"input_ids": torch.randint(2, (2, 8)), "vision_feats": images(3)},
        ),
        "UNETR": lambda: (
            nets.UNETR(1, 2, 32, feature_size=8, hidden_size=32, mlp_dim=64, num_heads=4, spatial_dims=2),
            images(1),
        ),
        "UNet": lambda: (nets.UNet(2, 1, 2, (8, 16, 32), (2, 2), num_res_units=1), images(1)),
        "VISTA3D": lambda: (
            vista(),
            {"input_images": images(1, 32, batch=1, dims=3), "class_vector": torch.tensor([1, 2])},
        ),
        "VNet": lambda: (nets.VNet(2, 1, 2, dropout_dim=2), images(1)),
        "VQVAE": lambda: (
            nets.VQVAE(
                2,
                1,
                1,
                channels=(16, 16),
                num_res_layers=1,
                num_res_channels=(16, 16),
                downsample_parameters=((2, 4, 1, 1),) * 2,
                upsample_parameters=((2, 4, 1, 1, 0),) * 2,
                num_embeddings=16,
                embedding_dim=16,
            ),
            images(1),
        ),
        "VarAutoEncoder": lambda: (
            nets.VarAutoEncoder(2, (1, 32, 32), 1, 8, use_mean_at_inference=True, **CHANNELS),
            images(1),
        ),
        "VarFullyConnectedNet": lambda: (
            nets.VarFullyConnectedNet(10, 10, 4, [16, 32], [32, 16], use_mean_at_inference=True),
            torch.randn(4, 10),
        ),
        "ViT": lambda: (nets.ViT(**VIT, img_size=32, num_layers=2, classification=True, spatial_dims=2), images(1)),
        "ViTAutoEnc": lambda: (
            nets.ViTAutoEnc(**{**VIT, "patch_size": 4}, img_size=32, num_layers=4, spatial_dims=2),
            images(1),
        ),
        "VoxelMorph": lambda: (
            nets.VoxelMorph(
                nets.VoxelMorphUNet(2, 2, 8, channels=(8, 8, 16, 16, 16, 16), final_conv_channels=(8,)), spatial_dims=2
            ),
            {"moving": images(1), "fixed": images(1)},
        ),
        "VoxelMorphUNet": lambda: (
            nets.VoxelMorphUNet(2, 2, 8, channels=(8, 8, 16, 16, 16, 16), final_conv_channels=(8,)),
            images(2),
        ),
    }
