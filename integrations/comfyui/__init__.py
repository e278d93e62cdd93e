"""Nodes of latentrt for ComfyUI: put this folder into `custom_nodes`, and latentrt into ComfyUI's Python."""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
