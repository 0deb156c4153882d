"""What a training step will need on TPUs, from the TPU compiler and without a TPU."""
