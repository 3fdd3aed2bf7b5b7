"""Pipeline classes that are not run here, each with the reason. A test sees that every other one has a case."""

from __future__ import annotations

_UNET = "its transformer is a prior, and a UNet makes the picture"
_PRIOR = "a prior of one embedding: its transformer runs on a single vector"
_HELD = "its sound is encoded and decoded by models that are as large as the loop is small"

LEFT_OUT = {
    "AceStepPipeline": "its conditions are made by an encoder of its own",
    "Cosmos2_5_TransferPipeline": "reads its pictures with torchvision",
    "Cosmos3OmniPipeline": "its prompts are written by a tokenizer of its checkpoint",
    "HeliosPyramidPipeline": "its noise between stages needs larger pictures than a test has time for",
    "HunyuanDiTControlNetPipeline": "the same loop as HunyuanDiTPipeline",
    "HunyuanImageRefinerPipeline": "refines what another pipeline has made; the same loop as HunyuanImagePipeline",
    "JoyImageEditPlusPipeline": "its pictures are read by the processor of its checkpoint",
    "Kandinsky6SRPipeline": "tiles of a finished video, brought forward by a decoder",
    "Kandinsky6TI2VAPipeline": "its sound needs a vocoder",
    "KandinskyCombinedPipeline": _UNET,
    "KandinskyImg2ImgCombinedPipeline": _UNET,
    "KandinskyInpaintCombinedPipeline": _UNET,
    "KandinskyPriorPipeline": _PRIOR,
    "KandinskyV22CombinedPipeline": _UNET,
    "KandinskyV22Img2ImgCombinedPipeline": _UNET,
    "KandinskyV22InpaintCombinedPipeline": _UNET,
    "KandinskyV22PriorEmb2EmbPipeline": _PRIOR,
    "KandinskyV22PriorPipeline": _PRIOR,
    "LTX2DFRPipeline": "refines what another pipeline has made, in tiles",
    "LTX2DFRTemporalRefinePipeline": "refines what another pipeline has made, with an upsampler",
    "LTX2HDRPipeline": "needs the transform of its checkpoint",
    "LTX2ImageToVideoPipeline": "compresses its picture with PyAV",
    "LongCatImageEditPipeline": "its pictures are read by the processor of its checkpoint",
    "LongCatAudioDiTPipeline": _HELD,
    "OmniGenPipeline": "reads its pictures with torchvision",
    "RFD4ProteinaPipeline": "molecules: two schedulers, and tensors prepared by a package of its own",
    "SanaWMPipeline": "its cameras' paths are prepared by a package of its own",
    "ShapEImg2ImgPipeline": _PRIOR,
    "ShapEPipeline": _PRIOR,
    "StableAudio3AudioToAudioPipeline": _HELD,
    "StableAudio3InpaintPipeline": _HELD,
    "StableAudio3Pipeline": _HELD,
    "StableUnCLIPPipeline": _UNET,
    "UnCLIPPipeline": _UNET,
    "VQDiffusionPipeline": "denoises tokens of a codebook, without an ordinary scheduler",
    "VisualClozeGenerationPipeline": "a grid of pictures; the same loop as FluxFillPipeline",
    "VisualClozePipeline": "VisualClozeGenerationPipeline, and FluxFillPipeline after it",
    "WanAnimatePipeline": "its motions are encoded by the transformer itself, in segments of 77 frames",
    "ZImageOmniPipeline": "needs the vision model of its checkpoint",
}
