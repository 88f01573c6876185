"""What all formats share: the job, streamed tensors, packing, the manifest and the model card."""
