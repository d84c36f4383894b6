"""DETR: object detection as direct set prediction with a transformer (Carion et al., arXiv 2005.12872)."""
