"""What all formats share: a job, its tensors as a stream, packing, manifest, model card."""
