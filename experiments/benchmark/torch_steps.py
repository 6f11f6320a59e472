"""The torch peer: the same step as users of PyTorch write it.

  authors   the published code's way: the teachers are in eval mode, but nothing keeps autograd out,
            so that the backward pass also runs through them
  eager     no_grad, channels_last, the teachers' BatchNorm fused into their convolutions
  compiled  torch.compile of that; with CUDA graphs on a GPU

Each takes its batches ready on the device, normalised: unlike ours, no gathering is counted.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

try:
    import torch
    from torch import Tensor, nn
    from torch.nn import functional as F
except ModuleNotFoundError as error:
    from experiments.benchmark.cases import Unavailable

    raise Unavailable("torch is not installed") from error

from experiments.benchmark import cases, torch_networks
from experiments.benchmark.cases import Case


def network(name: str, seed: int) -> nn.Module:
    """A network with the weights of `seed`."""
    built = torch_networks.build(name, cases.CLASSES)
    wanted = {
        key: tuple(value.shape)
        for key, value in built.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    drawn = cases.state_dict(list(wanted.items()), seed)
    built.load_state_dict({k: torch.from_numpy(v) for k, v in drawn.items()}, strict=False)
    return built


def distillation(logits: Tensor, labels: Tensor, teacher_logits: list[Tensor]) -> Tensor:
    """(1-λ) CE + λ T² Σ KL, or the cross-entropy alone where there are no teachers."""
    ce = F.cross_entropy(logits, labels)
    if not teacher_logits:
        return ce
    log_probs = F.log_softmax(logits / cases.TEMPERATURE, 1)
    kl = sum(
        F.kl_div(log_probs, F.softmax(taught / cases.TEMPERATURE, 1), reduction="batchmean")
        for taught in teacher_logits
    )
    return (1 - cases.KD_WEIGHT) * ce + cases.KD_WEIGHT * cases.TEMPERATURE**2 * kl


def evolution(exits: tuple[list[Tensor], list[Tensor]], labels: Tensor) -> Tensor:
    """TESKD's loss with its authors' weights."""
    logits, features = exits
    temperature = 4.0
    loss = 0.2 * sum(F.cross_entropy(one, labels) for one in logits)
    target = F.softmax(logits[0] / temperature, 1) + 1e-7
    own = features[0].detach()
    for one, feature in zip(logits[1:], features[1:], strict=True):
        log_probs = F.log_softmax(one / temperature, 1)
        kl = F.kl_div(log_probs, target, reduction="batchmean")
        near = ((feature > 0) | (own > 0)).float()
        loss = loss + 0.8 * temperature**2 * kl + 1e-7 * ((feature - own) ** 2 * near).sum()
    return loss


class TorchStep:
    """Training steps of the peer."""

    compile_seconds = 0.0  # not told apart from the first step
    flops = 0.0

    def __init__(self, case: Case):
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
        self.cuda = torch.cuda.is_available()
        self.place = torch.device("cuda" if self.cuda else "cpu")
        self.device = torch.cuda.get_device_name() if self.cuda else "cpu"
        self.half = case.dtype == "bfloat16"
        self.evolving = case.student.startswith("evolving:")
        fast = case.variant != "authors"
        layout = torch.channels_last if fast else torch.contiguous_format
        nets = [
            network(name, seed).to(self.place).to(memory_format=layout)
            for name, seed in zip((case.student, *case.teachers), cases.seeds(case), strict=True)
        ]
        self.student, self.teachers = nets[0].train(), [net.eval() for net in nets[1:]]
        if fast:
            self.teachers = [frozen(net, self.half) for net in self.teachers]
        self.keep_out = torch.no_grad if fast else contextlib.nullcontext
        self.optimizer = torch.optim.SGD(
            self.student.parameters(),
            cases.LEARNING_RATE,
            cases.MOMENTUM,
            weight_decay=cases.WEIGHT_DECAY,
            foreach=(fast and not self.cuda) or None,
            fused=(fast and self.cuda) or None,
        )
        resident = cases.images(case.resident), cases.labels(case.resident)
        self.batches = [
            self._batch(resident[0][rows], resident[1][rows], layout)
            for rows in cases.order(case, cases.EXAMPLES)
        ]
        self.loss: Any = self._loss
        if case.variant == "compiled":
            self.loss = torch.compile(self._loss, mode="reduce-overhead" if self.cuda else None)
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def _batch(
        self, images: np.ndarray, labels: np.ndarray, layout: torch.memory_format
    ) -> tuple[Tensor, Tensor]:
        pixels = images.astype(np.float32) / 255
        normalised = (pixels - np.asarray(cases.MEAN, np.float32)) / np.asarray(
            cases.STD, np.float32
        )
        nchw = torch.from_numpy(normalised).permute(0, 3, 1, 2).contiguous(memory_format=layout)
        return nchw.to(self.place), torch.from_numpy(labels).long().to(self.place)

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(self.place.type, torch.bfloat16, enabled=self.half):
            with self.keep_out():
                taught = [teacher(images) for teacher in self.teachers]
            outputs = self.student(images)
        if self.evolving:
            exits = [[one.float() for one in part] for part in outputs]
            return evolution((exits[0], exits[1]), labels)
        return distillation(outputs.float(), labels, [one.float() for one in taught])

    def run(self, steps: int) -> float:
        """The loss of the last of `steps` steps."""
        for step in range(steps):
            images, labels = self.batches[step % len(self.batches)]
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.loss(images, labels)
            loss.backward()
            self.optimizer.step()
        if self.cuda:
            torch.cuda.synchronize()
        return float(loss.detach())

    def peak_bytes(self) -> int:
        """Of the GPU's memory; 0 on the CPU, where the process's is meant."""
        return torch.cuda.max_memory_allocated() if self.cuda else 0


def frozen(net: nn.Module, half: bool) -> nn.Module:
    """A teacher with its BatchNorm fused into its convolutions, in half precision where asked."""
    from torch.fx.experimental import optimization

    fused = optimization.fuse(net).requires_grad_(False).to(memory_format=torch.channels_last)
    return fused.to(torch.bfloat16) if half else fused


def build(case: Case) -> TorchStep:
    """The step of a case."""
    return TorchStep(case)
