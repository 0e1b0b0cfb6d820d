"""Metrics as mergeable states: `pq`, `iou`, `ap`, and those of Cityscapes.

Each metric runs on the host, in NumPy, and has the same methods:

  update(segmentation, record)  adds one image, returns its `Outcome`
  merge(other)                  adds the images of another state, for example another host's
  state() / from_state(state)   the state as a flat dict of arrays, and back
  compute()                     the scalars, in percent; NaN if a value is not defined
  undefined()                   the reason for each of those NaNs
  per_class() / counts()        arrays of length K; and numbers of images, segments, ...

A `record` is the ground truth of one image: `panoptic` int32 [H, W] segment ids (0 = void),
`segments` (list of dicts with `id`, `category` = contiguous class id, `iscrowd`, `area` from the
annotation file) and `image_id`. Every metric reads its truth from it: instances are the thing
segments, and the semantic map gives every segment, crowds included, its class. If the dataset has a
separate semantic annotation (ADE20K), `semantic` is that map, [H, W].
"""
