"""PyTorch's side of the benchmark: the peer's step and how near its student comes to bare convolutions."""

import os
import time

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.remote import median_seconds, peak_memory
from benchmarks.setting import COMPARED, config_of, drawn_images
from benchmarks.torch_networks import GateSkip
from benchmarks.torch_step import Peer, last, supervised_loss


class TorchSide:
    """The peer's step of one setting (setting.py), with our parameters; in a process of its own."""

    def __init__(self, setting: dict, params: dict, *, steps: int, begin: int, device: str = "cpu"):
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
        self.setting, self.device, self.random = setting, torch.device(device), torch.Generator().manual_seed(0)
        host = drawn_images(setting["size"])
        image = torch.from_numpy(host["image"]).permute(0, 3, 1, 2)  # channels last underneath
        self.data = {"image": image.to(device), "mask": torch.from_numpy(host["mask"]).to(device)}
        self.peer = Peer(config_of(setting), params, steps=steps, device=device)
        self.peer.at, self.call = begin, self.peer.eager
        torch.backends.cudnn.benchmark = True  # shapes never change; XLA tunes its own

    def run(self, count: int, passes: str = "batched", eager: bool = False) -> float:
        """Seconds for `count` steps, input included; one pass at a time ("loop") is always eager, as published code is."""
        self.peer.passes, batch = passes, self.peer.config.train.batch
        self.peer.call = self.peer.eager if eager or passes == "loop" else self.call
        start = time.perf_counter()
        for _ in range(count):
            index = {
                which: torch.randint(len(self.data["mask"]), (batch,), generator=self.random)
                for which in ("labelled", "unlabelled")
            }
            measured = self.peer.step(self.data, index)
        loss = measured["loss"].item()  # waits for the device
        if loss != loss:
            raise FloatingPointError("the peer's loss is not finite")
        return time.perf_counter() - start

    def compile(self) -> float:
        """Switch torch.compile on, run two steps, and say how long that took."""
        start = time.perf_counter()
        self.peer.compile()
        self.call = self.peer.call
        self.run(2)
        return time.perf_counter() - start

    def eager(self):
        """Switch torch.compile off."""
        self.call = self.peer.eager

    def losses(self, example: dict) -> dict:
        """The losses of an example of ours (ours.Ours.example), by both forms of the passes: {form: {name: value}}."""
        config = config_of(self.setting | {"set": [*self.setting.get("set", ()), *COMPARED]})
        views = from_ours(example["views"], self.device)
        found = {}
        for passes in ("batched", "loop"):
            peer = Peer(
                config, example["params"], ema=example["ema"], steps=example["steps"], device=self.device, passes=passes
            )
            peer.at = example["step"]
            with torch.no_grad():
                found[passes] = {name: float(value) for name, value in peer.losses(**views).items()}
        return found

    def operations(self) -> int:
        """Products and convolutions of a whole step, each multiplication and addition counted.

        Attention as two products: torch has no formula for the form in which a CPU computes it.
        """
        kept, self.call = self.call, self.peer.eager
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            self.run(1)
        self.call = kept
        return counter.get_total_flops()

    def peak_memory(self) -> int:
        return peak_memory()

    # --- is it a fair opponent? ---------------------------------------------------------------------------------------

    def honesty(self, seconds: float) -> dict:
        """FLOP/s of the student's forward + backward pass and of its convolutions alone, same shapes, one after another.

        Both count what torch's own counter counts: products and convolutions.
        """
        student, size, b = self.peer.theta["student"], self.setting["size"], 2 * self.setting["batch"]
        image, mask = torch.rand(b, 3, size, size, device=self.device), torch.ones(b, size, size, device=self.device)
        image = last(image)

        def whole():
            student.zero_grad(set_to_none=True)
            supervised_loss(student(image), mask, self.peer.config.loss).backward()
            self.wait()

        stack = []  # (convolution, an input, the gradient of its output)

        def remember(part, given, out):
            x, slope = (last(torch.rand(t.shape, device=self.device)) for t in (given[0], out))
            stack.append((part, x.requires_grad_(x.shape[1] != 3), slope))  # nothing asks for the gradient of an image

        def remember_gate(part, given, out):  # its convolution is computed in two halves and never called
            remember(part.gate, [torch.cat(given, 1)], out)

        kinds = {nn.Conv2d: remember, nn.ConvTranspose2d: remember, GateSkip: remember_gate}
        hooks = [part.register_forward_hook(kinds[type(part)]) for part in student.modules() if type(part) in kinds]
        with torch.no_grad():
            student(image)
        for hook in hooks:
            hook.remove()

        def bare():
            for part, x, slope in stack:
                part.zero_grad(set_to_none=True)
                x.grad = None
                part(x).backward(slope)
            self.wait()

        rates = {}
        for name, call in (("student", whole), ("convolutions", bare)):
            with FlopCounterMode(display=False) as counter:
                call()
            rates[name] = counter.get_total_flops() / median_seconds(call, seconds=seconds)
        return {"student_flops_per_s": rates["student"], "convolutions_flops_per_s": rates["convolutions"],
                "share": rates["student"] / rates["convolutions"]}

    def wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak(self, seconds: float, side: int = 2048, megabytes: int = 256) -> dict:
        """As ours.Ours.peak."""
        a, x = torch.rand(side, side, device=self.device), torch.zeros(megabytes * 2**18, device=self.device)
        y = torch.empty_like(x)
        times = [median_seconds(lambda call=call: (call(), self.wait()), seconds=seconds) for call in (
            lambda: a @ a, lambda: torch.add(x, 1, out=y)
        )]
        return {"flops_per_s": 2 * side**3 / times[0], "bytes_per_s": 2 * 4 * x.numel() / times[1]}


def from_ours(views: dict, device="cpu") -> dict:
    """Views as our step makes them, channels last in NumPy, as Peer.losses takes them."""
    views = {name: torch.tensor(value, device=device) for name, value in views.items()}
    return {name: value.permute(0, 3, 1, 2) if value.ndim == 4 else value for name, value in views.items()}
