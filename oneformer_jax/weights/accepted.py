"""All that users may name as weights, for messages."""

FORMS = (
    "a workdir or one of its checkpoints/STEP, an official .pth or another file of weights, a "
    "Hugging Face folder, a model of the hub (OWNER/NAME or OWNER/NAME@REVISION), an https:// "
    "address, or a gs:// or s3:// path"
)
