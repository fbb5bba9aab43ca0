"""Registers the TFDS data set `ph2`."""

from tfds_builders.ph2.ph2_dataset_builder import Builder

__all__ = ["Builder"]
