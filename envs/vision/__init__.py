"""Vision tasks: captioned scenes, COCO data and its scores, environments around vision models."""
