"""The names of the ways to run a convolution, and where each is to be had."""

# Ways to run a stage that begins with a convolution, and the backends that have them.
ALGORITHMS = {
    "epilogue": ("triton", "cuda", "cpu"),
    "implicit_gemm": ("triton", "cuda"),
    "direct": ("cuda",),
    "tma": ("triton",),
    "warp_specialized": ("triton",),
    "packed": ("triton",),
    "space_to_depth": ("triton",),
}
# Those that normalize images on their way.
JOINED = {"packed": ("triton",), "space_to_depth": ("triton",)}
# The convolution's own gradients that may be ours too: named after the algorithm and a plus, else they are torch's.
GRADIENTS = {"dgrad": ("triton",), "wgrad": ("triton",)}
# Algorithms and gradients with configurations, which are named after a colon: where `fastcnn/<backend>/` lists them.
CONFIGURED = {
    ("triton", "implicit_gemm"): ("convolution.implicit_gemm", "CONFIGS"),
    ("triton", "packed"): ("convolution.first_layers", "CONFIGS"),
    ("triton", "space_to_depth"): ("convolution.implicit_gemm", "CONFIGS"),
    ("triton", "dgrad"): ("convolution.dgrad", "CONFIGS"),
    ("triton", "wgrad"): ("convolution.wgrad", "CONFIGS"),
    ("triton", "tma"): ("convolution.hopper", "TMA"),
    ("triton", "warp_specialized"): ("convolution.hopper", "WARP_SPECIALIZED"),
}
