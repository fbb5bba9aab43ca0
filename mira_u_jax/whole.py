"""Files that are whole or not there."""

import os
import pathlib


def write(path, content: str | bytes):
    """Write a file under another name, then give it its own: whoever is cut off in between leaves what was there before.

    Makes the folder. Raises OSError.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)
