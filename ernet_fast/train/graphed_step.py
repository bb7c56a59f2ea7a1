"""Forward and backward of a training step as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ernet_fast.models.cuda_graph import capture, check_on_cuda


class GraphedStep:
    """Loss and gradients of a batch by replaying one CUDA graph, instead of some thousand launches from Python.

    It pays where the CPU is what a step waits for: small batches, small images. Not yet run on a GPU.

        step = GraphedStep(network, nn.CrossEntropyLoss(), images, labels, dtype=torch.bfloat16)
        for images, labels in batches:                  # all of one shape: DataLoader(drop_last=True)
            loss, output = step(images, labels)         # replaces the gradients, as zero_grad and backward() would
            optimizer.step()

    Optimiser, schedule, clipping and averages stay outside, and work as ever; `Adam(..., fused=True)` is few launches.
    Random numbers of the network, as of dropout, go on from replay to replay. Parameters must stay where they are: move
    the network to its device, dtype and memory format before.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        images: Tensor,
        labels: Tensor,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Run the step a few times, undo that in the model's buffers, and capture it.

        Args:
            model: in training mode, on a CUDA device, its output a tensor.
            loss: from output and labels to a scalar, without a look at its values.
            images: of a batch, on that device; all batches have its shape, dtype and memory format.
            labels: likewise.
            dtype: of autocast (`torch.bfloat16`); None: none. Losses that are scaled (float16) need another step.

        Raises:
            ValueError: the model is in evaluation mode, or spread over processes (DistributedDataParallel).
            RuntimeError: something is not on one CUDA device.
        """
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise ValueError("GraphedStep takes the network itself, in one process; got a DistributedDataParallel.")
        if not model.training:
            raise ValueError("the model is in evaluation mode, and a training step is captured: call model.train().")
        check_on_cuda("GraphedStep needs network and batch", (images, labels, *model.parameters(), *model.buffers()))
        self.model, self._loss, self._dtype = model, loss, dtype
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._inputs = {"images": images.clone(), "labels": labels.clone()}
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

        def undo() -> None:
            for buffer, before in buffers:
                buffer.copy_(before)
            self._forget_gradients()  # so that the captured step allocates them, in the graph's own memory

        self._forget_gradients()
        self._graph, self._results = capture(self._step, images.device, undo)
        self._gradients = [p.grad for p in self._parameters]
        self._places = [p.data_ptr() for p in self._parameters]

    def _forget_gradients(self) -> None:
        for p in self._parameters:
            p.grad = None

    def _step(self) -> tuple[Tensor, Tensor]:
        with torch.autocast("cuda", self._dtype, enabled=self._dtype is not None):
            output = self.model(self._inputs["images"])
        loss = self._loss(output if self._dtype is None else output.float(), self._inputs["labels"])
        loss.backward()
        return loss.detach(), output.detach()

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss [] and output of a batch, new tensors; every parameter's `grad` is that of the loss.

        Raises:
            ValueError: shape or dtype are not those of the captured batch, or the model is in evaluation mode.
            RuntimeError: parameters have moved since the capture.
        """
        for (name, static), given in zip(self._inputs.items(), (images, labels), strict=True):
            if given.shape != static.shape or given.dtype != static.dtype:
                raise ValueError(
                    f"{name} must be {static.dtype} {list(static.shape)}, as in the captured step; got {given.dtype} "
                    f"{list(given.shape)}."
                )
        if not self.model.training:
            raise ValueError("the model is in evaluation mode, and its captured step is one of training.")
        if [p.data_ptr() for p in self._parameters] != self._places:
            raise RuntimeError("the parameters have moved since the capture: make a new GraphedStep.")
        for static, given in zip(self._inputs.values(), (images, labels), strict=True):
            static.copy_(given, non_blocking=True)
        self._graph.replay()
        for p, gradient in zip(self._parameters, self._gradients, strict=True):
            p.grad = gradient  # zero_grad(set_to_none=True) takes it away
        loss, output = self._results
        return loss.clone(), output.clone()
