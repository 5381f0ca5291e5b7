"""What to launch and how: decides, launches, keeps running."""
