"""The configuration of a run: what a user may write, its defaults, and reading it with overrides."""

from moesaic.nas.config.data import DataConfig
from moesaic.nas.config.load import Loaded, check_translates, load_config, load_retrain_file
from moesaic.nas.config.sections import (
    FEWEST_MEMBERS,
    ROWS,
    Config,
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
    "ROWS",
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
    "check_translates",
    "load_config",
    "load_retrain_file",
]
