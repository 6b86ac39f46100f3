"""Convolutions data-parallel, linear layers model-parallel."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from fastcnn.train.distributed import OneProcess, World, linear_layers


class OneWeirdTrick(OneProcess):
    """The layout of Krizhevsky, "One weird trick for parallelizing convolutional neural networks", 2014.

    The features of the whole batch are gathered before the classifier. Each process computes some columns of every
    linear layer for the whole batch, and the columns are gathered after each layer. Dropout sees whole activations, so
    a common random stream gives the masks of a single process. Gradients of linear layers are not exchanged.
    """

    splits = True

    def __init__(self, model: nn.Module, world: World) -> None:
        super().__init__(model, world)
        plan: dict[str, ParallelStyle] = {
            f"classifier.{name}": ColwiseParallel(output_layouts=Replicate()) for name in linear_layers(model)
        }
        device = next(model.parameters()).device
        self._mesh = init_device_mesh(device.type, (world.size,))
        for layer in model.get_submodule("classifier").modules():
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # autograd forbids in-place writes to a DTensor's output
        parallelize_module(model, self._mesh, plan)
        model.get_submodule("classifier").register_forward_pre_hook(self._gather_batch)
        split = [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, split)
        self.module = DistributedDataParallel(model)
        self._count = 0

    def scores(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the scores of the whole batch, in every process."""
        self._count = len(labels)
        return self.module(images)

    def whole(self, state: Any) -> Any:
        """Gather what DTensors hold."""
        return tree_map(lambda value: value.full_tensor() if isinstance(value, DTensor) else value, state)

    def split_like(self, whole: Any, own: Any) -> Any:
        """Keep this process's part of a parameter, or of an optimizer's value for it."""
        if not isinstance(own, DTensor) or not isinstance(whole, Tensor) or whole.shape != own.shape:
            return whole
        return distribute_tensor(whole.to(own.device), own.device_mesh, own.placements)

    def _gather_batch(self, classifier: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        (features,) = inputs
        if features.requires_grad:
            features.register_hook(lambda gradient: gradient * self.world.size)  # DDP divides by it
        whole = torch.empty(self._count, *features.shape[1:], device="meta")
        parts = DTensor.from_local(
            features.contiguous(), self._mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
        )
        return parts.redistribute(placements=[Replicate()]).to_local()
