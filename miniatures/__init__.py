"""Small trained diffusion transformers of the real diffusers classes, for tests, the demo and benchmarks.

They are used from a clone of the repository; the installed package does not contain them.
"""

from .pipelines import call_kwargs, captions, load_miniature, to_frames
from .specs import NAMES

__all__ = ["NAMES", "call_kwargs", "captions", "load_miniature", "to_frames"]
