"""TensorFlow-free TFDS builders of the lesion data sets: isic2016, ph2 and synthetic_lesions.

Importing a subpackage registers its builder with TFDS; `tfds_builders.build.prepare` does that by name. What they
write is plain TFDS (array_record files), so that reading it back needs TFDS alone.
"""
