"""Data sets prepared once: shards written from a COCO folder, then read by index or streamed."""

from collavo.prepared.read import PreparedDataset, PreparedSample
from collavo.prepared.shards import PrepareSettings
from collavo.prepared.streaming import SampleStream, SkipLog
from collavo.prepared.write import PrepareReport, prepare_folder

__all__ = [
    "PrepareReport",
    "PrepareSettings",
    "PreparedDataset",
    "PreparedSample",
    "SampleStream",
    "SkipLog",
    "prepare_folder",
]
