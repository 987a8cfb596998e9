"""Configuration of one run: frozen, validated, the same dotted keys everywhere."""

from core.config.files import load_yaml as load_yaml
from core.config.files import merge as merge
from core.config.files import parse_overrides as parse_overrides
from core.config.network import DiffusionConfig as DiffusionConfig
from core.config.network import ModelConfig as ModelConfig
from core.config.network import Positive as Positive
from core.config.network import PositiveInt as PositiveInt
from core.config.network import SamplerConfig as SamplerConfig
from core.config.network import Section as Section
from core.config.schema import Config as Config
from core.config.schema import DatasetConfig as DatasetConfig
from core.config.schema import EvaluationConfig as EvaluationConfig
from core.config.schema import PrivacyConfig as PrivacyConfig
from core.config.schema import default_ledger as default_ledger
from core.config.schema import flatten as flatten
from core.config.schema import load as load
from core.config.schema import nested as nested
from core.config.schema import short_digest as short_digest
from core.config.schema import validate as validate
from core.config.stages import CentralImagesConfig as CentralImagesConfig
from core.config.stages import WarmUpConfig as WarmUpConfig
