"""Pictures of segmentations and of training samples."""
