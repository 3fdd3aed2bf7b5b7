"""Takes the pictures, clips or latents out of whatever a pipeline returns, as one tensor."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sgl_diffusion_accel.errors import ConfigTypeError

_CHANNELS = (1, 3, 4)
_ROUNDING = 1e-3  # by so much may floats leave [0, 1] and still be pixels
_CLIP_FIELDS = ("frames", "videos", "video")

Decode = Callable[[Any], Any]


@dataclass(frozen=True)
class Media:
    """What one call of a pipeline returned.

    Attributes:
        values: `[B, F, C, H, W]` on the CPU, one frame for pictures: uint8 in 0 … 255, or floats. Packed latents that
            could not be unpacked are `[B, 1, 1, rows, columns]`.
        kind: `"pixels"` (uint8, or floats in [0, 1]), `"latents"` (floats of any range, in space), or `"rows"`
            (latents of which nobody knows where they are in space).
    """

    values: Tensor
    kind: Literal["pixels", "latents", "rows"]

    @property
    def is_clip(self) -> bool:
        """Whether there are several frames."""
        return self.values.shape[1] > 1

    @property
    def peak(self) -> float:
        """Range of the data: 1 for pixels (uint8 counts as 0 … 1), for latents their own maximum - minimum."""
        return 1.0 if self.kind == "pixels" else float(self.values.max() - self.values.min())


def read_output(
    output: Any, pipe: Any = None, arguments: Mapping[str, Any] | None = None, decode: Decode | None = None
) -> Media:
    """Reads pictures, clips or latents from the output of a pipeline.

    Understood are PIL pictures, NumPy arrays (channels last) and tensors (channels before height and width), batched or
    not, and lists of them, nested for clips; latents, and the packed ones of FLUX, Qwen-Image or LTX; all of it in
    an output object (its first field), in the tuple of `return_dict=False`, or alone.

    Args:
        output: What the pipeline returned.
        pipe: The pipeline, which tells how its latents are packed.
        arguments: The keyword arguments of the call: output type and size.
        decode: The user's own reader: from the output to anything of the above.

    Returns:
        One tensor, with what it holds.

    Raises:
        ConfigTypeError: There is nothing of the kind in the output.

    Example:
        >>> read_output((torch.zeros(2, 3, 8, 8),)).values.shape
        torch.Size([2, 1, 3, 8, 8])
    """
    arguments = arguments or {}
    if decode is not None:
        field, found = "", decode(output)
    else:
        field, found = _first_field(output)
    is_latent = decode is None and arguments.get("output_type") == "latent"
    if is_latent and isinstance(found, Tensor):
        return _latents(_plain(found), pipe, arguments)
    if field in _CLIP_FIELDS and isinstance(found, list) and found and hasattr(found[0], "getbands"):
        found = [found]  # one clip, as a list of its frames
    try:
        values = _batch(found)
        if not values.numel():
            raise ValueError("it is empty")
    except ValueError as error:
        raise ConfigTypeError(
            f"the output holds no pictures that compare understands ({_told(found)}: {error}). Give decode=, a "
            "function from the pipeline's output to pictures: tensors [B, 3, H, W] or [B, F, 3, H, W], arrays with the "
            "channels last, or PIL."
        ) from error
    return Media(values, "latents" if is_latent or not _is_unit(values) else "pixels")


def _first_field(output: Any) -> tuple[str, Any]:
    """The first field of an output object or tuple: pictures or frames come before all else in diffusers."""
    if isinstance(output, Mapping):
        return next(iter(output.items()), ("", None))
    if isinstance(output, tuple) and output:
        return "", output[0]
    return "", output


def _batch(found: Any) -> Tensor:
    """`[B, F, C, H, W]` of a batch."""
    if isinstance(found, (Tensor, np.ndarray)) and found.ndim >= 4:
        values = _channels_third_last(found)
        return values if values.ndim == 5 else values.unsqueeze(1)
    if isinstance(found, (list, tuple)):
        if not found:
            raise ValueError("it is empty")
        samples = [_sample(each) for each in found]
        shapes = {tuple(sample.shape) for sample in samples}
        if len(shapes) > 1:
            raise ValueError(f"pictures of several shapes, {sorted(shapes)}")
        return torch.stack(samples)
    return _sample(found).unsqueeze(0)


def _sample(found: Any) -> Tensor:
    """`[F, C, H, W]` of one picture or clip."""
    if isinstance(found, (list, tuple)) and found:
        frames = [_sample(each) for each in found]
        if len({frame.shape for frame in frames}) > 1:
            raise ValueError("frames of several shapes")
        return torch.cat(frames)
    if hasattr(found, "getbands"):  # PIL, which is never imported here
        picture = found if found.mode in ("L", "RGB", "RGBA") else found.convert("RGB")
        pixels = torch.from_numpy(np.array(picture))
        return (pixels.unsqueeze(-1) if pixels.ndim == 2 else pixels).movedim(-1, 0).unsqueeze(0)
    if isinstance(found, (Tensor, np.ndarray)):
        if found.ndim == 2:
            return _plain(found)[None, None]
        if found.ndim in (3, 4):
            values = _channels_third_last(found)
            return values if values.ndim == 4 else values.unsqueeze(0)
    raise ValueError(f"no picture in {type(found).__name__}")


def _channels_third_last(found: Any) -> Tensor:
    values = _plain(found)
    places: tuple[int, ...] = (-1, -3) if isinstance(found, np.ndarray) else (-3, -1)
    if values.ndim == 5:
        places = (*places, 1)
    for axis in places:
        if values.shape[axis] in _CHANNELS:
            return values.movedim(axis, -3)
    raise ValueError(f"no axis of {', '.join(map(str, _CHANNELS))} channels in {tuple(values.shape)}")


def _plain(found: Any) -> Tensor:
    """On the CPU, as uint8 or floats of 32 bits and more, in memory of its own."""
    values = torch.from_numpy(np.array(found)) if isinstance(found, np.ndarray) else found.detach().cpu().clone()
    if values.dtype in (torch.uint8, torch.float32, torch.float64):
        return values
    if values.is_floating_point():
        return values.float()
    if values.dtype == torch.bool:
        return values.float()
    return values.double() / torch.iinfo(values.dtype).max


def _is_unit(values: Tensor) -> bool:
    if values.dtype == torch.uint8:
        return True
    return bool((values >= -_ROUNDING).all()) and bool((values <= 1 + _ROUNDING).all())


def _latents(values: Tensor, pipe: Any, arguments: Mapping[str, Any]) -> Media:
    """Latents in space: `[B, C, H, W]`, `[B, C, F, H, W]`, `[B, F, C, H, W]` (CogVideoX) or packed, `[B, rows, C]`."""
    if values.ndim == 3:
        unpacked = _unpack(values, pipe, arguments)
        if unpacked is None:
            return Media(values[:, None, None], "rows")
        values = unpacked
    if values.ndim == 4:
        return Media(values.unsqueeze(1), "latents")
    if values.ndim == 5:
        known = _latent_channels(pipe)
        frames_first = values.shape[2] in known and values.shape[1] not in known
        return Media(values if frames_first else values.transpose(1, 2), "latents")
    return Media(values.reshape(values.shape[0] if values.ndim else 1, 1, 1, 1, -1), "rows")


def _latent_channels(pipe: Any) -> set[int]:
    parts = [getattr(pipe, name, None) for name in ("transformer", "vae")]
    names = ("in_channels", "out_channels", "z_dim", "latent_channels")
    found = (getattr(getattr(part, "config", None), name, None) for part in parts for name in names)
    return {size for size in found if isinstance(size, int)}


def _unpack(values: Tensor, pipe: Any, arguments: Mapping[str, Any]) -> Tensor | None:
    """Puts tokens back into place: by the pipeline's own function, else as a grid of the picture's proportions."""
    height, width = (_size(pipe, arguments, name) for name in ("height", "width"))
    if height is None or width is None:
        return None
    unpack = getattr(pipe, "_unpack_latents", None)
    wanted = ["latents", "height", "width", "vae_scale_factor"]
    if unpack is not None and list(inspect.signature(unpack).parameters) == wanted:
        try:
            unpacked: Tensor = unpack(values, height, width, pipe.vae_scale_factor)
        except RuntimeError:  # other tokens than those of the picture are among them
            return None
        return unpacked
    batch, rows, channels = values.shape
    frames = _latent_frames(pipe, arguments)
    high = math.isqrt(rows // frames * height // width) if rows % frames == 0 else 0
    wide = rows // frames // high if high else 0
    if high * wide * frames != rows or high * width != wide * height:
        return None
    return values.reshape(batch, frames, high, wide, channels).movedim(-1, 1)


def _size(pipe: Any, arguments: Mapping[str, Any], name: str) -> int | None:
    given = arguments.get(name) or getattr(pipe, "default_sample_size", 0) * getattr(pipe, "vae_scale_factor", 0)
    return given if isinstance(given, int) and given > 0 else None


def _latent_frames(pipe: Any, arguments: Mapping[str, Any]) -> int:
    frames, ratio = arguments.get("num_frames"), getattr(pipe, "vae_temporal_compression_ratio", None)
    return (frames - 1) // ratio + 1 if isinstance(frames, int) and isinstance(ratio, int) else 1


def _told(found: Any) -> str:
    if isinstance(found, (Tensor, np.ndarray)):
        return f"{type(found).__name__} of shape {tuple(found.shape)}"
    if isinstance(found, Sequence) and not isinstance(found, str) and found:
        return f"{type(found).__name__} of {type(found[0]).__name__}"
    return type(found).__name__
