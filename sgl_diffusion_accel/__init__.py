"""Makes diffusers' diffusion transformer pipelines several times faster, with one line."""

from sgl_diffusion_accel._version import __version__
from sgl_diffusion_accel.attention.attention_config import AttentionConfig
from sgl_diffusion_accel.attention.attention_patch import AttentionPatch
from sgl_diffusion_accel.attention.backends.registry import register_attention_backend
from sgl_diffusion_accel.attention.select import attention_backends, set_attention_backend
from sgl_diffusion_accel.auto.apply_auto import apply_auto
from sgl_diffusion_accel.auto.auto_config import AutoConfig
from sgl_diffusion_accel.auto.auto_patch import AutoPatch
from sgl_diffusion_accel.auto.checking.check_pipeline import check_pipeline
from sgl_diffusion_accel.auto.checking.pipeline_report import PipelineReport
from sgl_diffusion_accel.caching.adaptive import AdaptiveConfig, apply_adaptive_cache
from sgl_diffusion_accel.caching.apply_block_cache import BlockCacheConfig, apply_block_cache
from sgl_diffusion_accel.caching.cache_dit.apply_cache_dit import apply_cache_dit
from sgl_diffusion_accel.caching.cache_dit.cache_dit_config import CacheDiTConfig
from sgl_diffusion_accel.caching.cache_patch import CachePatch
from sgl_diffusion_accel.caching.magcache.apply_magcache import apply_magcache
from sgl_diffusion_accel.caching.magcache.magcache_config import MagCacheConfig
from sgl_diffusion_accel.caching.magcache.magnitudes import MagnitudeRatios
from sgl_diffusion_accel.caching.parts.masks import StepsMask
from sgl_diffusion_accel.caching.parts.policies import Decision, Policy, Position, Tally
from sgl_diffusion_accel.caching.parts.predictors import Predictor, Reuse, Taylor
from sgl_diffusion_accel.caching.parts.signals import HeadResidual, Seen, Signal
from sgl_diffusion_accel.caching.parts.stats import RunStats, Stats
from sgl_diffusion_accel.caching.teacache.apply_teacache import apply_teacache
from sgl_diffusion_accel.caching.teacache.coefficients import TeaCacheCoefficients
from sgl_diffusion_accel.caching.teacache.teacache_config import TeaCacheConfig
from sgl_diffusion_accel.calibration.apply_plan import PlanConfig, apply_cache_plan
from sgl_diffusion_accel.calibration.calibrate import calibrate
from sgl_diffusion_accel.calibration.check_plan import check_plan
from sgl_diffusion_accel.calibration.plan import CachePlan
from sgl_diffusion_accel.calibration.teacache_fit import fit_teacache
from sgl_diffusion_accel.calibration.tune_plan import tune_plan
from sgl_diffusion_accel.comparing.compare import compare
from sgl_diffusion_accel.comparing.comparison import ComparisonReport
from sgl_diffusion_accel.errors import (
    AccelError,
    ConfigError,
    ConfigTypeError,
    LosslessError,
    MissingPackageError,
    UnsupportedModelError,
    VariantError,
)
from sgl_diffusion_accel.loop.explicit import denoising_steps
from sgl_diffusion_accel.loop.named_branch import branch
from sgl_diffusion_accel.loop.runs import Run
from sgl_diffusion_accel.lossless.apply_lossless import apply_lossless
from sgl_diffusion_accel.lossless.lossless_config import LosslessConfig
from sgl_diffusion_accel.lossless.lossless_patch import LosslessPatch, LosslessStats
from sgl_diffusion_accel.lossless.padding.cuts import Trimmed
from sgl_diffusion_accel.patch import Patch, remove
from sgl_diffusion_accel.profiling.nsys import nsys_command
from sgl_diffusion_accel.profiling.profile import Profile, profile
from sgl_diffusion_accel.profiling.results.profile_report import ProfileReport

__all__ = [
    "AccelError",
    "AdaptiveConfig",
    "AttentionConfig",
    "AttentionPatch",
    "AutoConfig",
    "AutoPatch",
    "BlockCacheConfig",
    "CacheDiTConfig",
    "CachePatch",
    "CachePlan",
    "ComparisonReport",
    "ConfigError",
    "ConfigTypeError",
    "Decision",
    "HeadResidual",
    "LosslessConfig",
    "LosslessError",
    "LosslessPatch",
    "LosslessStats",
    "MagCacheConfig",
    "MagnitudeRatios",
    "MissingPackageError",
    "Patch",
    "PipelineReport",
    "PlanConfig",
    "Policy",
    "Position",
    "Predictor",
    "Profile",
    "ProfileReport",
    "Reuse",
    "Run",
    "RunStats",
    "Seen",
    "Signal",
    "Stats",
    "StepsMask",
    "Tally",
    "Taylor",
    "TeaCacheCoefficients",
    "TeaCacheConfig",
    "Trimmed",
    "UnsupportedModelError",
    "VariantError",
    "__version__",
    "apply_adaptive_cache",
    "apply_auto",
    "apply_block_cache",
    "apply_cache_dit",
    "apply_cache_plan",
    "apply_lossless",
    "apply_magcache",
    "apply_teacache",
    "attention_backends",
    "branch",
    "calibrate",
    "check_pipeline",
    "check_plan",
    "compare",
    "denoising_steps",
    "fit_teacache",
    "nsys_command",
    "profile",
    "register_attention_backend",
    "remove",
    "set_attention_backend",
    "tune_plan",
]
