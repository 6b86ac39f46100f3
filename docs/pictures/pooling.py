"""A pool of 3x3 windows with stride 2 after a ReLU: values, codes, and where the gradients go."""

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from docs.pictures.canvas import SMALL, Canvas, Theme
from fastcnn.shapes import RELU_OFF

# The convolution's output; the windows share the middle row and column.
VALUES = (
    (-1, 2, 0, -3, -2),
    (4, -2, -3, -1, -4),
    (1, 0, -5, -2, -1),
    (-2, 5, 1, -4, -3),
    (3, -1, 7, -6, 2),
)
SIZE, STRIDE = 3, 2
INCOMING = ((10, 20), (30, 40))
CELL = 0.34


def pooled() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the outputs, the codes, torch's indices, and the gradient of the convolution's output."""
    values = torch.tensor(VALUES, dtype=torch.float32, requires_grad=True)
    output, index = F.max_pool2d(F.relu(values)[None], SIZE, STRIDE, return_indices=True)
    output.backward(torch.tensor(INCOMING, dtype=torch.float32)[None])
    index, output = index[0], output[0]
    first = torch.arange(2) * STRIDE
    code = (index // 5 - first[:, None]) * SIZE + index % 5 - first
    assert values.grad is not None
    return output.int(), torch.where(output > 0, code, RELU_OFF), index, values.grad.int()


def codes(theme: Theme) -> Figure:
    """Draw the convolution's output, the pooled values, the codes and the gradients."""
    canvas = Canvas.of(theme, 7.6, 2.75)
    output, code, index, grad = (each.tolist() for each in pooled())
    windows = {(0, 0): theme.blue, (0, 1): theme.violet, (1, 0): theme.green, (1, 1): theme.orange}
    winners = {divmod(index[i][j], 5): colour for (i, j), colour in windows.items() if code[i][j] != RELU_OFF}
    x, y = 0.15, 0.55
    canvas.text(x, 0.3, "output of the convolution", align="left", size=SMALL, bold=True)
    canvas.numbers(x, y, VALUES, CELL, lambda i, j: winners.get((i, j)))
    for (i, j), colour in windows.items():
        shift = 0.02 * (1 + i + 2 * j)
        side = SIZE * CELL - 0.08
        canvas.outline(x + j * STRIDE * CELL + shift, y + i * STRIDE * CELL + shift, side, side, colour=colour)
    for title, rows, left in (("pooled", output, 2.45), ("codes", code, 3.75)):
        canvas.text(left, 0.72, title, align="left", size=SMALL, bold=True)
        canvas.numbers(left, 0.95, rows, 0.44, lambda i, j: windows[i, j])
    canvas.arrow((1.95, 1.4), (2.35, 1.4))
    canvas.text(
        3.75,
        2.05,
        f"place in the window,\n0 to 8; {RELU_OFF}: ReLU is off",
        align="left",
        size=SMALL,
        colour=theme.quiet,
    )
    canvas.text(2.45, 2.05, "max(0, …)", align="left", size=SMALL, colour=theme.quiet)
    canvas.arrow((4.75, 1.4), (5.55, 1.4))
    canvas.text(5.15, 1.18, "backward", size=SMALL, colour=theme.quiet)
    canvas.text(5.7, 0.3, "its gradient", align="left", size=SMALL, bold=True)
    canvas.numbers(5.7, y, grad, CELL, lambda i, j: winners.get((i, j)))
    canvas.text(5.7, 2.45, "for incoming 10, 20, 30, 40", align="left", size=SMALL, colour=theme.quiet)
    return canvas.figure
