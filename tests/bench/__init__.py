"""`make bench`: what the service costs, beside a bare floor measured in the same run. Never a timed test."""
