"""SpeechBrain: networks of ``speechbrain.lobes.models``, each built and called by the example in its docstring.

SpeechBrain's tests run these examples (``tests/.run-doctests.sh``). Listed is every class with such an example that no
other class of its module builds or inherits from, but for losses, norms and quantisers, which hold no layer.
"""

from __future__ import annotations

import contextlib
import importlib
from functools import partial

from benchmarks.packages.examples import Build, documented

NETWORKS = """
CRDNN.CRDNN Cnn14.Cnn14 Cnn14.CNN14PSI Cnn14.CNN14PSI_stft ContextNet.ContextNet DiffWave.DiffWave
DiffWave.DiffWaveDiffusion ECAPA_TDNN.ECAPA_TDNN ECAPA_TDNN.Classifier ESPnetVGG.ESPnetVGG EnhanceResnet.EnhanceResnet
FastSpeech2.FastSpeech2 FastSpeech2.FastSpeech2WithAlignment GatedNN.GatedNN HifiGAN.UnitHifiganGenerator
HifiGAN.HifiganDiscriminator L2I.Psi L2I.NMFDecoderAudio L2I.PsiOptimized L2I.Theta L2I.NMFEncoder L2I.CNN14PSI_stft
L2I.CNN14PSI_stft_2d MSTacotron2.Tacotron2 MetricGAN_U.EnhancementGenerator MetricGAN_U.MetricDiscriminator
PIQ.Conv2dEncoder_v2 PIQ.VectorQuantizedPSIFocalNet_Audio PIQ.VectorQuantizedPSIViT_Audio RNNLM.RNNLM ResNet.ResNet
ResNet.Classifier Tacotron2.Tacotron2 VanillaNN.VanillaNN Xvector.Xvector Xvector.Classifier Xvector.Discriminator
beats.BEATs conv_tasnet.Encoder conv_tasnet.Decoder conv_tasnet.MaskNet convolution.ConvolutionalSpatialGatingUnit
convolution.ConvolutionFrontEnd discrete.dac.DAC dual_path.FastTransformerBlock dual_path.PytorchTransformerBlock
dual_path.DPTNetBlock dual_path.SepformerWrapper dual_path.SBConformerEncoderBlock fairseq_wav2vec.FairseqWav2Vec1
fairseq_wav2vec.FairseqWav2Vec2 resepformer.MemLSTM resepformer.SegLSTM resepformer.SBTransformerBlock_wnormandskip
resepformer.ResourceEfficientSeparator transformer.Branchformer.BranchformerEncoder
transformer.Conformer.ConformerEncoder transformer.Conformer.ConformerDecoder
transformer.TransformerASR.TransformerASR transformer.TransformerASR.EncoderWrapper
transformer.TransformerLM.TransformerLM transformer.TransformerSE.CNNTransformerSE
transformer.TransformerST.TransformerST wav2vec.W2VLatentExtractor wav2vec.W2VTargetQuantiser wav2vec.EncoderWrapper
"""


def classes() -> dict[str, Build]:
    """Return what builds each class with its example."""
    listed: dict[str, Build] = {}
    for path in NETWORKS.split():
        module, _, name = path.rpartition(".")
        with contextlib.suppress(ImportError):  # here once for all processes, which are forked
            importlib.import_module(f"speechbrain.lobes.models.{module}")
        listed[path] = partial(documented, f"speechbrain.lobes.models.{module}", name)
    return listed
