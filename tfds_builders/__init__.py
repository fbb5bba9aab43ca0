"""TensorFlow-free TFDS builders of the lesion data sets: isic2016, ph2 and synthetic_lesions.

`import tfds_builders` registers them with TFDS, so that `tfds.data_source("isic2016", split="train")` works. What they
write is plain TFDS (array_record files), so that reading it back needs TFDS alone.
"""

from tfds_builders import isic2016, ph2, synthetic_lesions

__all__ = ["isic2016", "ph2", "synthetic_lesions"]
