"""Whatever pays a reward: control environments, problems with verifiers, vision tasks."""
