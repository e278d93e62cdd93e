"""Every table and figure of the benchmarks, made of their JSON documents alone: `latentrt bench report`."""
