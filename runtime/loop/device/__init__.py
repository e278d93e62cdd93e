"""The loop on a device: buffers, bound nets, captured graphs, what to do when memory is short."""
