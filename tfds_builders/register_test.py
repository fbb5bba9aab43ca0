"""One import makes the data sets known to TFDS by name."""

import subprocess
import sys

CODE = """
import sys
import tensorflow_datasets as tfds
import tfds_builders
for name in ("isic2016", "ph2", "synthetic_lesions"):
    builder = tfds.builder(name, data_dir=sys.argv[1])
    print(builder.info.full_name, builder.info.features["label_rank"].shape)
assert "tensorflow" not in sys.modules
"""


def test_an_import_registers_all_three(tmp_path):
    done = subprocess.run([sys.executable, "-c", CODE, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{n}/256px/1.0.0 (8,)" for n in ("isic2016", "ph2", "synthetic_lesions")]
