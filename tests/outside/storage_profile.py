"""An execution profile from outside the package, in one row: int8 weights as storage, everything computed in float."""

from leanvit.export.onnx.profiles import Profile, register

STORAGE = register(Profile("int8-storage", weights="int8", linears="float", convolutions="float", fused_products=False))
