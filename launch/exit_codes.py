"""What the commands return beside 0."""

USER_ERROR = 2
INTERRUPTED = 130  # as shells have it for Ctrl-C
