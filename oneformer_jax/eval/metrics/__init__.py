"""Metrics as mergeable states: `pq`, `iou`, `ap`, and those of Cityscapes.

Each metric lives on the host, in NumPy, and has the same seven methods:

  update(segmentation, record)  adds one image
  merge(other)                  adds the images of another state, for example another host's
  state() / from_state(state)   the state as a flat dict of arrays, and back
  compute()                     the scalars, in percent; NaN where a value is not defined
  undefined()                   why each of those NaNs is one
  per_class() / counts()        arrays of length K; and plain numbers of what was seen

A `record` is the ground truth of one image: `panoptic` int32 [H, W] segment ids (0 = void),
`segments` (list of dicts with `id`, `category` = contiguous class id, `iscrowd`, `area` as the
annotation file says) and `image_id`. Every metric reads its truth from there: instances are the
thing segments, and the semantic map gives every segment, crowds included, its class. Where the
dataset has a semantic annotation of its own (ADE20K), `semantic` is that map, [H, W].
"""
