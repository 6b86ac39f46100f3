"""The networks' own layers, on which the memory-bound kernels are counted: images, channels, height = width."""

# torchvision's AlexNet and the paper's at batch 128, VGG-16 at batch 64.
PLANES = {
    "AlexNet 55": (128, 64, 55),
    "AlexNet 27": (128, 192, 27),
    "AlexNet 13": (128, 384, 13),
    "VGG 224": (64, 64, 224),
    "VGG 28": (64, 512, 28),
    "VGG 14": (64, 512, 14),
}
# With the side of the windows, at a stride of two.
POOLED = {
    "AlexNet 55": ((128, 64, 55), 3),
    "AlexNet 27": ((128, 192, 27), 3),
    "VGG 224": ((64, 64, 224), 2),
    "VGG 28": ((64, 512, 28), 2),
}
NORMED = {"paper 55": (128, 96, 55), "paper 27": (128, 256, 27)}
BATCH_NORMED = {"VGG 224": (64, 64, 224), "VGG 28": (64, 512, 28)}
