"""Registers the TFDS data set `isic2016`."""

from tfds_builders.isic2016.isic2016_dataset_builder import Builder

__all__ = ["Builder"]
