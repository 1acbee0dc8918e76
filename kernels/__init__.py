"""The Triton kernels: what runs on the device, and nothing that knows a model, a module or a plan.

==================  ====================================================================================
:mod:`.conv`        the implicit-GEMM main loop of the convolution
:mod:`.dgrad`       that of its input's gradient, every stride in one launch
:mod:`.wgrad`       that of its filters' gradient, split over the pixels
:mod:`.gradients`   functions applied to the gradient on load, and the ends of dgrad
:mod:`.boxes`       how a tile of pixels and a tile of filters is loaded: descriptors and masked pointers
:mod:`.prologues`   functions applied to the pixels on load
:mod:`.epilogues`   functions applied to the accumulator before the store
:mod:`.finish`      how the programs of a launch finish a reduction together
:mod:`.elementwise` the end of a residual block and its backward
:mod:`.pool`        max-pooling and its backward
:mod:`.pad`         a shortcut of option A: every second pixel, channels of zeros
==================  ====================================================================================

Importing this package imports Triton. :mod:`fused_resnet.backends.triton` is what starts the kernels.
"""
