"""What the gate asks for, and where each number comes from."""

from __future__ import annotations

FLOAT_SQNR_DB = 80.0
"""Float files differ from the network by the order of float32 sums alone: 117 to 130 dB on the five models of
docs/measured/files.md. A constant that is wrong in one of eight golden images by 1.5e-4 leaves 76 dB."""

QUANTIZED_SQNR_DB = 35.0
"""A value near the middle between two of 256 quantized integers may round to either: 48 dB below its range (20 log10
255), and what follows makes more of it."""

LOW_BIT_SQNR_DB = 20.0
"""With activations below 8 bits a rounding error of the last place moves some values by a whole coarse step."""

BF16_SQNR_DB = 25.0
"""What bfloat16 between int8 products leaves; unquantized bfloat16 has about 38 dB on ViT-S."""

MARGIN_DB = 3.0
"""A runtime's outputs and those of the simulation are each so far from the truth: two equal errors are 3 dB."""

AGREEMENT = 99.5
"""Percent of images with the same top-1 as before export: near ties flip. The least of the micro models in any runtime
is 99.66 (docs/measured/files.md)."""

NEIGHBOURS_KEPT = 0.99
"""Share of images whose nearest other image stays the same, near ties left aside: rounding moved 3 of 600 images of
Fashion-MNIST to another neighbour in vit_micro W8A8, all of them near ties."""

TIED_NOISE = 4.0
"""Of the change that rounding makes to a cosine or a logit, by which two may differ and still be tied: one in 15,000 of
a normal distribution is beyond four deviations."""

SAME_POINTS = 0.5
"""How far the metric may be, in points, from that at export or in ONNX Runtime on the same data: as much as all of the
images that AGREEMENT lets flip."""

FLOAT_MAX_DROP = 0.1
"""Points that a float file may lose: rounding flips next to no image, a wrong constant many."""

MAX_PIXEL_DIFFERENCE = 0.5
"""Grey levels, in the mean of an image: versions of Pillow round otherwise by less, another filter or crop by more."""

SURE_MARGIN = 0.05
"""Of the largest logit, by which the first class must lead the second for an image to be no near tie; or by
what TIED_NOISE says of the noise that is allowed, where that is more."""

SMALLEST_CHANGE = 1e-5
"""Of the largest output: golden outputs that differ by less do not depend on the image."""

BATCH_SIZES = (1, 3, 8)
"""At which golden outputs must be the same: one alone, an odd number, and one that fills the kernels' blocks."""

COMPARED_PICTURES = 64
"""Of annotated pictures, spread over the data, whose outputs are compared one by one: their maps take memory."""
