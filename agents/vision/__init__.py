"""Jobs that train vision models, by labels and by reward."""
