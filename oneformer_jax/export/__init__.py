"""Models as files that run without this program's model code: StableHLO and ONNX.

`program` is what is exported, `stablehlo` and `onnx_model` are its two forms, `description` is what
both carry beside it.
"""
