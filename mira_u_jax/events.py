"""What metrics.jsonl and figures/ hold, for TensorBoard too: tensorboard --logdir=DIR/events. Needs no TensorFlow."""

import contextlib
import pathlib
import sys
import time

from PIL import Image


@contextlib.contextmanager
def without(module: str):
    """Imports of a module that is not there yet fail inside: None in sys.modules is Python's word for "not installed"."""
    absent = sys.modules.setdefault(module, None) is None
    try:
        yield
    finally:
        if absent:
            del sys.modules[module]


with without("torch"):  # tensorboardX imports it for tensors that we have none of: seconds of each start, a quarter of a GB
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.proto.summary_pb2 import Summary


class Events:
    """An event file of one stage in DIR/events/<stage>. After a resume TensorBoard forgets what lies beyond `step`.

    Written at once: tensorboardX's own SummaryWriter leaves it to a thread, and a run that ends loses its last lines.
    """

    def __init__(self, workdir, stage: str, *, step: int):
        folder = pathlib.Path(workdir) / "events" / stage
        folder.mkdir(parents=True, exist_ok=True)
        self.file = EventsWriter(str(folder / "events"))
        if step:
            self.write(step + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, split: str, values: dict):
        """One point of the curve <split>/<name> for each of `values`."""
        points = [Summary.Value(tag=f"{split}/{name}", simple_value=value) for name, value in values.items()]
        self.write(step, summary=Summary(value=points))

    def picture(self, step: int, name: str, path):
        """The PNG at `path` as image `name` of a step."""
        with Image.open(path) as image:
            width, height = image.size
        data = pathlib.Path(path).read_bytes()
        image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=data)
        self.write(step, summary=Summary(value=[Summary.Value(tag=name, image=image)]))

    def write(self, step: int, **what):
        self.file.write_event(Event(step=step, wall_time=time.time(), **what))
        self.file.flush()
