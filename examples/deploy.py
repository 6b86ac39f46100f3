"""Take AlexNet out of Python: weights as safetensors, the network by torch.export and as ONNX.

    python examples/deploy.py --weights DEFAULT --size 224 --output deployed

Only the import of `alexnet` differs from a script for torchvision's model. The exported graphs hold torch's own
operators and run without fastcnn. Needs safetensors, onnx and onnxscript.
"""

import argparse
import tempfile
from pathlib import Path

import onnx.reference
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor

from fastcnn import alexnet


def main(argv: list[str] | None = None) -> dict[str, Tensor]:
    """Write the three files, read each back, and return the scores that it gives."""
    parser = argparse.ArgumentParser(description="Take AlexNet out of Python.")
    parser.add_argument("--weights", help="torchvision's weights, as DEFAULT (default: random)")
    parser.add_argument("--size", type=int, default=64, help="of the images, in pixels a side")
    parser.add_argument("--output", help="a folder for the files (default: one that is deleted again)")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    model = alexnet(weights=args.weights).eval()
    images = torch.randn(2, 3, args.size, args.size)
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        folder = Path(args.output or temporary)
        folder.mkdir(exist_ok=True)
        scores = {"alexnet": model(images)}

        save_model(model, str(folder / "alexnet.safetensors"))
        again = alexnet().eval()
        load_model(again, str(folder / "alexnet.safetensors"))
        scores["safetensors"] = again(images)

        batch = torch.export.Dim("batch")
        program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
        torch.export.save(program, folder / "alexnet.pt2")
        scores["torch.export"] = torch.export.load(folder / "alexnet.pt2").module()(images)

        torch.onnx.export(program, (), folder / "alexnet.onnx", input_names=["images"], output_names=["scores"])
        session = onnx.reference.ReferenceEvaluator(str(folder / "alexnet.onnx"))
        scores["onnx"] = torch.from_numpy(session.run(None, {"images": images.numpy()})[0].copy())
    for name, found in scores.items():
        print(f"{name:12} differs from the model by at most {(found - scores['alexnet']).abs().max():.2g}")
    return scores


if __name__ == "__main__":
    main()
