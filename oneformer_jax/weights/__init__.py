"""Weights of other programs: reading and writing their files, names and architectures.

files.py         tensor files of any kind, by name: PyTorch pickles (no PyTorch needed), safetensors
torch_pickle.py  PyTorch's file formats
names.py         one table of names, for both directions and both programs
architecture.py  the model that a set of tensors belongs to
published.py     the published models: what their tensors cannot tell
convert.py       whole models in and out, and what a training run starts from
"""
