"""The configuration of a run: what a user may write, its defaults, and reading it with overrides."""

from moesaic.nas.config.load import Loaded, load_config, load_retrain_file
from moesaic.nas.config.sections import (
    FEWEST_MEMBERS,
    Config,
    DataConfig,
    DeviceConfig,
    ExecutorConfig,
    ExportConfig,
    FidelityConfig,
    LaneResources,
    LatencyConfig,
    LimitConfig,
    RetrainConfig,
    RetrainFile,
    SearchConfig,
    SupernetConfig,
    TrainConfig,
    TrainingConfig,
)

__all__ = [
    "FEWEST_MEMBERS",
    "Config",
    "DataConfig",
    "DeviceConfig",
    "ExecutorConfig",
    "ExportConfig",
    "FidelityConfig",
    "LaneResources",
    "LatencyConfig",
    "LimitConfig",
    "Loaded",
    "RetrainConfig",
    "RetrainFile",
    "SearchConfig",
    "SupernetConfig",
    "TrainConfig",
    "TrainingConfig",
    "load_config",
    "load_retrain_file",
]
