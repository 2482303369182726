"""GPU kernels: arrays in, arrays out. Nothing here knows what a BlockMask is."""
