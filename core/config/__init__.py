"""Configuration of one run: frozen, validated, the same dotted keys everywhere."""

from core.config.files import load_yaml, merge, parse_overrides
from core.config.network import (
    DiffusionConfig,
    ModelConfig,
    Positive,
    PositiveInt,
    SamplerConfig,
    Section,
)
from core.config.schema import (
    Config,
    DatasetConfig,
    EvaluationConfig,
    PrivacyConfig,
    default_ledger,
    flatten,
    load,
    nested,
    short_digest,
    validate,
)
from core.config.stages import CentralImagesConfig, WarmUpConfig

__all__ = [
    "CentralImagesConfig",
    "Config",
    "DatasetConfig",
    "DiffusionConfig",
    "EvaluationConfig",
    "ModelConfig",
    "Positive",
    "PositiveInt",
    "PrivacyConfig",
    "SamplerConfig",
    "Section",
    "WarmUpConfig",
    "default_ledger",
    "flatten",
    "load",
    "load_yaml",
    "merge",
    "nested",
    "parse_overrides",
    "short_digest",
    "validate",
]
