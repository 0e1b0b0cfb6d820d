"""Weights of other programs: reading and writing their files, names and architectures.

fetch.py          names that users give: a path, a model of the hub, an address
download.py       files from the web and from buckets, in the user's cache
hub.py            models of the Hugging Face hub: fetched and pushed
card.py           the card of a pushed model
files.py          tensor files of any kind, by name: pickles, safetensors, folders
tensors.py        a tensor of a file, number types, limits
pickle_reader.py  pickles as inert records: opcodes, and nothing else
torch_forms.py    what the records mean: tensors, arrays, plain containers
torch_pickle.py   PyTorch's archives and streams, and writing them
descriptions.py   our description beside the weights, checked by type and size
hugging_face.py   config.json of `transformers`
names.py          one table of names, for both directions and both programs
architecture.py   the model that a set of tensors belongs to
reading.py        the reading of a file, made once: its format, and our names and shapes
convert.py        whole models in and out
start.py          what a training run starts from
"""

# All that users may name as weights, for messages.
FORMS = (
    "a workdir or one of its checkpoints/STEP, an official .pth or another file of weights, a "
    "Hugging Face folder, a model of the hub (OWNER/NAME or OWNER/NAME@REVISION), an https:// "
    "address, or a gs:// or s3:// path"
)
