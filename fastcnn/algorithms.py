"""The names of the ways to run a convolution, and the backends that have each."""

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
# Those that can normalize images in the same kernel.
JOINED = {"packed": ("triton",), "space_to_depth": ("triton",)}
# The convolution's own gradients that our kernels compute if they are named after the algorithm and a plus.
GRADIENTS = {"dgrad": ("triton",), "wgrad": ("triton",)}
# Algorithms and gradients with configurations, named after a colon: the file in `fastcnn/<backend>/` and its list.
CONFIGURED = {
    ("triton", "implicit_gemm"): ("convolution.implicit_gemm", "CONFIGS"),
    ("triton", "packed"): ("convolution.first_layers", "CONFIGS"),
    ("triton", "space_to_depth"): ("convolution.implicit_gemm", "CONFIGS"),
    ("triton", "dgrad"): ("convolution.dgrad", "CONFIGS"),
    ("triton", "wgrad"): ("convolution.wgrad", "CONFIGS"),
    ("triton", "tma"): ("convolution.hopper", "TMA"),
    ("triton", "warp_specialized"): ("convolution.hopper", "WARP_SPECIALIZED"),
}
