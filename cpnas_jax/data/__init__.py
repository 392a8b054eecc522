"""Data sets, their order, and augmentation on the device."""
