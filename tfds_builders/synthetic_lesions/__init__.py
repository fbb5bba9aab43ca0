"""Registers the TFDS data set `synthetic_lesions`."""

from tfds_builders.synthetic_lesions.synthetic_lesions_dataset_builder import Builder

__all__ = ["Builder"]
