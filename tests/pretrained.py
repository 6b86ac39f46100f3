"""A small network with pretrained weights, as torchvision registers them, and a server of files on this machine."""

import contextlib
import functools
import hashlib
import http.server
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision import models
from torchvision.models import Weights, WeightsEnum
from torchvision.models._api import register_model
from torchvision.transforms._presets import ImageClassification
from training_processes import TinyAlexNet

CATEGORIES = ["tabby", "tiger cat", "[b]wire[/b] fox terrier", "ostrich", "hen"]
TRANSFORMS = functools.partial(ImageClassification, crop_size=16, resize_size=18)


class TinyAlexNet_Weights(WeightsEnum):
    IMAGENET1K_V1 = Weights("tiny_alexnet", TRANSFORMS, {"categories": CATEGORIES})
    IMAGENET1K_FEATURES = Weights("tiny_features", TRANSFORMS, {"categories": None})
    DEFAULT = IMAGENET1K_V1


@register_model("tiny_alexnet")
def tiny_alexnet(*, weights: TinyAlexNet_Weights | None = None, progress: bool = True, **kwargs: Any) -> TinyAlexNet:
    return TinyAlexNet(**kwargs)


def tiny_state() -> dict[str, Tensor]:
    torch.manual_seed(7)
    return TinyAlexNet(num_classes=len(CATEGORIES)).state_dict()


class Hub:
    """What is published, what was asked for, and where downloads go."""

    def __init__(self, home: Path, port: int) -> None:
        self.home, self.checkpoints = home, home / "hub" / "checkpoints"
        self.root = f"http://127.0.0.1:{port}"
        self.files: dict[str, tuple[bytes, int]] = {}  # what is sent, and how much is announced
        self.asked: list[str] = []
        self.urls: dict[Any, str] = {}

    def publish(self, weights: Any, state: Any, damage: str = "") -> Path:
        """Offer a state dict under a name with its hash; return the file that a download makes."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getvalue()
        name = f"{type(weights).__name__.lower()}-{hashlib.sha256(content).hexdigest()[:8]}.pth"
        sent = {"changed": content[:-1] + b"x", "cut": content[:-100]}.get(damage, content)
        if damage != "missing":
            self.files[f"/{name}"] = (sent, len(content))
        self.urls[weights] = f"{self.root}/{name}"
        return self.checkpoints / name


@contextlib.contextmanager
def serving(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Stand in for the network, and for the user's folder of downloads."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.asked.append(self.path)
            if self.path not in hub.files:
                self.send_error(404)
                return
            content, announced = hub.files[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(announced))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub = Hub(home, server.server_port)
    monkeypatch.setenv("TORCH_HOME", str(hub.home))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(models.WeightsEnum, "url", property(hub.urls.__getitem__))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
