"""Train on several GPUs, or in several processes on the CPU: DistributedDataParallel, FSDP2 or DataParallel.

    torchrun --nproc-per-node 2 examples/train_distributed.py
    torchrun --nproc-per-node 2 examples/train_distributed.py --fsdp
    python examples/train_distributed.py    # one process: DataParallel over the GPUs that it sees

The batch is that of all processes together, so the losses are the same however many there are.
"""

import argparse
import os

import torch
import torch.distributed as dist
from images import image_folder
from small_net import SmallNet
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from torchvision import transforms
from torchvision.datasets import ImageFolder

import fastcnn


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train a small network in several processes.")
    parser.add_argument("--data", help="a folder with one folder a class (default: made-up images)")
    parser.add_argument("--batch-size", type=int, default=8, help="of all processes together")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--fsdp", action="store_true", help="shard the parameters too")
    return parser.parse_args(argv)


def distributed(model: nn.Module, fsdp: bool, device: torch.device) -> nn.Module:
    """Spread `model` over the processes; in a single one, over its GPUs."""
    if not dist.is_initialized():
        return nn.DataParallel(model)
    if not fsdp:
        return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    for part in (model.features, model.classifier, model):
        fully_shard(part, mesh=mesh)
    return model


def main(argv: list[str] | None = None) -> list[float]:
    """Train and return the loss of every batch, the mean over all processes."""
    args = arguments(argv)
    torch.manual_seed(0)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)

    crop = transforms.Compose([transforms.Resize(32), transforms.CenterCrop(32), transforms.ToTensor()])
    data = ImageFolder(args.data or image_folder(), crop)
    sampler = DistributedSampler(data, world, rank, seed=0)
    loader = DataLoader(data, args.batch_size // world, sampler=sampler)

    launched = "RANK" in os.environ  # by torchrun
    if launched:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    model = distributed(fastcnn.fuse(SmallNet(len(data.classes)).to(device)), args.fsdp, device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    losses = []
    for epoch in range(args.epochs):
        sampler.set_epoch(epoch)
        for images, labels in loader:
            loss = nn.functional.cross_entropy(model(images.to(device)), labels.to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            mean = loss.detach() / world
            if launched:
                dist.all_reduce(mean)
            losses.append(mean.item())
        if rank == 0:
            print(f"epoch {epoch}: loss {losses[-1]:.4f}")
    if launched:
        dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
