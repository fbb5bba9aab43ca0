"""MIRA-U in JAX: semi-supervised skin lesion segmentation. Start reading at main.py."""
