"""What scripts do to a model works on a fused one as on a stock one, and leaves it fused where it can be."""

import copy
import importlib
import io
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from typing import Any

import pytest
import torch
import torch.distributed as dist
from swapped import BACKENDS, DEVICE, SMALL_NET, counted, exact_products, load, passes
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint_sequential

import fastcnn

FUSES = BACKENDS[DEVICE] != "auto"
SmallNet = load("small_net").SmallNet


@pytest.fixture(autouse=True)
def _kernels() -> Iterator[None]:
    with exact_products(), fastcnn.use_backend(BACKENDS[DEVICE]):
        yield


def batch(size: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def pair(change: Callable[[Any], Any] = lambda model: model) -> tuple[Any, Any]:
    """Return a small network fused, and the same on stock layers, both changed as a script does."""
    stock = SmallNet().to(DEVICE)
    return change(fastcnn.fuse(copy.deepcopy(stock))), change(stock)


def train(model: Any, run: Callable[[Tensor], Tensor] | None = None, steps: int = 3) -> list[Tensor]:
    """Train for a few steps and return the losses, then the weights and buffers."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    run = model if run is None else run
    losses = []
    for step in range(steps):
        loss = nn.functional.cross_entropy(run(batch(seed=step)), torch.tensor([0, 1, 0, 1], device=DEVICE))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*losses, *(value.clone() for value in model.state_dict().values())]


def assert_ran(operators: dict[str, int], expected: dict[str, int]) -> None:
    assert operators == (expected if FUSES else {})


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune"])
def test_compiled_training(mode: str) -> None:
    torch._dynamo.reset()
    fused, stock = pair()
    compiled = torch.compile(fused, mode=mode, fullgraph=True)
    torch.testing.assert_close(train(fused, compiled), train(stock))
    again, operators = counted(lambda: train(fused, compiled))
    torch.testing.assert_close(again, train(stock))
    if DEVICE == "cpu":  # where a CUDA graph is replayed, no operator is called
        assert_ran(operators, passes(SMALL_NET, forward=3, backward=3))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint_sequential(use_reentrant: bool) -> None:
    """It calls the children one by one; cut into slices that are fused, the features are checkpointed fused."""

    def by_children(model: Any) -> Callable[[Tensor], Tensor]:
        def run(images: Tensor) -> Tensor:
            images = images.requires_grad_()
            return model.classifier(
                checkpoint_sequential(model.features, 3, images, use_reentrant=use_reentrant).flatten(1)
            )

        return run

    def by_slices(model: Any) -> Callable[[Tensor], Tensor]:
        slices = list(map(fastcnn.fuse, (model.features[:4], model.features[4:7], model.features[7:])))

        def run(images: Tensor) -> Tensor:
            images = images.requires_grad_()
            return model.classifier(checkpoint_sequential(slices, 3, images, use_reentrant=use_reentrant).flatten(1))

        return run

    fused, stock = pair()
    expected = train(stock, by_children(stock))
    torch.testing.assert_close(train(copy.deepcopy(fused), None), expected)
    whole = copy.deepcopy(fused)
    torch.testing.assert_close(train(whole, by_children(whole)), expected)
    results, operators = counted(lambda: train(fused, by_slices(fused)))
    torch.testing.assert_close(results, expected)
    # All slices but the last run a second time.
    again = {"conv_relu": 3 * 3, "lrn_pool": 2 * 3, "conv_relu_pool": 2 * 3}
    assert_ran(operators, passes(SMALL_NET, forward=3, backward=3) | again)


def test_averaged_model_is_fused_and_its_own() -> None:
    def averaged(model: Any) -> list[Tensor]:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        for step in range(2):
            train(model, steps=step + 1)
            average.update_parameters(model)
        update_bn([batch()], average, device=DEVICE)
        assert average.module.features[0].weight is not model.features[0].weight
        with torch.no_grad():
            scores, operators = counted(lambda: average(batch()))
        ran.append(operators)
        return [scores, *average.state_dict().values()]

    ran: list[dict[str, int]] = []
    fused, stock = pair()
    torch.testing.assert_close(averaged(fused), averaged(stock))
    assert_ran(ran[0], passes(SMALL_NET, forward=1, backward=0))
    assert ran[1] == {}


def on_convolutions(wrap: Callable[[nn.Module], object]) -> Callable[[Any], Any]:
    def change(model: Any) -> Any:
        torch.manual_seed(1)  # spectral norm starts from random vectors
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                wrap(layer)
        return model

    return change


# A parametrized convolution is fused; the older norms compute the weight in a hook, which needs the layer's own call.
NORMS = {
    "weight_norm": (parametrizations.weight_norm, True),
    "spectral_norm": (parametrizations.spectral_norm, True),
    "older weight_norm": (nn.utils.weight_norm, False),
    "older spectral_norm": (nn.utils.spectral_norm, False),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize(("norm", "fuses"), NORMS.values(), ids=NORMS)
def test_normalized_weights_train_as_on_stock_layers(norm: Any, fuses: bool) -> None:
    """The vectors of spectral norm, which change with every look at the weight, are among what is compared."""
    fused, stock = pair(on_convolutions(norm))
    assert list(fused.state_dict()) == list(stock.state_dict())
    results, operators = counted(lambda: train(fused))
    torch.testing.assert_close(results, train(stock))
    lone = {"lrn_pool": 1, "max_pool": 1, "linear_relu": 1}
    assert_ran(operators, passes(SMALL_NET if fuses else lone, forward=3, backward=3))


def copies(tensors: list[Tensor], devices: list[int], detach: bool = False) -> list[list[Tensor]]:
    """Copy tensors once for each device, as `replicate` does, but to where they are."""
    return [[tensor.detach() if detach else tensor.clone() for tensor in tensors] for _ in devices]


def test_replicas_of_data_parallel_run_fused_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replicas hold plain tensors where a layer has parameters, and run each in a thread of its own."""
    module = importlib.import_module("torch.nn.parallel.replicate")
    monkeypatch.setattr(module, "_broadcast_coalesced_reshape", copies)
    monkeypatch.setattr(module, "_get_device_index", lambda device, _optional: device)

    def run(model: Any) -> Callable[[Tensor], Tensor]:
        def forward(images: Tensor) -> Tensor:
            with ThreadPoolExecutor(2) as threads:  # torch's parallel_apply, but for the GPUs
                replicas = nn.parallel.replicate(model, [0, 1])
                return torch.cat(list(threads.map(lambda replica, part: replica(part), replicas, images.chunk(2))))

        return forward

    fused, stock = pair()
    results, operators = counted(lambda: train(fused, run(fused)))
    torch.testing.assert_close(results, train(stock))
    # The profiler sees this thread, which runs the backwards of both replicas' kernels.
    assert_ran(operators, {f"{stage}_backward": times * 2 * 3 for stage, times in SMALL_NET.items()})


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(DEVICE != "cpu", reason="a group of gloo has no GPU tensors to shard")
@pytest.mark.parametrize("what", ["containers", "every layer"])
def test_fully_shard(what: str, one_process: None) -> None:
    """FSDP2 hangs hooks on what it shards: a container runs its layers fused, a layer that is sharded runs itself."""
    from torch.distributed.fsdp import fully_shard

    def run(model: Any) -> list[Tensor]:
        parts = [model.features, model.classifier]
        if what == "every layer":
            parts = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
        mesh = dist.init_device_mesh("cpu", (1,))
        for part in (*parts, model):
            fully_shard(part, mesh=mesh)
        return [value.full_tensor() if hasattr(value, "full_tensor") else value for value in train(model)]

    fused, stock = pair()
    expected = train(stock)
    results, operators = counted(lambda: run(fused))
    torch.testing.assert_close(results, expected)
    lone = {"lrn_pool": 1, "max_pool": 1}
    assert_ran(operators, passes(SMALL_NET if what == "containers" else lone, forward=3, backward=3))


def printed(call: Callable[[], object]) -> str:
    text = io.StringIO()
    with redirect_stdout(text):
        call()
    return text.getvalue()


@pytest.mark.parametrize("tool", ["torchinfo", "torchsummary"])
def test_summary_is_that_of_torchvisions_model(tool: str) -> None:
    summary = pytest.importorskip(tool).summary
    models = pytest.importorskip("torchvision.models")
    ours, theirs = fastcnn.alexnet(num_classes=2), models.alexnet(num_classes=2)
    if tool == "torchsummary":
        texts = [printed(lambda model=model: summary(model, (3, 64, 64), device="cpu")) for model in (ours, theirs)]
    else:
        texts = [str(summary(model, (2, 3, 64, 64), depth=3, device="cpu", verbose=0)) for model in (ours, theirs)]
    assert texts[0] == texts[1]
    assert "[-1, 64, 15, 15]" in texts[0] or "[2, 64, 15, 15]" in texts[0]


ATTRIBUTIONS = {
    "saliency": lambda attr, model: attr.Saliency(model).attribute(batch(), target=1),
    "layer Grad-CAM": lambda attr, model: attr.LayerGradCam(model, model.features[7]).attribute(batch(), target=1),
    "guided backprop": lambda attr, model: attr.GuidedBackprop(model).attribute(batch(), target=1),
    "guided Grad-CAM": lambda attr, model: attr.GuidedGradCam(model, model.features[4]).attribute(batch(), target=1),
    "DeepLift": lambda attr, model: attr.DeepLift(model).attribute(batch(), batch(seed=1), target=1),
    "layer activation": lambda attr, model: attr.LayerActivation(model, model.features[5]).attribute(batch()),
}


def not_in_place(model: Any) -> Any:
    """As captum asks."""
    for layer in model.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
    return model


@pytest.mark.filterwarnings("ignore:Setting .*backward hooks:UserWarning", "ignore:.*required_grads:UserWarning")
@pytest.mark.parametrize("name", ATTRIBUTIONS)
def test_captum_attributes_as_on_stock_layers(name: str) -> None:
    attr = pytest.importorskip("captum.attr")
    fused, stock = pair(not_in_place)
    found = ATTRIBUTIONS[name](attr, fused.eval())
    torch.testing.assert_close(found, ATTRIBUTIONS[name](attr, stock.eval()))
    assert found.abs().sum() > 0
    with torch.no_grad():
        _, operators = counted(lambda: fused(batch()))
    assert_ran(operators, passes(SMALL_NET, forward=1, backward=0))  # its hooks are gone


def test_grad_cam_of_the_example_is_captums() -> None:
    pytest.importorskip("captum")
    fused, _ = pair(not_in_place)
    example = load("grad_cam")
    theirs = example.captum_grad_cam(fused, fused.features[7], batch(1), 0)
    assert theirs.amax() > 0
    torch.testing.assert_close(example.grad_cam(fused, fused.features[7], batch(1), 0), theirs)


def test_onnx_of_a_fused_network(tmp_path: Any) -> None:
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    fused, _ = pair()
    fused.cpu().eval()
    path = str(tmp_path / "small.onnx")
    torch.onnx.export(fused, (batch().cpu(),), path, input_names=["images"], dynamo=True, verbose=False)
    (scores,) = reference.ReferenceEvaluator(path).run(None, {"images": batch().cpu().numpy()})
    with fastcnn.use_backend("auto"), torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(scores.copy()), fused(batch().cpu()))
