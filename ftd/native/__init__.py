"""The ConvNet's derivatives on CPU, by hand: several times as fast as autograd, in less memory.

``kernels.c`` holds what layers do to memory, ``library`` compiles it once a machine, ``chunks``
cuts a batch, ``convolution`` and ``convnet`` are the network forwards and backwards.
"""

from ftd.native.convnet import NativeGradients
from ftd.native.library import unavailable

__all__ = ["NativeGradients", "unavailable"]
